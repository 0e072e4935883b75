"""The next choice to measure: between those that held a budget of time and those that did not."""

import math
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

# The same choice once more would measure the same: so often another is looked for, a little
# stricter or milder where nothing is known on that side.
STRICTER, _TRIES = 0.97, 24


class Bracket(Generic[T]):
    """What was measured so far, by how much layers were taken to save: the more, the milder the
    choice and the slower its network.

    Args:
        decide: gives the choice for layers that save so many times the time that they do alone.
        quickest: the choice where none holds the budget.
    """

    def __init__(self, decide: Callable[[float], T], quickest: T) -> None:
        self.decide, self.quickest = decide, quickest
        self.seen: list[tuple[T, bool]] = []
        self.scale, self.fits, self.misses = 1.0, 0.0, math.inf

    def note(self, choice: T, *, held: bool) -> None:
        """Whether the network of the last choice held the budget."""
        self.seen.append((choice, held))
        self._narrow(held)

    def unseen(self, scale: float) -> T | None:
        """A choice that was not measured yet, for layers that save so many times what they do
        alone; between what held and what did not if that says nothing new. None: there is none.
        """
        self.scale = scale if self.fits < scale < self.misses else self._between()
        for _ in range(_TRIES):
            choice = self.decide(self.scale)
            held = next((held for other, held in self.seen if other == choice), None)
            if held is None:
                return choice
            if choice == self.quickest and not held:
                return None
            self._narrow(held)
            self.scale = self._between()
        return None

    def _narrow(self, held: bool) -> None:
        if held:
            self.fits = max(self.fits, self.scale)
        else:
            self.misses = min(self.misses, self.scale)

    def _between(self) -> float:
        if self.fits == 0:
            return self.misses * STRICTER
        if math.isinf(self.misses):
            return self.fits / STRICTER
        return math.sqrt(self.fits * self.misses)
