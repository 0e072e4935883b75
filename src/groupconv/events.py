"""What a long run tells whoever watches it: how far each step is, and numbers on the way.

Kinds of events and their values: "progress", with step, done and total; "scalars", with step, at
(the number of the training step) and numbers by name.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Listener = Callable[[str, dict[str, Any]], None]

T = TypeVar("T")

_listeners: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """A listener hears the kind and the values of every event in the block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def tell(kind: str, **values: Any) -> None:
    """Let all who listen know."""
    for listener in _listeners:
        listener(kind, values)


def followed(step: str, items: Iterable[T], total: int) -> Iterator[T]:
    """The items, with a word of progress when each is done."""
    tell("progress", step=step, done=0, total=total)
    for done, item in enumerate(items, 1):
        yield item
        tell("progress", step=step, done=done, total=total)
