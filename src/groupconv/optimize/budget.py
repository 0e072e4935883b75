"""Budgets as people write them: "2x", "50%", "12ms", "50%macs", "1.2Mparams", "5MB"."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from groupconv.errors import ArgumentError

_UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
_FORMS = '"2x", "50%", "12ms", "50%macs", "300Mmacs", "50%params", "1.2Mparams", "50%size" or "5MB"'


@dataclass(frozen=True)
class Budget:
    """An upper bound on one quantity of the network.

    Args:
        quantity: "latency" (seconds), "macs", "params" or "size" (bytes of all parameters and
            buffers).
        text: as the user wrote it.
        fraction: of the original network's, or None.
        amount: in the quantity's unit, or None; exactly one of the two is given.
    """

    quantity: str
    text: str
    fraction: float | None = None
    amount: float | None = None

    def bound(self, original: float) -> float:
        """The bound, given what the original network has."""
        return original * self.fraction if self.fraction is not None else self.amount or 0.0

    def amount_text(self, value: float) -> str:
        """A value of the quantity, for people."""
        if self.quantity == "latency":
            return f"{1e3 * value:.3f} ms"
        if self.quantity == "size":
            return f"{value / 1e6:.3f} MB"
        return f"{value / 1e6:.3f} M {self.quantity}"


def parse_budgets(texts: str | Sequence[str]) -> tuple[Budget, ...]:
    """Read one budget or several, of which all must hold.

    Raises:
        ArgumentError: there is none, a text has none of the forms or asks for more than the
            original, or two are about the same quantity.
    """
    budgets = tuple(map(parse_budget, [texts] if isinstance(texts, str) else texts))
    quantities = [budget.quantity for budget in budgets]
    if not budgets or len(set(quantities)) < len(budgets):
        raise ArgumentError(
            f"budget={texts!r} must be one budget, or one for each of several quantities "
            "(latency, macs, params, size)"
        )
    return budgets


def parse_budget(text: str) -> Budget:
    """Read a budget.

    Raises:
        ArgumentError: the text has none of the forms, or asks for more than the original.
    """
    budget = _parse(text.strip())
    if budget is None:
        raise ArgumentError(f"budget={text!r} must have a form such as {_FORMS}")
    if budget.fraction is not None and not 0 < budget.fraction <= 1:
        raise ArgumentError(
            f"budget={text!r} must be at least 1x and at most 100% of the original network"
        )
    return budget


def _parse(text: str) -> Budget | None:
    number = r"(\d+(?:\.\d+)?)"
    if match := re.fullmatch(number + "x", text):
        times = float(match[1])
        return Budget("latency", text, fraction=1 / times) if times > 0 else None
    if match := re.fullmatch(number + "%(macs|params|size)?", text):
        return Budget(match[2] or "latency", text, fraction=float(match[1]) / 100)
    if match := re.fullmatch(number + "(us|ms|s)", text):
        scale = {"us": 1e-6, "ms": 1e-3, "s": 1.0}[match[2]]
        return Budget("latency", text, amount=float(match[1]) * scale)
    if match := re.fullmatch(number + "([kMG]?)(macs|params|B)", text):
        quantity = {"B": "size"}.get(match[3], match[3])
        return Budget(quantity, text, amount=float(match[1]) * _UNITS[match[2]])
    return None
