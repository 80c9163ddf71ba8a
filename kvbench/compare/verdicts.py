"""A decision in sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvbench.compare.candidates import Candidate, Limits, Scope, distance
from kvbench.compare.wording import bytes_text, count, points
from kvbench.statistics import least_examples


def sentences(scope: Scope, limits: Limits) -> list[str]:
    """The decision, what is dominated, and what the data cannot tell."""
    proven = [one for one in scope.choices if one.fits and one.verdict == "within"]
    likely = [one for one in scope.choices if one.fits and one.verdict == "unknown" and one.observed_within]
    where = f" and {limits.size_text}" if limits.size_text else ""
    found = []
    if proven:
        found.append(f"Shown {limits.text}{where}: {_named(proven)}.")
    else:
        found.append(f"No budget here is shown {limits.text}{where}.")
    if likely:
        lead = "Not proven, but as near on these examples" if proven else "On these examples alone"
        found.append(f"{lead}: {_named(likely)}. {_too_few(scope, limits, likely)}".strip())
    elif not proven:
        nearest = [one for one in scope.candidates if one.fits]
        if nearest:
            best = min(nearest, key=distance)
            far = f"{best.kl or 0:.3g} nats" if best.difference is None else f"{points(-distance(best))} points"
            found.append(f"The nearest is {best.name}, {far}.")
        else:
            least = min(scope.candidates, key=lambda one: one.total_bytes)
            found.append(f"None has so few bytes; the fewest are {bytes_text(least.total_bytes)}, of {least.name}.")
    if scope.accuracy is not None and scope.accuracy < 0.05:
        found.append("Exact attention itself scores next to nothing here: these tasks cannot judge policies.")
    beyond = [one.name for one in scope.candidates if one.verdict == "beyond"]
    if beyond:
        found.append(f"Shown to be worse than that: {_some(beyond)}.")
    unsure = [one for one in scope.candidates if one.verdict == "unknown" and not one.observed_within]
    if unsure:
        found.append(
            f"Beyond it on these examples, which are too few to be sure: {_some([_with_need(one) for one in unsure])}."
        )
    dominated = [f"{one.name} (by {one.dominated_by})" for one in scope.candidates if one.dominated_by]
    if dominated:
        found.append(
            "Dominated, that is another has no more bytes, is no slower and is no less accurate as measured: "
            f"{_some(dominated)}."
        )
    return found


def _named(choices: Sequence[Candidate]) -> str:
    roles: list[tuple[str, Callable[[Candidate], float]]] = [("fewest bytes", lambda one: one.total_bytes)]
    if len({one.bytes["resident"] for one in choices}) > 1:
        roles.append(("fewest on the device", lambda one: one.bytes["resident"]))
    timed = [one for one in choices if one.tpot_s is not None]
    if len(timed) == len(choices):
        roles.append(("fastest", lambda one: one.tpot_s or 0.0))
    if len(choices) == 1:
        return choices[0].name
    picked: dict[str, list[str]] = {}
    for role, cost in roles:
        picked.setdefault(min(choices, key=cost).name, []).append(role)
    rest = [one.name for one in choices if one.name not in picked]
    text = "; ".join(f"{name} ({', '.join(roles)})" for name, roles in picked.items())
    return text + (f"; also {_some(rest)}" if rest else "")


def _too_few(scope: Scope, limits: Limits, likely: Sequence[Candidate]) -> str:
    fewest = min(one.examples for one in likely)
    text = ""
    if limits.drop is not None and scope.tasks and fewest < least_examples(limits.drop / 100):
        unseen = 100 * (1 - 0.025 ** (1 / fewest))
        text = (
            f"{count(fewest, 'example')} without a loss cannot rule out a drop of {unseen:.0f} points: "
            f"it takes {least_examples(limits.drop / 100)}. "
        )
    needs = [one for one in likely if one.examples_needed]
    if needs:
        text += f"About as many examples more would tell: {_some([_with_need(one) for one in needs])}."
    return text


def _with_need(one: Candidate) -> str:
    if one.examples_needed is None:
        return f"{one.name} (n = {one.examples}; just at the limit, no number would tell)"
    return f"{one.name} (n = {one.examples}, {_rounded(one.examples_needed - one.examples)} more)"


def _rounded(number: int) -> int:
    """Two significant digits are all that such an estimate has, rounded up."""
    step: int = 10 ** max(len(str(number)) - 2, 0)
    return -(-number // step) * step


def _some(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
