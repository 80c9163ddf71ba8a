"""A model whose layers lie on several devices gives what it gives on one, whatever the policy and the budget."""

import accelerate
import pytest
import torch
from fake_devices import FakeDevices, spread
from tiny import ALIKE, every_policy, of_each_kind, small_options, tiny_model, tokens

import kvbench
from kvbench import kernels
from kvbench.engine.generation import force, generate
from kvbench.engine.prefill import prefill
from kvbench.plugins import registry

pytestmark = pytest.mark.transformers

PLACES = {
    "model.embed_tokens": "cuda:0", "model.rotary_emb": "cuda:0", "model.layers.0": "cuda:0",
    "model.layers.1": "cuda:1", "model.layers.2": "cuda:0", "model.norm": "cuda:1", "lm_head": "cuda:1",
}  # fmt: skip
POLICIES = of_each_kind(name for name, policy in every_policy().items() if policy.cached)


@pytest.fixture(autouse=True)
def torch_kernels():
    """Pretended GPUs cannot launch Triton's kernels."""
    with kernels.using("torch"):
        yield


def session(model, policy, allocator="uniform"):
    kind = registry().find("policy", policy)
    options = {**small_options(kind), **({"residual": 32} if policy == "kivi" else {})}
    budget = kvbench.Budget(tokens=24, allocator=allocator) if kind.takes_budget else None
    return kvbench.attach(model, policy=policy, budget=budget, options=options)


def padded():
    ids, mask = tokens(3, 61), torch.ones(3, 61, dtype=torch.long)
    ids[1, :11], mask[1, :11] = 0, 0
    return ids, mask


def answers(model, policy, allocator="uniform", place=None):
    """Logits of a prompt in a padded batch and of six forced tokens."""
    ids, mask = padded()
    more, found = tokens(3, 6, seed=9), []
    if place is not None:
        ids, mask, more = ids.to(place), mask.to(place), more.to(place)
    with session(model, policy, allocator), torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
        for step in range(more.shape[1]):
            found.append(out.logits[:, -1].cpu())
            mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
            out = model(
                more[:, step : step + 1], attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=out.past_key_values,
            )  # fmt: skip
    return torch.stack([*found, out.logits[:, -1].cpu()])


@pytest.mark.parametrize(
    ("policy", "allocator"),
    [(policy, "uniform") for policy in POLICIES if policy not in ALIKE]
    + [(policy, kind) for policy in ("snapkv", "duo_attention", "quest") for kind in ("ada", "squeeze", "pyramid")],
)
def test_tensors_of_layers_on_different_devices_never_meet(policy, allocator, monkeypatch):
    waited = set()

    class Stream:
        def __init__(self, device=None):
            self.device = device

        def synchronize(self):
            waited.add(self.device)

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    found = []
    with FakeDevices():
        for places in (dict.fromkeys(PLACES, "cuda:0"), PLACES):
            waited.clear()
            model = tiny_model()
            spread(model, places)
            found.append(answers(model, policy, allocator, place="cuda:0"))
    assert torch.equal(*found)
    assert waited == {torch.device("cuda:0"), torch.device("cuda:1")}, "times would leave out a device's work"


def test_the_fake_devices_refuse_what_real_ones_refuse():
    with FakeDevices():
        here, there = torch.ones(3, device="cuda:0"), torch.arange(3, device="cuda:1")
        assert (here.device, there.device) == (torch.device("cuda:0"), torch.device("cuda:1"))
        for meet in (
            lambda: here + there,
            lambda: torch.cat([here, torch.ones(3)]),
            lambda: here[there],
            lambda: here.gather(0, torch.arange(3)),
        ):
            with pytest.raises(RuntimeError):
                meet()
        with pytest.raises(TypeError, match="numpy"):
            here.numpy()
        here[:2] = there[:2]
        assert (here[torch.tensor([0, 1])] * torch.tensor(2.0) + there.to(here.device)[:2]).device == here.device


@pytest.mark.parametrize("policy", ["full", "snapkv", "infllm", "duo_attention", "kvzip", "infinigen", "full_no_cache"])
@pytest.mark.parametrize("whole", [True, False])
def test_weights_that_accelerate_keeps_on_disk_between_calls_change_nothing(policy, whole, tmp_path):
    prompt, found = tokens(1, 61)[0].tolist(), []
    for model in (tiny_model(), tiny_model()):
        if found and whole:
            accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
        elif found:
            places = {name: "disk" if place == "cuda:1" else "cpu" for name, place in PLACES.items()}
            accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
        with session(model, policy) as attached:
            mine = generate(attached, prompt, max_new_tokens=6)
            forced = force(attached, prompt, prompt_tokens=50)
        found.append((mine.tokens, forced.tokens, prefill(model, [prompt]).logits.argmax().item()))
    assert found[0] == found[1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("policy", POLICIES)
def test_a_model_that_accelerate_spreads_over_two_gpus_gives_what_it_gives_on_one(policy):
    expected = answers(tiny_model().to("cuda:0"), policy, place="cuda:0")
    places = {name: int(place[-1]) for name, place in PLACES.items()}
    model = accelerate.dispatch_model(tiny_model(), places)
    torch.testing.assert_close(answers(model, policy, place="cuda:0"), expected)
