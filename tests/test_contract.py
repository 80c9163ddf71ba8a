"""What a policy can reach beyond its own layer: the model, attention inputs, rotation, storage, further passes."""

import sys

import pytest
import torch
from test_session import generate, padded_batch
from tiny import ARCHITECTURES, tiny_model, tokens

import kvbench
from kvbench.contract.errors import KVBenchError
from kvbench.contract.storage import Storage, TokenBuffer

pytestmark = pytest.mark.transformers

GOVERNED = [name for name in ARCHITECTURES if name != "mistral"]
YARN = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
                            "original_max_position_embeddings": 64}}  # fmt: skip


class Bare(kvbench.KVCachePolicy):
    name, summary = "bare", "Keeps everything, attending through the static set."
    takes_budget = False


def test_a_policy_sees_the_model_once_before_it_runs():
    class Looks(Bare):
        seen = ()

        def begin(self, model):
            self.seen += (model,)

    policy, model = Looks(), tiny_model("gemma3")
    with kvbench.attach(model, policy=policy):
        generate(model, tokens(1, 40), steps=3)
    (view,) = policy.seen
    assert (view.numbers, view.heads, view.kv_heads, view.tokenize) == ((1, 2), 6, 2, None)
    assert view.config["hidden_size"] == 48
    weight = view.parameters["model.layers.1.self_attn.q_proj.weight"]
    assert torch.equal(weight, model.model.layers[1].self_attn.q_proj.weight)
    assert not weight.requires_grad


@pytest.mark.parametrize("architecture", GOVERNED)
def test_the_attention_input_of_a_step_gives_its_queries(architecture):
    class Projects(Bare):
        uses_hidden, steps = True, 0

        def select(self, layer, queries, budget):
            torch.testing.assert_close(layer.queries_for(layer.hidden), queries)
            if layer.previous is not None:
                other = layer.queries_for(layer.previous.hidden)
                assert other.shape == queries.shape
                assert not torch.allclose(other, queries)
            self.steps += 1
            return kvbench.Selection()

    model, policy = tiny_model(architecture), Projects()
    ids, mask = padded_batch()
    plain = generate(model, ids, mask, steps=6)
    with kvbench.attach(model, policy=policy):
        assert torch.equal(generate(model, ids, mask, steps=6), plain)
    assert policy.steps == 5 * 3 * (2 if architecture == "gemma3" else 3)
    with kvbench.attach(model, policy=policy, prompt_tokens=30), torch.no_grad():
        out = model(tokens(2, 30))
        model(tokens(2, 4, seed=1), past_key_values=out.past_key_values)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_queries_for_another_input_are_the_projected_and_rotated_ones():
    model = tiny_model()

    class Projects(Bare):
        uses_hidden = True

        def select(self, layer, queries, budget):
            if layer.previous is not None:
                hidden = layer.previous.hidden
                plain = (hidden @ model.model.layers[layer.number].self_attn.q_proj.weight.T).view(1, 1, 6, 8)
                expected = layer.rotate(plain.transpose(1, 2), torch.tensor([layer.tokens - 1]))
                torch.testing.assert_close(layer.queries_for(hidden), expected)
            return kvbench.Selection()

    with kvbench.attach(model, policy=Projects()):
        generate(model, tokens(1, 40), steps=5)


def unrotated_keys(model, ids, mask=None):
    found = {}

    class Unrotates(Bare):
        def prefill(self, layer, queries, keys, values):
            positions = torch.arange(layer.tokens)
            plain = layer.unrotate(keys, positions)
            torch.testing.assert_close(layer.rotate(plain, positions), keys)
            found[layer.ordinal, layer.tokens] = plain, layer

    with kvbench.attach(model, policy=Unrotates()):
        generate(model, ids, mask, steps=2)
    return found


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [*((name, {}) for name in GOVERNED), ("llama", YARN), ("phi3", {"partial_rotary_factor": 0.5})],
)
def test_rotation_is_the_models_own_and_can_be_undone(architecture, changes):
    model = tiny_model(architecture, **changes)
    attention = model.model.layers[1].self_attn
    apply = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    kind = ("full_attention",) if architecture == "gemma3" else ()
    positions = torch.tensor([3, 90, 17])
    x = torch.randn(2, 6, 3, 8)
    cos, sin = model.model.rotary_emb(x, positions[None], *kind)
    expected = apply(x, x, cos, sin)[0]
    for _, layer in unrotated_keys(model, tokens(2, 50)).values():
        torch.testing.assert_close(layer.rotate(x, positions), expected)
        torch.testing.assert_close(layer.unrotate(expected, positions), x, atol=1e-5, rtol=1e-4)
    if "rope_parameters" in changes:
        assert not torch.allclose(cos.square() + sin.square(), torch.ones(()))


def test_keys_before_rotation_are_the_projections_and_do_not_depend_on_padding():
    model = tiny_model()
    ids, mask = padded_batch()
    together = unrotated_keys(model, ids, mask)
    for row, length in enumerate((40, 61, 50)):
        alone = unrotated_keys(model, ids[row : row + 1, mask[row] == 1])
        for index in range(3):
            torch.testing.assert_close(together[index, length][0], alone[index, length][0], atol=1e-5, rtol=1e-4)
        embedded = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids[row, mask[row] == 1]))
        expected = model.model.layers[0].self_attn.k_proj(embedded).view(1, length, 2, 8).transpose(1, 2)
        torch.testing.assert_close(alone[0, length][0], expected, atol=1e-5, rtol=1e-4)


def test_a_rotation_that_cannot_be_undone_is_refused():
    model = tiny_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(KVBenchError, match="frequencies change with the length"):
        unrotated_keys(model, tokens(1, 40))


class HalfPrecision(Storage):
    """Set-aside tokens in float16."""

    def __init__(self, keys, values):
        self.keys16, self.values16, self.length = keys.half(), values.half(), keys.shape[2]

    nbytes = property(lambda self: self.keys16.nbytes + self.values16.nbytes)
    keys = property(lambda self: self.keys16.float())
    values = property(lambda self: self.values16.float())

    def append(self, keys, values):
        self.keys16 = torch.cat([self.keys16, keys.half()], dim=2)
        self.values16 = torch.cat([self.values16, values.half()], dim=2)
        self.length += keys.shape[2]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("everything", [False, True])
def test_a_policy_can_hold_what_it_sets_aside_in_a_format_of_its_own(offload, everything):
    class Halves(Bare):
        def prefill(self, layer, queries, keys, values):
            layer.state["context"] = TokenBuffer(keys.clone(), values.clone())
            layer.store.set_aside(2, layer.tokens - 8, offload=offload, storage=HalfPrecision)

        def insert(self, layer, keys, values):
            layer.state["context"].append(keys, values)
            layer.store.advance(keys.shape[2])

        def select(self, layer, queries, budget):
            start, stop = layer.store.aside_start, layer.store.aside_stop
            ids = torch.arange(start, stop).expand(layer.rows, layer.heads, -1)
            return kvbench.Selection(None if everything else ids, everything=everything)

        def attend(self, layer, queries, selection):
            ours = kvbench.contract.attend.attend(layer, queries, selection)
            start, stop = layer.store.aside_start, layer.store.aside_stop
            keys, values = (part.clone() for part in (layer.state["context"].keys, layer.state["context"].values))
            keys[:, :, start:stop], values[:, :, start:stop] = (
                part[:, :, start:stop].half().float() for part in (keys, values)
            )
            expected = torch.nn.functional.scaled_dot_product_attention(
                queries, keys, values, enable_gqa=True, scale=layer.scaling
            )
            torch.testing.assert_close(ours.output, expected, atol=1e-5, rtol=1e-4)
            return ours

    model = tiny_model()
    with kvbench.attach(model, policy=Halves()) as session:
        generate(model, tokens(2, 100), steps=6)
    store = session.cache.stores()[0]
    aside = (105 - 10) * 2 * 2 * 2 * 8 * 2  # tokens, rows, heads, keys and values, channels, float16
    assert store.aside.nbytes == aside
    assert store.offloaded_bytes == (aside if offload else 0)
    assert store.resident_bytes == store._static.nbytes + (0 if offload else aside)


def test_heads_can_be_chosen_that_attend_to_everything_set_aside():
    class OneHead(Bare):
        def prefill(self, layer, queries, keys, values):
            layer.state["context"] = TokenBuffer(keys.clone(), values.clone())
            layer.store.set_aside(4, layer.tokens, offload=False)

        def insert(self, layer, keys, values):
            layer.state["context"].append(keys, values)

        def select(self, layer, queries, budget):
            return kvbench.Selection(everything=True, heads=torch.tensor([[False, True]]))

        def attend(self, layer, queries, selection):
            ours = kvbench.contract.attend.attend(layer, queries, selection)
            seen = torch.ones(6, 1, layer.tokens, dtype=torch.bool)
            seen[:3, :, layer.store.aside_start : layer.store.aside_stop] = False
            context = layer.state["context"]
            expected = torch.nn.functional.scaled_dot_product_attention(
                queries, context.keys, context.values, attn_mask=seen, enable_gqa=True, scale=layer.scaling
            )
            torch.testing.assert_close(ours.output, expected)
            return ours

    model = tiny_model()
    with kvbench.attach(model, policy=OneHead(), probes=["density"]) as session:
        generate(model, tokens(2, 60), steps=6)
    attended = sum((length - 56 + length) / 2 for length in range(61, 66)) / 5
    assert session.probes[0].result()["attended_tokens"] == pytest.approx(attended)


@pytest.mark.parametrize("architecture", GOVERNED)
def test_a_replay_sees_what_a_longer_prompt_gives_and_leaves_no_trace(architecture):
    model = tiny_model(architecture, **({"sliding_window": 48} if architecture == "gemma3" else {}))
    ids, mask = padded_batch()
    more = tokens(3, 9, seed=5)
    seen = {}

    class Replays(Bare):
        def after_prompt(self, layers, ids, replay):
            rows = {40: 0, 61: 1, 50: 2}[layers[0].tokens]
            assert torch.equal(ids, padded[rows : rows + 1, -layers[0].tokens :])
            replay(
                more[rows : rows + 1],
                lambda layer, queries, keys: seen.update({(rows, layer.ordinal): (queries, keys)}),
            )

    class Sees(kvbench.Probe):
        name, summary = "sees", "Keeps the prompt's queries and keys."

        def prefill(self, layer, queries, keys, values):
            longer[layer.ordinal] = queries, keys
            return (yield)

    padded = ids
    plain = generate(model, ids, mask)
    with kvbench.attach(model, policy=Replays()) as session:
        assert torch.equal(generate(model, ids, mask), plain)
        assert session.cache.index_s > 0
    for row in range(3):
        longer = {}
        with kvbench.attach(model, policy=Bare(), probes=[Sees()]):
            generate(model, torch.cat([ids[row : row + 1, mask[row] == 1], more[row : row + 1]], dim=1), steps=1)
        for index, (queries, keys) in longer.items():
            torch.testing.assert_close(seen[row, index][0], queries[:, :, -9:], atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(seen[row, index][1], keys[:, :, -9:], atol=1e-4, rtol=1e-3)


def test_the_prompt_is_taken_over_once_after_its_last_chunk():
    class Counts(Bare):
        calls = ()

        def after_prompt(self, layers, ids, replay):
            self.calls += (([layer.ordinal for layer in layers], ids.shape[1]),)

    model, policy = tiny_model(), Counts()
    with kvbench.attach(model, policy=policy, prompt_tokens=70):
        generate(model, tokens(2, 70), prefill_chunk_size=17)
    assert policy.calls == (([0, 1, 2], 70),)


def test_a_replay_without_ids_or_after_eviction_is_refused():
    class Late(Bare):
        def prefill(self, layer, queries, keys, values):
            layer.store.keep(torch.arange(5))

        def after_prompt(self, layers, ids, replay):
            replay(ids, lambda *_: None)

    model = tiny_model()
    with kvbench.attach(model, policy=Late()):
        with pytest.raises(KVBenchError, match="not whole any more"):
            model(tokens(1, 60))
        with pytest.raises(KVBenchError, match="pass input_ids"):
            model(inputs_embeds=torch.randn(1, 60, 48))


def test_full_no_cache_computes_the_whole_context_for_every_token():
    from kvbench.engine.generation import generate as timed

    model, ids = tiny_model(), tokens(1, 40)
    plain = generate(model, ids, steps=6)
    lengths = []
    handle = model.model.embed_tokens.register_forward_hook(lambda _, args, out: lengths.append(args[0].shape[1]))
    with kvbench.attach(model, policy="full_no_cache") as session:
        done = timed(session, ids[0].tolist(), prompt_tokens=40, max_new_tokens=6)
        assert torch.equal(generate(model, ids, steps=6, use_cache=False), plain)
        with pytest.raises(KVBenchError, match="use_cache=False"):
            generate(model, ids)
    handle.remove()
    assert done.tokens == plain[0].tolist()
    assert lengths[:6] == list(range(40, 46))
    assert len(done.step_s) == 5
    assert done.bytes == {"resident": 0, "offloaded": 0, "index": 0}
