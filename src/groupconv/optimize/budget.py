"""Budgets as people write them: "2x", "50%", "12ms", "50%macs", "300Mmacs", "1.2Mparams"."""

import re
from dataclasses import dataclass

from groupconv.errors import ArgumentError

_UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
_FORMS = '"2x", "50%", "12ms", "50%macs", "300Mmacs", "50%params" or "1.2Mparams"'


@dataclass(frozen=True)
class Budget:
    """An upper bound on one quantity of the network.

    Args:
        quantity: "latency" (seconds), "macs" or "params".
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
    if match := re.fullmatch(number + "%(macs|params)?", text):
        return Budget(match[2] or "latency", text, fraction=float(match[1]) / 100)
    if match := re.fullmatch(number + "(us|ms|s)", text):
        scale = {"us": 1e-6, "ms": 1e-3, "s": 1.0}[match[2]]
        return Budget("latency", text, amount=float(match[1]) * scale)
    if match := re.fullmatch(number + "([kMG]?)(macs|params)", text):
        return Budget(match[3], text, amount=float(match[1]) * _UNITS[match[2]])
    return None
