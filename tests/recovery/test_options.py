"""What can be asked for, and what can't."""

import re

import pytest
import torch

from groupconv.data import Images
from groupconv.errors import ArgumentError
from groupconv.recovery import Recovery
from groupconv.recovery.options import parse_time


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("none", None), ("bn", 0), ("90s", 90), ("10min", 600), ("1.5h", 5400), ("0.5s", 0.5)],
)
def test_times(text: str, seconds: float | None) -> None:
    assert parse_time(text) == seconds
    assert Recovery(text).seconds == seconds


@pytest.mark.parametrize("text", ["", "10", "min", "-1s", "10 min", "10m", "BN", "1e3s", "all"])
def test_illegal_times(text: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(f'recover={text!r} must be "none", "bn"')):
        Recovery(text)


@pytest.mark.parametrize("rate", [0.0, -1e-3, 1.0, float("nan")])
def test_illegal_learning_rates(rate: float) -> None:
    with pytest.raises(ArgumentError, match=f"learning_rate={rate!r} must be between 0 and 1"):
        Recovery("1s", learning_rate=rate)


def test_what_is_kept_depends_on_all_options() -> None:
    """Two recoveries that can give different weights are described differently."""
    x = torch.zeros(2, 3, 4, 4)
    some = [
        Recovery("1s"),
        Recovery("2s"),
        Recovery("1s", augment=False),
        Recovery("1s", learning_rate=1e-2),
        Recovery("1s", loss=lambda a, b, c: a.sum()),
        Recovery("1s", train=Images(x, None, "a")),
        Recovery("1s", train=Images(x + 1, None, "a")),
        Recovery("1s", train=Images(x, torch.zeros(2), "a")),
    ]
    assert len({recovery.described() for recovery in some}) == len(some)
