"""The tables of a rotary embedding rotate as the model does."""

from types import SimpleNamespace

import pytest
import torch
from tiny import shared_model

from kvbench.contract.step import Clock
from kvbench.engine.rotary import Rotary
from kvbench.strategies.selecting.rotations import angles, pairs

pytestmark = pytest.mark.transformers


def layer_of(architecture):
    model = shared_model(architecture)
    module = model.model.layers[0].self_attn
    rotary = Rotary(model, model.config, module, 0)
    return SimpleNamespace(head_dim=8, rotate=rotary.rotate)


def clock():
    return Clock(torch.zeros(1, dtype=torch.int32), 4)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3"])
def test_tables_rotate_as_the_model_does(architecture):
    layer, shared = layer_of(architecture), clock()
    found = angles(layer, 300, shared)
    x = torch.randn(300, 8)
    expected = layer.rotate(x, torch.arange(300))
    torch.testing.assert_close(x * found.cos + x[:, found.partner.long()] * found.sin, expected)
    assert angles(layer, 300, shared) is found  # made once


def test_channels_that_are_not_rotated_stay():
    whole = layer_of("llama")

    def rotate(x, positions):
        return torch.cat([whole.rotate(x[..., :8], positions), x[..., 8:]], dim=-1)

    layer = SimpleNamespace(head_dim=11, rotate=rotate)
    found = angles(layer, 20, clock())
    assert found.partner.tolist()[8:] == [8, 9, 10] and sorted(found.partner.tolist()) == list(range(11))
    x = torch.randn(20, 11)
    torch.testing.assert_close(x * found.cos + x[:, found.partner.long()] * found.sin, rotate(x, torch.arange(20)))


def test_what_mixes_more_than_two_channels_has_no_tables():
    mixing = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0))).Q
    layer = SimpleNamespace(head_dim=8, rotate=lambda x, positions: x @ mixing)
    assert pairs(layer, torch.device("cpu")) is None and angles(layer, 20, clock()) is None
