"""One structure per layer within one or several bounds, as a mixed-integer linear program."""

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from groupconv.errors import BudgetError

# Two solves at once would each put back what the other had set aside.
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Bound:
    """What the layers together may cost of one quantity.

    Args:
        quantity: its name, for messages.
        costs: layer name to one number per candidate.
        most: their sum is at most this, in the same unit.
    """

    quantity: str
    costs: Mapping[str, Sequence[float]]
    most: float


def select(
    losses: Mapping[str, Sequence[float]],
    bounds: Sequence[Bound],
    ties: Iterable[Sequence[tuple[str, int]]] = (),
) -> dict[str, int]:
    """Choose one candidate per layer: least summed loss, all bounds held.

    Args:
        losses: layer name to one number per candidate.
        bounds: of the costs.
        ties: candidates, as names and indices, that are chosen together or not at all.

    Returns:
        layer name to the index of its candidate.

    Raises:
        BudgetError: no choice holds all bounds.
    """
    # Here, because scipy's own BLAS starts its threads when it is imported.
    from scipy.optimize import Bounds, LinearConstraint, milp

    for bound in bounds:
        cheapest = sum(min(cost) for cost in bound.costs.values())
        if cheapest > bound.most:
            raise BudgetError(
                f"the budget leaves {bound.most:.4g} for the {bound.quantity} of the layers that "
                f"can change, and their cheapest structures need {cheapest:.4g}"
            )
    if not losses:
        return {}
    loss = np.concatenate([np.asarray(losses[name]) for name in losses])
    owner = np.repeat(np.arange(len(losses)), [len(v) for v in losses.values()])
    one_each = (owner[None, :] == np.arange(len(losses))[:, None]).astype(float)
    constraints = [LinearConstraint(one_each, lb=1.0, ub=1.0)]
    for bound in bounds:
        cost = np.concatenate([np.asarray(bound.costs[name]) for name in losses])
        # In shares of the bound: seconds and MACs differ by fifteen orders of magnitude.
        scale = bound.most or 1.0
        constraints.append(LinearConstraint(cost[None, :] / scale, ub=bound.most / scale))
    first = dict(zip(losses, np.searchsorted(owner, np.arange(len(losses))), strict=True))
    for (name, index), *others in ties:
        for other, place in others:
            together = np.zeros((1, len(loss)))
            together[0, first[name] + index], together[0, first[other] + place] = 1.0, -1.0
            constraints.append(LinearConstraint(together, lb=0.0, ub=0.0))
    with _stdout_set_aside():
        result = milp(
            loss, constraints=constraints, integrality=np.ones_like(loss), bounds=Bounds(0, 1)
        )
    if result.x is None:
        raise BudgetError(f"no choice of structures holds every bound: {result.message}")
    picked = np.flatnonzero(result.x > 0.5)
    return {name: int(index - first[name]) for name, index in zip(losses, picked, strict=True)}


@contextmanager
def _stdout_set_aside() -> Iterator[None]:
    """Send what native code prints to standard error.

    HiGHS, as of scipy 1.17, prints a line and flushes it whenever it repairs a solution
    that rounding made infeasible; no option of ``milp`` turns that off.
    """
    with _one_at_a_time:
        stdout = os.dup(1)
        try:
            os.dup2(2, 1)
            yield
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
