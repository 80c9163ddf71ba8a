"""Caches that hold every token in codes, against float64 formulas, and their steps of fixed shapes."""

import pytest
import torch
from test_fixed import PROMPTS, logits
from tiny import shared_model, tiny_model, tokens

import kvbench
from kvbench.contract.errors import KVBenchError
from kvbench.contract.policy import Place
from kvbench.plugins import registry
from kvbench.strategies.compressing.turboquant import levels, rotation

OPTIONS = {
    "int8": [{}], "fp8": [{}, {"format": "e5m2"}, {"scale": "token"}],
    "turboquant": [{"bits": bits} for bits in (1, 2, 3, 4)],
}  # fmt: skip
EACH = [(policy, options) for policy, several in OPTIONS.items() for options in several]


def tokens_of(policy, options, x):
    kind = registry().find("policy", policy)
    return kind.codes(kind.Options(**options), x, x)


def fp8(x, mantissa, lowest, largest):
    """Round to `mantissa` bits of mantissa, exponents from `lowest` on, and at most `largest`."""
    exponent = x.abs().log2().floor().clamp_min(lowest)
    step = 2.0 ** (exponent - mantissa)
    return ((x / step).round() * step).clamp(-largest, largest)


@pytest.mark.parametrize(("policy", "options"), EACH[:4])
def test_eight_bits_are_those_of_the_formula(policy, options):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 50, 16) * torch.tensor([1e-3, 1.0, 300.0])[:, None, None]
    wide = x.double()
    peak = wide.abs().amax(-1, keepdim=True)
    if policy == "int8":
        expected = (wide / (peak / 127)).round() * (peak / 127)
        assert (expected - wide).abs().max() <= peak.max() / 254
    else:
        shape = (2, -14, 57344.0) if options.get("format") == "e5m2" else (3, -6, 448.0)
        unit = peak / shape[2] if options else torch.ones(())
        unit = unit if options.get("scale") else torch.ones(())
        expected = fp8(wide / unit, *shape) * unit
    found = tokens_of(policy, options, x).values.double()
    # a number between two codes may go either way in float32
    assert ((found - expected).abs() <= 1e-5 * expected.abs() + 1e-9).double().mean() > 0.998
    assert (found - wide).abs().max() <= (expected - wide).abs().max() * 1.001


def test_turboquant_has_the_best_levels_and_reaches_the_published_distortion():
    assert levels(1).tolist() == pytest.approx([-0.7979, 0.7979], abs=1e-4)  # Max 1960
    assert levels(2).tolist() == pytest.approx([-1.510, -0.4528, 0.4528, 1.510], abs=1e-3)
    torch.manual_seed(0)
    x = torch.randn(1, 1, 2000, 128) * 3
    x[..., 5:9] *= 4  # channels of large numbers, which rotation spreads
    for bits, published in zip((1, 2, 3, 4), (0.36, 0.117, 0.03, 0.009), strict=True):  # arXiv 2504.19874, theorem 1
        found = tokens_of("turboquant", {"bits": bits}, x).values
        norms = x.norm(dim=-1)
        torch.testing.assert_close(found.norm(dim=-1), norms, rtol=1e-3, atol=1e-3)  # its own norm
        # the correction of the norm takes the error from D to 2 − 2√(1 − D)
        assert ((found - x).norm(dim=-1) / norms).square().mean() == pytest.approx(
            2 - 2 * (1 - published) ** 0.5, rel=0.1
        )


@pytest.mark.parametrize("size", [8, 64, 80])
def test_rotations_are_orthogonal(size):
    turn = rotation(size, 3).double()
    torch.testing.assert_close(turn @ turn.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-6)


def test_turboquant_codes_are_the_nearest_levels_of_the_rotated_vector():
    torch.manual_seed(2)
    x = torch.randn(2, 2, 30, 24)
    found = tokens_of("turboquant", {"bits": 3}, x).values.double()
    turn, best = rotation(24, 0).double(), levels(3).double()
    for row in x.double().reshape(-1, 24).split(1):
        unit = (row @ turn)[0] / row.norm() * 24**0.5
        nearest = torch.stack([best[(best - one).abs().argmin()] for one in unit])
        expected = nearest / nearest.norm() * row.norm() @ turn.T
        assert float((found.reshape(-1, 24) - expected).norm(dim=1).min()) < 2e-3 * row.norm()


def test_turboquant_refuses_heads_whose_codes_fill_no_bytes():
    with pytest.raises(KVBenchError, match="heads of 12 channels: its codes need a multiple of 8"):
        tokens_of("turboquant", {}, torch.randn(1, 1, 5, 12))


def test_turboquant_leaves_the_first_and_last_layers_as_they_are():
    policy = registry().make("policy", "turboquant", {})
    assert [policy.governs(Place(i, 30, i)) for i in (0, 1, 2, 27, 28, 29)] == [False, False, True, True, False, False]
    assert all(policy.governs(Place(i, 3, i)) for i in range(3))


@pytest.mark.parametrize(("policy", "options", "share"), [
    ("int8", {}, (8 + 4) / 32), ("fp8", {}, 8 / 32), ("fp8", {"scale": "token"}, (8 + 4) / 32),
    ("turboquant", {}, (4 + 2) / 32), ("turboquant", {"bits": 3}, (3 + 2) / 32),
])  # fmt: skip
def test_bytes_are_those_of_the_codes(policy, options, share):
    """Heads of 8 channels: a float32 scale takes 4 more bits of each number, a float16 norm 2."""
    model = shared_model()
    with kvbench.attach(model, policy=policy, options=options) as session, torch.no_grad():
        model(tokens(1, 500))
        assert session.cache.bytes() == {"resident": round(500 * 2 * 2 * 8 * 4 * 3 * share), "offloaded": 0, "index": 0}


@pytest.mark.parametrize(("policy", "options"), [("int8", {}), ("fp8", {}), ("fp8", {"scale": "token"}),
                                                 ("turboquant", {"bits": 3})])  # fmt: skip
@torch.inference_mode()
def test_fixed_steps_give_the_logits_of_the_hooks(policy, options):
    model = tiny_model(pad_token_id=None)
    with kvbench.attach(model, policy=policy, options=options) as session:
        hooks, expected = logits(session, None, 12, "eager", PROMPTS)
        fixed, found = logits(session, None, 12, "fixed", PROMPTS)
    assert [one.tokens for one in fixed] == [one.tokens for one in hooks]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)
    assert fixed[0].reads["device"] > 0


@pytest.mark.parametrize("policy", ["snapkv+int8", "quest+turboquant", "snapkv+fp8"])
def test_other_policies_hold_and_select_codes(policy):
    model = shared_model()
    with kvbench.attach(
        model, policy=policy, budget=40, options={"window": 8} if "snap" in policy else {"page_size": 4}
    ):
        out = model.generate(tokens(1, 90), max_new_tokens=8, do_sample=False)
    assert out.shape == (1, 98)
