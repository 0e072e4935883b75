"""The choice of structures: solve, build, measure the whole network, correct, solve again.

What layers save alone is not quite what the network saves, so what the linear program takes for
their savings is scaled by what the last network really saved, until one holds the budget and does
not leave much of it.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from groupconv.errors import BudgetError
from groupconv.optimize.bracket import STRICTER, Bracket
from groupconv.optimize.budget import Budget
from groupconv.optimize.convert import convert
from groupconv.optimize.menu import Candidate
from groupconv.optimize.select import Bound, select
from groupconv.optimize.settle import sketch
from groupconv.optimize.structure import Layer, macs, weights
from groupconv.optimize.survey import Survey
from groupconv.optimize.trace import Trace, TracedConv
from groupconv.timing import Timing

log = logging.getLogger(__name__)

_SOLVES = 8
# A network that takes less than this share of what it may take could be more accurate.
_USED = 0.98
# What is aimed at after a miss is the middle between the two.
_AIM = (1 + _USED) / 2
# The error of the output that all the time of the layers is worth: it decides between structures
# that lose nearly the same.
_WORTH_OF_TIME = 1e-3


@dataclass(frozen=True)
class Decision:
    """What stands in place of one layer, and why.

    Args:
        candidate: of the layer's menu.
        seconds: measured, as it is and as chosen.
        error: predicted error of the network's output, see :class:`Sensitivity`.
        why: for people.
    """

    candidate: Candidate
    seconds: tuple[float, float]
    error: float
    why: str


@dataclass(frozen=True)
class Choice:
    """What stands in place of every layer.

    Args:
        decisions: layer name to what was decided, of unchanged layers too.
        latency: predicted, as a share of the original network's; None where the budget is not
            about time, or nothing is changed.
    """

    decisions: dict[str, Decision]
    latency: float | None = None


Latency = Callable[[nn.Module, str], tuple[Timing, Timing]]


def choose(
    model: nn.Module,
    mapped: Trace,
    survey: Survey,
    budgets: Sequence[Budget],
    latency: Latency,
    *,
    macs: int,
) -> Choice:
    """The structures that lose least within the budgets.

    Args:
        model, mapped: the original network and its trace.
        survey: what is known of its layers.
        budgets: bounds on the whole network, all to be held.
        latency: times the original and another network, the latter under a name for what was
            chosen, in one interleaved run.
        macs: of the original network, for one image.

    Raises:
        BudgetError: nothing on the menus meets the budgets.
    """
    whole = {
        "latency": lambda: latency(model, "unchanged")[0].median,
        "macs": lambda: float(macs),
        "params": lambda: float(sum(p.numel() for p in model.parameters())),
        "size": lambda: float(sum(t.numel() * t.element_size() for t in _tensors(model))),
    }
    needs = {budget.quantity: whole[budget.quantity]() for budget in budgets}
    costs = {budget.quantity: _costs(budget.quantity, model, mapped, survey) for budget in budgets}
    rest = {
        quantity: needs[quantity] - sum(cost[0] for cost in costs[quantity].values())
        for quantity in needs
    }
    most = {budget.quantity: budget.bound(needs[budget.quantity]) for budget in budgets}
    bounds = [
        Bound(quantity, costs[quantity], most[quantity] - rest[quantity]) for quantity in needs
    ]

    def measure(decisions: dict[str, Decision]) -> tuple[float, float]:
        chosen = {name: decision.candidate for name, decision in decisions.items()}
        name = " ".join(f"{n}:{c}" for n, c in chosen.items() if survey.changes(n, c))
        changed = convert(model, mapped, sketch(mapped, chosen)).model
        before, after = latency(changed, name or "unchanged")
        return before.median, after.median

    timed = next((budget for budget in budgets if budget.quantity == "latency"), None)
    program = _Program(survey, *_not_slower(survey), bounds)
    try:
        quickest = program.fastest()
    except BudgetError:
        log.warning("the budget needs layers that measure slower than they are")
        whole_menus = {name: list(range(len(menu))) for name, menu in survey.menus.items()}
        program = _Program(survey, whole_menus, {}, bounds)
        try:
            quickest = program.fastest()
        except BudgetError as error:
            raise BudgetError(_unmet(budgets, needs, rest, most, error)) from error
    if timed is None:
        return Choice(program.decide())
    return _in_time(program, quickest, measure, timed, needs["latency"])


@dataclass(frozen=True)
class _Program:
    """Structures of least loss within bounds.

    Args:
        survey: what is known of the layers.
        allowed: layer name to indices of its menu that may be chosen.
        refused: layer name to what was left out there and why, for people.
        bounds: of what the layers take, whole menus.
    """

    survey: Survey
    allowed: Mapping[str, Sequence[int]]
    refused: Mapping[str, str]
    bounds: Sequence[Bound]

    def decide(self, scale: float = 1.0) -> dict[str, Decision]:
        """What loses least if layers save so many times the time that they do alone."""
        losses = {
            name: [_loss(self.survey, name, index) for index in range(len(menu))]
            for name, menu in self.survey.menus.items()
        }
        return self._least(
            losses,
            [
                replace(bound, costs=_scaled(bound.costs, scale))
                if bound.quantity == "latency"
                else bound
                for bound in self.bounds
            ],
        )

    def fastest(self) -> dict[str, Decision]:
        """What takes least time, all other bounds held."""
        others = [bound for bound in self.bounds if bound.quantity != "latency"]
        return self._least(self.survey.times, others)

    def _least(
        self, losses: Mapping[str, Sequence[float]], bounds: Sequence[Bound]
    ) -> dict[str, Decision]:
        places = {
            (name, index): place
            for name, indices in self.allowed.items()
            for place, index in enumerate(indices)
        }
        ties = [
            [(name, places[name, index]) for name, index in tie]
            for tie in self.survey.ties
            if all(candidate in places for candidate in tie)
        ]
        picked = select(
            self._only_allowed(losses),
            [replace(bound, costs=self._only_allowed(bound.costs)) for bound in bounds],
            ties,
        )
        return {name: self._decision(name, self.allowed[name][i]) for name, i in picked.items()}

    def _only_allowed(self, numbers: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
        return {name: [numbers[name][i] for i in some] for name, some in self.allowed.items()}

    def _decision(self, name: str, index: int) -> Decision:
        times, candidate = self.survey.times[name], self.survey.menus[name][index]
        seconds, error = (times[0], times[index]), self.survey.error(name, index)
        changed = self.survey.changes(name, candidate)
        why = _why(candidate, changed, seconds, error, self.refused.get(name))
        return Decision(candidate, seconds, error, why)


def _in_time(
    program: _Program,
    quickest: dict[str, Decision],
    measure: Callable[[dict[str, Decision]], tuple[float, float]],
    budget: Budget,
    whole: float,
) -> Choice:
    """The choice whose network, as a whole, holds a budget of time.

    Args:
        program: gives the next choice.
        quickest: the choice where none holds the budget by what layers take alone: that is an
            estimate, and a network is measured before it is refused.
        measure: the seconds of the original network and of one so decided.
        budget: of time.
        whole: seconds of the original network.
    """

    def decide(scale: float) -> dict[str, Decision]:
        try:
            return program.decide(scale)
        except BudgetError:
            return quickest

    bracket = Bracket(decide, quickest)
    scale, best, longest, least = 1.0, None, 0.0, 1.0
    decisions = bracket.unseen(scale)
    while decisions is not None and len(bracket.seen) < _SOLVES:
        changed = [n for n, d in decisions.items() if program.survey.changes(n, d.candidate)]
        if not changed:
            return best or Choice(decisions)
        before, after = measure(decisions)
        # In shares of the original in the same run: machines are faster now and then.
        allowed, share, saved = budget.bound(before) / before, after / before, _saved(decisions)
        predicted = 1 - scale * saved / whole
        bracket.note(decisions, held=share <= allowed)
        log.info(
            "solve %d: %d layers changed, predicted %.1f%%, measured %.1f%% of %.3f ms, "
            "%.1f%% allowed",
            len(bracket.seen), len(changed), 100 * predicted, 100 * share, 1e3 * before,
            100 * allowed,
        )  # fmt: skip
        least = min(least, share)
        if longest < share <= allowed:
            best, longest = Choice(decisions, predicted), share
        if _USED * allowed <= share <= allowed:
            break
        scale = max((1 - share) * whole / saved, 1 - STRICTER)
        stricter = (1 - min(allowed, 1)) / (1 - _AIM * min(allowed, 1))
        decisions = bracket.unseen(scale * stricter)
    if best is None:
        raise BudgetError(
            f"budget={budget.text!r}: {1e3 * allowed * before:.3f} ms can't be met; the network "
            f"needs {1e3 * before:.3f} ms now, and {1e3 * least * before:.3f} ms as the fastest of "
            f"{len(bracket.seen)} that were measured"
        )
    return best


def _saved(decisions: Mapping[str, Decision]) -> float:
    """Seconds that layers save alone."""
    return sum(dense - taken for dense, taken in (d.seconds for d in decisions.values()))


def _scaled(costs: Mapping[str, Sequence[float]], scale: float) -> dict[str, list[float]]:
    """Times of candidates that save so many times what they do alone."""
    return {
        name: [dense - scale * (dense - time) for time in times]
        for name, times in costs.items()
        for dense in times[:1]
    }


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _costs(
    quantity: str, model: nn.Module, mapped: Trace, survey: Survey
) -> dict[str, list[float]]:
    """What every candidate takes of a quantity, in its unit."""
    if quantity == "latency":
        return {name: list(times) for name, times in survey.times.items()}
    convs = {conv.name: conv for conv in mapped.convs}
    result: dict[str, list[float]] = {}
    for name, menu in survey.menus.items():
        conv, layer = convs[name], model.get_submodule(name)
        assert isinstance(layer, Layer)
        if quantity == "macs":
            result[name] = [float(macs(c.structure, conv.spec)) for c in menu]
        else:
            each = layer.weight.element_size() if quantity == "size" else 1
            result[name] = [
                float(each * _numbers(c, conv, layer, survey.changes(name, c))) for c in menu
            ]
    return result


def _numbers(candidate: Candidate, conv: TracedConv, layer: Layer, changed: bool) -> int:
    """Weights and biases; what is cut needs a bias where no batch norm can take its mean."""
    biased = layer.bias is not None or (changed and conv.batch_norm is None)
    written = candidate.structure.specs(conv.spec)[-1].out_channels
    return weights(candidate.structure, conv.spec) + biased * written


def _loss(survey: Survey, name: str, index: int) -> float:
    everything = sum(times[0] for times in survey.times.values())
    share = survey.times[name][index] / everything
    return survey.error(name, index) + _WORTH_OF_TIME * share


def _not_slower(survey: Survey) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Indices of the candidates that measure faster than the layer, and what was refused.

    Of those that stand together the sum counts.
    """
    allowed, refused = {}, {}
    together: dict[tuple[str, int], float] = {}
    for tie in survey.ties:
        gained = sum(survey.times[name][0] - survey.times[name][i] for name, i in tie)
        together |= dict.fromkeys(tie, gained)
    for name, menu in survey.menus.items():
        times = survey.times[name]
        slower = [
            i for i in range(1, len(menu)) if together.get((name, i), times[0] - times[i]) <= 0
        ]
        allowed[name] = [i for i in range(len(menu)) if i not in slower]
        if slower:
            refused[name] = f"not faster than {menu[0]}: " + ", ".join(
                f"{menu[i]} {1e3 * times[i]:.3f} ms" for i in slower
            )
    return allowed, refused


def _why(
    choice: Candidate,
    changed: bool,
    seconds: tuple[float, float],
    error: float,
    refused: str | None,
) -> str:
    before, after = (1e3 * t for t in seconds)
    if not changed:
        said = (
            f"{choice}, {before:.3f} ms: within the budget its accuracy is worth more than its time"
        )
    else:
        said = (
            f"{choice}: {after:.3f} ms instead of {before:.3f} ms, predicted loss "
            f"{choice.loss:.4f} of the layer's variance, {error:.4f} of the output's"
        )
        if choice.start:
            said += ", channels " + (
                "in given order" if choice.start == "identity" else f"found from {choice.start}"
            )
    if after > before:
        said += "; slower than before, but the budget needs it"
    return said if refused is None else f"{said}; {refused}"


def _unmet(
    budgets: Sequence[Budget],
    needs: Mapping[str, float],
    rest: Mapping[str, float],
    most: Mapping[str, float],
    error: BudgetError,
) -> str:
    parts = [
        f"budget={b.text!r}: {b.amount_text(most[b.quantity])} can't be met; the network needs "
        f"{b.amount_text(needs[b.quantity])} now, of which {b.amount_text(rest[b.quantity])} "
        "outside the layers that can change"
        for b in budgets
    ]
    return f"{'; '.join(parts)} ({error})"
