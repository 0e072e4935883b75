"""Steps on images become code of every machine, without a call of a library."""

import re

import pytest

from groupconv.compiler.graph import Pad, Pool, Upsample
from groupconv.compiler.steps.adaptive import AdaptivePoolStep
from groupconv.compiler.steps.copy import CopyStep
from groupconv.compiler.steps.gather import GatherStep
from groupconv.compiler.steps.pad import PadStep
from groupconv.compiler.steps.pool import PoolStep
from groupconv.compiler.steps.relayout import RelayoutStep
from groupconv.compiler.steps.shuffle import ShuffleStep
from groupconv.compiler.steps.step import Step
from groupconv.compiler.steps.upsample import UpsampleStep
from groupconv.kernels import jit
from groupconv.kernels.machine import NAMES, machine

_ONE = ((1, 1), (1, 1))
STEPS = [
    PoolStep(Pool("max", (3, 3), (2, 2), _ONE), 67, (9, 9), (67, 67)),
    PoolStep(Pool("average", (3, 3), (1, 1), _ONE), 67, (9, 9), (67, 67)),
    AdaptivePoolStep("average", 500, (7, 7), (1, 1), (500, 500)),
    AdaptivePoolStep("max", 21, (7, 7), (3, 3), (21, 21)),
    UpsampleStep(Upsample("nearest"), 21, (5, 5), (7, 8), (21, 21)),
    UpsampleStep(Upsample("bilinear"), 21, (5, 5), (7, 8), (21, 21)),
    PadStep(Pad(_ONE), 21, (5, 5), (21, 21)),
    CopyStep(35, 58, (58, 116)),
    GatherStep(35, 58, (58, 116)),
    ShuffleStep(35, 60, 3, 20, (60, 60)),
    RelayoutStep(35, 21, 21, True),
    RelayoutStep(35, 21, 21, False),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("step", STEPS, ids=lambda step: type(step).__name__)
def test_no_step_calls_a_library(step: Step, name: str) -> None:
    target = machine(name)
    text = jit.assembly(step.write(target, "step"), target)
    assert len(text.splitlines()) < 600
    assert not re.search(r"^\s+(callq?|bl|blr)\s", text, re.MULTILINE)
