"""The choice of structures: solve, build, measure the whole network, correct, solve again.

The times of layers do not quite add up to the time of the network, so the budget of the linear
program is corrected until the network as a whole holds it.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from groupconv.errors import BudgetError
from groupconv.optimize.budget import Budget
from groupconv.optimize.convert import Converted, convert
from groupconv.optimize.partition import Partition
from groupconv.optimize.plan import Plan
from groupconv.optimize.select import select
from groupconv.optimize.structure import Candidate, Menu, settle
from groupconv.optimize.trace import Trace
from groupconv.timing import Timing

log = logging.getLogger(__name__)

_SOLVES = 6


@dataclass(frozen=True)
class Choice:
    """A selection and the network that it makes, its weights cut but not yet refitted.

    Args:
        chosen: layer name to its candidate.
        times: layer name to measured seconds, dense and as chosen.
        converted: the network.
        plan: the same for people.
    """

    chosen: dict[str, Candidate]
    times: dict[str, tuple[float, float]]
    converted: Converted
    plan: Plan


def choose(
    model: nn.Module,
    mapped: Trace,
    menus: Mapping[str, Menu],
    times: Mapping[str, list[float]],
    budget: Budget,
    latency: Callable[[nn.Module, str], tuple[Timing, Timing]],
    *,
    target: str,
    seed: int,
    macs: int,
) -> Choice:
    """The structures that lose least within the budget.

    Args:
        model, mapped: the original network and its trace.
        menus, times: candidates of every layer, and their measured seconds.
        budget: bound on the whole network.
        latency: times the original and another network, the latter under a name for its plan, in
            one interleaved run.
        target, seed: for the plan.
        macs: of the original network, for one image.

    Raises:
        BudgetError: nothing on the menus meets the budget.
    """
    allowed, refused = _not_slower(menus, times)
    whole = {
        "latency": lambda: latency(model, "unchanged")[0].median,
        "macs": lambda: float(macs),
        "params": lambda: float(sum(p.numel() for p in model.parameters())),
    }[budget.quantity]()
    costs = {
        name: [
            _cost(budget, c, seconds) for c, seconds in zip(m.candidates, times[name], strict=True)
        ]
        for name, m in menus.items()
    }
    bound = budget.bound(whole)
    rest = whole - sum(cost[0] for cost in costs.values())
    cheapest = rest + sum(min(costs[name][i] for i in allowed[name]) for name in menus)
    if budget.quantity != "latency" and cheapest > bound:
        log.warning("budget=%r needs layers that measure slower than dense", budget.text)
        allowed = {name: list(range(len(menu.candidates))) for name, menu in menus.items()}
    correction = 1.0
    for solve in range(1, _SOLVES + 1):
        try:
            picked = select(
                {n: [menus[n].candidates[i].loss for i in allowed[n]] for n in menus},
                {n: [costs[n][i] for i in allowed[n]] for n in menus},
                bound * correction - rest,
            )
        except BudgetError as error:
            raise BudgetError(
                f"budget={budget.text!r}: {_amount(budget, bound)} can't be met; "
                f"the network needs {_amount(budget, whole)} now, of which "
                f"{_amount(budget, rest)} outside the layers that can change ({error})"
            ) from error
        chosen = {n: menus[n].candidates[allowed[n][i]] for n, i in picked.items()}
        taken = {n: (times[n][0], times[n][allowed[n][i]]) for n, i in picked.items()}
        partitions = settle(mapped, menus, chosen)
        reasons = {n: _why(chosen[n], taken[n], refused.get(n)) for n in chosen}
        plan = Plan(partitions, reasons, budget.text, target, seed)
        choice = Choice(chosen, taken, convert(model, mapped, partitions), plan)
        if budget.quantity != "latency" or not partitions:
            return choice
        before, after = latency(choice.converted.model, _fingerprint(partitions))
        # A relative budget is held against the original in the same run.
        allowance = budget.bound(before.median)
        log.info(
            "solve %d: %d layers grouped, predicted %.3f ms, measured %.3f ms of %.3f ms",
            solve,
            len(partitions),
            1e3 * (rest + sum(after for _, after in taken.values())),
            1e3 * after.median,
            1e3 * allowance,
        )
        if after.median <= allowance:
            return choice
        correction *= 0.98 * allowance / after.median
    raise BudgetError(
        f"budget={budget.text!r}: after {_SOLVES} corrections the network still takes "
        f"{1e3 * after.median:.3f} ms where {1e3 * allowance:.3f} ms are allowed"
    )


def _fingerprint(partitions: Mapping[str, Partition]) -> str:
    return hashlib.sha256(repr(partitions).encode()).hexdigest()[:16]


def _cost(budget: Budget, candidate: Candidate, seconds: float) -> float:
    """What a candidate takes of the budget, in the budget's unit."""
    if budget.quantity == "latency":
        return seconds
    if budget.quantity == "params":
        return math.prod(candidate.spec.weight_shape)
    return candidate.spec.macs / candidate.spec.batch


def _not_slower(
    menus: Mapping[str, Menu], times: Mapping[str, list[float]]
) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Indices of the candidates that measure faster than dense, and what was refused."""
    allowed, refused = {}, {}
    for name, layer in menus.items():
        dense = times[name][0]
        slower = [i for i in range(1, len(layer.candidates)) if times[name][i] >= dense]
        allowed[name] = [i for i in range(len(layer.candidates)) if i not in slower]
        if slower:
            refused[name] = "not faster than dense: " + ", ".join(
                f"groups={layer.candidates[i].spec.groups}"
                f"{' permuted' * layer.candidates[i].permuted} {1e3 * times[name][i]:.3f} ms"
                for i in slower
            )
    return allowed, refused


def _why(choice: Candidate, taken: tuple[float, float], refused: str | None) -> str:
    before, after = (1e3 * t for t in taken)
    if choice.spec.groups == 1:
        said = f"dense, {before:.3f} ms: within the budget its accuracy is worth more than its time"
    else:
        said = (
            f"groups={choice.spec.groups}{' permuted' * choice.permuted}: "
            f"{after:.3f} ms instead of {before:.3f} ms, predicted loss {choice.loss:.4f} "
            f"of the layer's variance, channels "
            + ("in given order" if choice.start == "identity" else f"found from {choice.start}")
        )
    if after > before:
        said += "; slower than dense, but the budget needs it"
    return said if refused is None else f"{said}; {refused}"


def _amount(budget: Budget, value: float) -> str:
    if budget.quantity == "latency":
        return f"{1e3 * value:.3f} ms"
    return f"{value / 1e6:.3f} M {budget.quantity}"
