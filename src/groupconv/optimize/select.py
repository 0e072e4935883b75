"""One structure per layer under a budget, as a mixed-integer linear program."""

from collections.abc import Mapping, Sequence

import numpy as np

from groupconv.errors import BudgetError


def select(
    losses: Mapping[str, Sequence[float]], costs: Mapping[str, Sequence[float]], bound: float
) -> dict[str, int]:
    """Choose one candidate per layer: least summed loss, summed cost at most ``bound``.

    Args:
        losses, costs: layer name to one number per candidate.
        bound: in the unit of the costs.

    Returns:
        layer name to the index of its candidate.

    Raises:
        BudgetError: even the cheapest candidates cost more.
    """
    # Here, because scipy's own BLAS starts its threads when it is imported.
    from scipy.optimize import Bounds, LinearConstraint, milp

    cheapest = sum(min(cost) for cost in costs.values())
    if cheapest > bound:
        raise BudgetError(
            f"the budget leaves {bound:.4g} for the layers that can change, "
            f"and their cheapest structures need {cheapest:.4g}"
        )
    if not losses:
        return {}
    loss = np.concatenate([np.asarray(losses[name]) for name in losses])
    cost = np.concatenate([np.asarray(costs[name]) for name in losses])
    owner = np.repeat(np.arange(len(losses)), [len(v) for v in losses.values()])
    one_each = (owner[None, :] == np.arange(len(losses))[:, None]).astype(float)
    scale = bound or 1.0
    result = milp(
        loss,
        constraints=[
            # In shares of the bound: seconds and MACs differ by fifteen orders of magnitude.
            LinearConstraint(cost[None, :] / scale, ub=bound / scale),
            LinearConstraint(one_each, lb=1.0, ub=1.0),
        ],
        integrality=np.ones_like(loss),
        bounds=Bounds(0, 1),
    )
    if result.x is None:
        raise BudgetError(f"no choice of structures found: {result.message}")
    picked = np.flatnonzero(result.x > 0.5)
    return {
        name: int(index - np.flatnonzero(owner == i)[0])
        for i, (name, index) in enumerate(zip(losses, picked, strict=True))
    }
