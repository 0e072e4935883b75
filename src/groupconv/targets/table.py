"""Measured layer times, kept in a file so that nothing is measured twice on one machine."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from groupconv.files import write_text
from groupconv.timing import Timing, interleave, machine

log = logging.getLogger(__name__)


class LatencyTable:
    """Times by name of what was timed.

    Args:
        path: JSON file to read and to keep; None keeps nothing. Times of another machine, thread
            count or version of torch are not used.

    Attributes:
        reused: names whose time comes from the file.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.machine = machine()
        self.times: dict[str, Timing] = {}
        self.reused: set[str] = set()
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            stored = json.loads(path.read_text())
            times = {key: Timing(**values) for key, values in stored["times"].items()}
            where = stored["machine"]
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("%s is not a table of times (%s): measuring again", path, error)
            return
        if where == self.machine:
            self.times = times
            self.reused = set(times)
        else:
            log.warning("%s was measured on another machine or version: measuring again", path)

    def measure(
        self, build: Mapping[str, Callable[[], Callable[[], object]]], *, seconds: float
    ) -> dict[str, Timing]:
        """Times of every key; those not known yet are measured in one interleaved run.

        Args:
            build: key to a function that makes the callable to time.
            seconds: for each key that must be measured.
        """
        missing = [key for key in build if key not in self.times]
        if missing:
            # The whole set again, so that those compared were timed in the same run.
            calls = {key: make() for key, make in build.items()}
            self.reused -= calls.keys()
            self.times |= interleave(calls, seconds=seconds * len(calls))
            self.save()
        return {key: self.times[key] for key in build}

    def save(self) -> None:
        if self.path is not None:
            times = {key: asdict(timing) for key, timing in sorted(self.times.items())}
            text = json.dumps({"machine": self.machine, "times": times}, indent=1)
            write_text(self.path, text)
