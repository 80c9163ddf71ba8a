"""KVzap: its surrogate, fitted on KVzip+ in float64 and read again, what it keeps, and what every policy promises."""

import math

import pytest
import torch
from language import make_tokenizer, save_model
from safetensors.torch import load_file
from test_cli import model_folder  # noqa: F401  a fixture
from test_fixed import PROMPTS, logits
from tiny import fitted_options, shared_model, tiny_model, tokens

import kvbench
from kvbench.capture.record import SourceText
from kvbench.contract.budget import Budget
from kvbench.contract.errors import KVBenchError
from kvbench.engine.conformance.checks import Conformance
from kvbench.engine.generation import generate, generate_batch
from kvbench.engine.prefill import prefill
from kvbench.fitting import kvzap as fitting
from kvbench.models import LoadedModel
from kvbench.plugins import registry
from kvbench.strategies.evicting.kvzap import Surrogate

WINDOW = 8


def attach(model, budget=24, every=None, allocator="uniform", **options):
    given = Budget(tokens=budget, allocator=allocator, compress_every=every)
    options = {"window": WINDOW} | fitted_options("kvzap", model) | options
    return kvbench.attach(model, policy="kvzap", budget=given, options=options)


def inputs_of(model, ids):
    """The inputs [n, D] of each layer's attention, float64."""
    found, handles = {}, []
    for layer in model.model.layers:

        def note(module, args, kwargs):
            found[module.layer_idx] = kwargs["hidden_states"][0].double()

        handles.append(layer.self_attn.register_forward_pre_hook(note, with_kwargs=True))
    with torch.no_grad():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return found


def predicted(path, hidden):
    """Scores [n, G] of each layer by the file's own tensors."""
    held = load_file(path)
    return {number: x @ held[f"{number}.weight"].double().T + held[f"{number}.bias"].double()
            for number, x in hidden.items()}  # fmt: skip


@pytest.mark.parametrize("chunk", [None, 13])
@pytest.mark.parametrize("threshold", [None, 6.0])
def test_the_heads_of_a_layer_keep_what_the_surrogate_scores_best(threshold, chunk):
    model, ids = tiny_model(pad_token_id=None), tokens(1, 61, seed=3)[0].tolist()
    options = fitted_options("kvzap", model)
    scores = predicted(options["surrogate"], inputs_of(model, ids))
    with attach(model, threshold=threshold, **options) as session:
        generate(session, ids, max_new_tokens=1, prefill_chunk=chunk)
        stores = session.cache.stores()
    sizes = set()
    for number, store in enumerate(stores):
        flat = scores[number][: 61 - WINDOW].T.flatten()
        chosen = flat.topk(2 * (24 - WINDOW)).indices.tolist()
        kept = {divmod(place, 61 - WINDOW) for place in chosen if threshold is None or flat[place] >= threshold}
        held = store.static_ids.expand(1, 2, -1)[0]
        for group in range(2):
            expected = {token for head, token in kept if head == group} | set(range(61 - WINDOW, 61))
            assert {token for token in held[group].tolist() if token >= 0} == expected
            sizes.add(len(expected))
    assert len(sizes) > 2
    assert threshold is None or sum(len(s.static_ids[s.static_ids >= 0]) for s in stores) < 2 * 24 * 3


@pytest.mark.parametrize(("every", "allocator"), [(None, "uniform"), (None, "ada"), (8, "uniform"), (8, "ada")])
@torch.inference_mode()
def test_fixed_steps_give_the_logits_of_the_hooks(every, allocator):
    model = tiny_model(pad_token_id=None)
    with attach(model, every=every, allocator=allocator) as session:
        hooks, expected = logits(session, None, 22, "eager", PROMPTS)
        fixed, found = logits(session, None, 22, "fixed", PROMPTS)
    assert [one.tokens for one in fixed] == [one.tokens for one in hooks]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


def test_an_answer_is_compressed_by_the_scores_of_its_own_tokens():
    model, prompt = tiny_model(pad_token_id=None), tokens(1, 20, seed=4)[0].tolist()
    options = fitted_options("kvzap", model)
    with attach(model, every=12, **options) as session:
        (answer,) = generate_batch(session, [prompt], max_new_tokens=[14], decoding="eager")
        ids = session.cache.stores()[0].static_ids.expand(1, 2, -1)[0]
    whole = prompt + answer.tokens
    scores = predicted(options["surrogate"], inputs_of(model, whole))[0]  # the first layer's inputs are exact
    for group in range(2):
        best = scores[: 32 - WINDOW, group].topk(24 - WINDOW).indices.tolist()
        assert set(ids[group].tolist()) == set(best) | set(range(32 - WINDOW, 33))


def test_it_conforms():
    model = shared_model()
    policy = registry().make("policy", "kvzap", fitted_options("kvzap", model))
    report = Conformance(model).check_policy(policy)
    assert report.failure is None and all(check.status == "passed" for check in report.checks)


def test_a_saved_context_goes_on_bit_for_bit(tmp_path):
    model, prompt, options = tiny_model(pad_token_id=None), tokens(1, 40), fitted_options("kvzap", shared_model())
    options = fitted_options("kvzap", model)
    answers = []
    for load in (False, True):
        with attach(model, every=12, **options) as session, torch.inference_mode():
            if load:
                session.load(tmp_path / "state")
            else:
                model(prompt)
                session.save(tmp_path / "state")
            answers.append(torch.stack([
                model(torch.tensor([[token]]), past_key_values=session.cache).logits for token in range(5, 30)
            ]))  # fmt: skip
    assert torch.equal(*answers)


# -- the surrogate ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded():
    tokenizer = make_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=512, eos_token_id=1)
    return LoadedModel(model, tokenizer, "tiny", "f", model.device, model.dtype, 512)


TEXT = SourceText("text", "\n".join(f"line {n} of some text with {n * 7919 % 1000} in it" for n in range(400)))


def test_scores_are_those_of_kvzip_plus(loaded):
    """By a replay of all in one call, head by head, in float64."""
    model, teacher = loaded.model, fitting._Teacher()
    ids = loaded.tokenizer.encode(TEXT.text[:200], add_special_tokens=False)[:40]
    session = kvbench.attach(model, policy=teacher, budget=Budget(ratio=1.0), tokenizer=loaded.tokenizer)
    with teacher.watching(model), session:
        generate(session, ids, max_new_tokens=0)
    replayed = ids + teacher._texts[0] + list(teacher._closing) + ids
    hidden, found = inputs_of(model, replayed), {}
    with kvbench.attach(model, policy="full") as exact, torch.inference_mode():
        attention = exact.attention

        def noting(module, query, key, value, mask, **kwargs):
            found.setdefault(module.layer_idx, [part[0].double() for part in (query, key, value)])
            return attention(module, query, key, value, mask, **kwargs)

        exact.attention = noting
        model(torch.tensor([replayed]))
    for number, layer in enumerate(model.model.layers):
        (queries, keys, values), outward = found[number], layer.self_attn.o_proj.weight.detach().double()
        ((inputs, scores),) = teacher.found[number]
        torch.testing.assert_close(inputs.double(), hidden[number][:40], rtol=1e-4, atol=1e-4)
        for group in range(2):
            best = torch.zeros(40).double()
            for head in range(group * 3, group * 3 + 3):
                norms = (values[group, :40] @ outward[:, head * 8 : head * 8 + 8].T).norm(dim=1)
                for asking in range(40, len(replayed)):
                    # chunked scoring: the prompt's keys and the replayed ones up to the query
                    weights = (keys[group, : asking + 1] @ queries[head, asking] / math.sqrt(8)).softmax(0)[:40]
                    best = torch.maximum(best, weights * norms / hidden[number][asking].norm())
            torch.testing.assert_close(scores[:, group].double(), best.log(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_fit_predicts_texts_that_it_has_not_seen(loaded, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "EPOCHS", 4)
    told = []
    found = fitting.fit(loaded, TEXT, kind=kind, samples=8, length=100, seed=1, progress=lambda *now: told.append(now))
    assert told[7] == ("texts", 8, 8) and told[-1] == ("layers", 3, 3)
    assert (found.tokens, found.held_out) == (700, 100)
    assert all(0 < share <= 1 for share in found.explained.values()) and found.explained[0] > 0.3, found.explained
    found.surrogate.save(tmp_path / "s")
    again = Surrogate.load(tmp_path / "s")
    hidden = torch.randn(2, 5, 48)
    assert torch.equal(again(1, hidden), found.surrogate(1, hidden)) and again.kind == kind
    options = {"surrogate": str(tmp_path / "s"), "window": WINDOW}
    with kvbench.attach(loaded.model, policy="kvzap", budget=24, options=options) as session:
        assert len(generate(session, list(range(5, 60)), max_new_tokens=4).tokens) == 4


def test_a_linear_fit_is_the_ridge_regression():
    torch.manual_seed(0)
    """By its normal equations with an intercept of no penalty, of inputs that differ in size."""
    x, y = torch.randn(200, 6).double() * torch.tensor([1, 100, 1, 1, 0.1, 1]) + 2, torch.randn(200, 2).double()
    weight, bias = fitting._linear(x, y, 0)
    wide = torch.cat([(x - x.mean(0)) / x.std(0), torch.ones(200, 1)], dim=1)
    penalty = torch.diag(torch.tensor([0.1 * 200] * 6 + [0.0])).double()
    expected = torch.linalg.solve(wide.T @ wide + penalty, wide.T @ y)
    torch.testing.assert_close(weight.T.double(), expected[:6] / x.std(0)[:, None], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(x @ weight.T.double() + bias.double(), wide @ expected, rtol=1e-3, atol=1e-4)


def test_the_command_fits_and_a_run_uses_it(kvbench, model_folder, tmp_path):  # noqa: F811
    text, file = tmp_path / "text", tmp_path / "surrogate.safetensors"
    text.write_text(TEXT.text)
    small = ("--samples", 3, "--length", 60, "--text", text)
    code, out, err = kvbench("fit", "kvzap", "--model", model_folder, "--output", file, *small)
    assert (code, "explains" in out, file.exists()) == (0, True, True), err
    run = ("run", "--model", model_folder, "--context-length", 512, "--examples", 1, "--output", tmp_path / "out")
    task = ("--task", "infinitebench_passkey", "--no-baseline", "--probe-examples", 1, "--ratio", 0.5)
    code, _, err = kvbench(*run, *task, "--policy", "kvzap", "-o", f"surrogate={file}", "-o", "window=8")
    assert code == 0, err
    other = save_model(tmp_path / "other", num_hidden_layers=2)
    for arguments, told in (
        (("fit", "kvzap", "--model", model_folder, "--output", file, "--kind", "deep"), "--kind deep is no surrogate"),
        (("fit", "kvzap", "--model", model_folder, "--output", tmp_path), "name a file in a folder that exists"),
        (("fit", "kvzap", "--model", model_folder, "--output", file, *small[:2], "--length", 4000), "tokens"),
        (
            (*run, *task, "--policy", "kvzap", "-o", f"surrogate={file}", "-o", "window=8", "--model", other),
            f"Error: The surrogate {file} was fitted on another model",
        ),
        ((*run, *task, "--policy", "kvzap"), "needs a surrogate that was fitted on the model"),
        ((*run, *task, "--policy", "kvzap", "-o", f"surrogate={text}"), "cannot be read"),
        ((*run, *task, "--policy", "kvzap", "-o", "surrogate=nowhere"), "cannot be read"),
    ):
        code, _, err = kvbench(*arguments)
        assert (code, told in " ".join(err.split())) == (2, True), err


def test_all_policies_are_checked_without_it(kvbench, model_folder, monkeypatch):  # noqa: F811
    classes = registry().classes
    some = {name: classes["policy"][name] for name in ("full", "quest", "kvzap")}
    monkeypatch.setattr(registry(), "classes", {**classes, "policy": some})
    code, out, err = kvbench("check", "--model", model_folder, "--policy", "all", "-o", "page_size=8")
    assert (code, "quest" in out, "Left out: Policy 'kvzap' needs a surrogate" in err) == (0, True, True), (out, err)
    assert kvbench("check", "--model", model_folder, "--policy", "kvzap")[0] == 2


def test_a_surrogate_of_another_model_is_refused(tmp_path):
    model = tiny_model(pad_token_id=None)
    options = fitted_options("kvzap", tiny_model(pad_token_id=None, seed=1))
    with pytest.raises(KVBenchError, match=r"was fitted on another model \(LlamaForCausalLM, \w+\) than this one"):
        attach(model, **options).__enter__()
    half = tiny_model(pad_token_id=None).to(torch.bfloat16)  # the same weights
    with attach(half, **fitted_options("kvzap", model)) as session:
        assert len(generate(session, PROMPTS[0], max_new_tokens=2).tokens) == 2
    known = prefill(model, [PROMPTS[0]])
    with attach(model) as session, pytest.raises(KVBenchError, match="looks at the prompt's hidden states"):
        session.resume(known)
