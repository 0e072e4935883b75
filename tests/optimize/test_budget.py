"""Every form of a budget, and what is refused."""

import re

import pytest

from groupconv.errors import ArgumentError
from groupconv.optimize.budget import parse_budget


@pytest.mark.parametrize(
    ("text", "quantity", "bound"),
    [
        ("1x", "latency", 200),
        ("2x", "latency", 100),
        ("2.5x", "latency", 80),
        ("50%", "latency", 100),
        ("100%", "latency", 200),
        ("12.5%", "latency", 25),
        ("12ms", "latency", 0.012),
        ("1.5s", "latency", 1.5),
        ("250us", "latency", 0.00025),
        ("50%macs", "macs", 100),
        ("300Mmacs", "macs", 3e8),
        ("1.5Gmacs", "macs", 1.5e9),
        ("20kmacs", "macs", 2e4),
        ("7macs", "macs", 7),
        ("25%params", "params", 50),
        ("1.2Mparams", "params", 1.2e6),
    ],
)
def test_forms(text: str, quantity: str, bound: float) -> None:
    budget = parse_budget(f" {text}\n")
    assert (budget.quantity, budget.text) == (quantity, text)
    # Of an original that has 200 of whatever is bounded.
    assert budget.bound(200) == pytest.approx(bound)
    assert (budget.fraction is None) != (budget.amount is None)


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "2", "fast", "-2x", "2 x", "2X", "0x", "1e3ms", ".5%", "50%flops", "12m"),
        *("5mmacs", "nan%", "infms", "50%macs 2x", "1,5x", "2x\n3x", "%", "ms"),
    ],
)
def test_illegal_forms(text: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(f"budget={text.strip()!r} must have a form")):
        parse_budget(text.strip())


@pytest.mark.parametrize("text", ["0.5x", "0.99x", "101%", "0%", "200%macs", "0%params"])
def test_more_than_the_original_or_nothing(text: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(f"budget={text!r} must be at least 1x")):
        parse_budget(text)
