"""Measured times, kept in a file so that nothing is measured twice on one machine."""

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from groupconv.busy import measured_anyway
from groupconv.files import write_text
from groupconv.targets.base import Target
from groupconv.timing import Timing, interleave, machine

log = logging.getLogger(__name__)

# A median that is so many times the first quartile tells of other programs on the same cores: a
# thread that waits for one that does not run takes a hundred times as long. Such a run is repeated,
# and of so many the quietest counts.
_DISTURBED, _RUNS = 1.5, 4
# Seconds that the clock itself may be wrong by.
_CLOCK = 2e-6


class LatencyTable:
    """Times on one target by name of what was timed.

    Args:
        target: where they are measured.
        path: JSON file to read and to keep; None keeps nothing. It holds the times of other
            machines, thread counts and versions too, which are not used.

    Attributes:
        times: those of this machine and target.
        reused: names whose time comes from the file.
    """

    def __init__(self, target: Target, path: Path | None = None) -> None:
        self.target, self.path = target, path
        self.where = machine() | {"target": target.name, "version": target.version}
        self.times: dict[str, Timing] = {}
        self._elsewhere: list[dict[str, Any]] = []
        if path is not None and path.exists():
            self._read(path)
        self.reused = set(self.times)

    def _read(self, path: Path) -> None:
        try:
            tables = json.loads(path.read_text())["tables"]
            for table in tables:
                times = {key: Timing(**values) for key, values in table["times"].items()}
                if table["where"] == self.where:
                    self.times = times
                else:
                    self._elsewhere.append({"where": dict(table["where"]), "times": table["times"]})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("%s is not a table of times (%s): measuring again", path, error)
            self.times, self._elsewhere = {}, []

    def measure(
        self,
        build: Mapping[str, Callable[[], Callable[[], object]]],
        *,
        seconds: float,
        turn: float = 0.0,
        between: Callable[[], object] | None = None,
    ) -> dict[str, Timing]:
        """Times of every key; those not known yet are measured in one interleaved run.

        Args:
            build: key to a function that makes the callable to time.
            seconds: for each key that must be measured.
            turn, between: see :func:`groupconv.timing.interleave`.
        """
        missing = [key for key in build if key not in self.times]
        if missing:
            # The whole set again, so that those compared were timed in the same run.
            calls = {key: make() for key, make in build.items()}
            self.reused -= calls.keys()
            self.times |= self._quiet(calls, seconds * len(calls), turn, between)
            self.save()
        return {key: self.times[key] for key in build}

    def _quiet(
        self,
        calls: Mapping[str, Callable[[], object]],
        seconds: float,
        turn: float,
        between: Callable[[], object] | None,
    ) -> dict[str, Timing]:
        """The times of one run; of the quietest of several if other programs disturb it, unless it
        is known that they will."""
        best, least = dict[str, Timing](), math.inf
        for _ in range(1 if measured_anyway() else _RUNS):
            times = interleave(
                calls, seconds=seconds, rest=self.target.rest, turn=turn, between=between
            )
            spread = max(timing.median / (timing.q1 + _CLOCK) for timing in times.values())
            if spread < least:
                best, least = times, spread
            if least <= _DISTURBED:
                return best
        log.warning("other programs use the processor: times differ %.1f-fold in one run", least)
        return best

    def save(self) -> None:
        if self.path is not None:
            times = {key: asdict(timing) for key, timing in sorted(self.times.items())}
            tables = [{"where": self.where, "times": times}, *self._elsewhere]
            write_text(self.path, json.dumps({"tables": tables}, indent=1))
