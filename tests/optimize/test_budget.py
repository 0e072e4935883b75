"""Every form of a budget, and what is refused."""

import re

import pytest

from groupconv.errors import ArgumentError
from groupconv.optimize.budget import parse_budget, parse_budgets


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
        ("50%size", "size", 100),
        ("5MB", "size", 5e6),
        ("1.5GB", "size", 1.5e9),
        ("20kB", "size", 2e4),
        ("700B", "size", 700),
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
        *(
            "5mmacs",
            "5MBs",
            "5mB",
            "50%B",
            "nan%",
            "infms",
            "50%macs 2x",
            "1,5x",
            "2x\n3x",
            "%",
            "ms",
        ),
    ],
)
def test_illegal_forms(text: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(f"budget={text.strip()!r} must have a form")):
        parse_budget(text.strip())


@pytest.mark.parametrize(
    "text", ["0.5x", "0.99x", "101%", "0%", "200%macs", "0%params", "101%size"]
)
def test_more_than_the_original_or_nothing(text: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(f"budget={text!r} must be at least 1x")):
        parse_budget(text)


def test_one_or_several() -> None:
    assert parse_budgets("2x") == (parse_budget("2x"),)
    texts = ["50%macs", "5MB", "2x", "1.2Mparams"]
    found = parse_budgets(texts)
    assert [budget.text for budget in found] == texts
    assert [budget.quantity for budget in found] == ["macs", "size", "latency", "params"]


@pytest.mark.parametrize("texts", [[], ["2x", "12ms"], ["50%macs", "5MB", "300Mmacs"]])
def test_several_are_about_different_quantities(texts: list[str]) -> None:
    message = re.escape(f"budget={texts!r} must be one budget, or one for each of several")
    with pytest.raises(ArgumentError, match=message):
        parse_budgets(texts)
    with pytest.raises(ArgumentError, match="budget='fast' must have a form"):
        parse_budgets([*texts, "fast"])


@pytest.mark.parametrize(
    ("text", "said"),
    [("2x", "1500.000 ms"), ("5MB", "0.000 MB"), ("7macs", "0.000 M macs"), ("7params", "0.000 M")],
)
def test_amounts_have_the_unit_of_their_quantity(text: str, said: str) -> None:
    assert parse_budget(text).amount_text(1.5).startswith(said)
    assert parse_budget("5MB").amount_text(2.5e6) == "2.500 MB"
