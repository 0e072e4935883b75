"""Fixtures that several of the optimizer's tests share."""

import sys
from collections.abc import Callable, Mapping, Sequence

import pytest

from groupconv.optimize.latency import Timed
from groupconv.optimize.structure import macs
from groupconv.optimize.trace import TracedConv
from groupconv.timing import Timing, interleave


@pytest.fixture
def steady_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer times in proportion to MACs, so that no test depends on how busy the machine is.

    The whole network is timed, but only as long as a report needs.
    """

    def layer_times(
        layers: Mapping[str, tuple[TracedConv, Sequence[Timed]]], *_: object
    ) -> dict[str, list[float]]:
        return {
            name: [
                1e-9 * macs(structure, conv.spec) + 1e-7 * sum(permuted)
                for structure, *permuted in structures
            ]
            for name, (conv, structures) in layers.items()
        }

    def briefly(calls: Mapping[str, Callable[[], object]], **_: object) -> dict[str, Timing]:
        return interleave(calls, seconds=0.01)

    monkeypatch.setattr(sys.modules["groupconv.optimize.job"], "interleave", briefly)
    for module in ("planning", "finish"):
        monkeypatch.setattr(sys.modules[f"groupconv.optimize.{module}"], "layer_times", layer_times)
