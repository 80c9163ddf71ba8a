"""Shared settings of the tests."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread():
    """Tiny models run faster on one thread, and tests beside each other do not fight for cores."""
    torch.set_num_threads(1)
