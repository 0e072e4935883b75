"""Several processes on one job: who does what, and that all know of it.

Without ``torch.distributed`` there is one process, the first of one.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from groupconv.errors import ArgumentError, GroupConvError

T = TypeVar("T")

_TIMEOUT = "GROUPCONV_TIMEOUT"
_MINUTES = 30.0


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _many() else 1


def rank() -> int:
    """The number of this one."""
    return dist.get_rank() if _many() else 0


def first() -> bool:
    """Whether this is the process that measures, prints and writes."""
    return rank() == 0


def on_first(work: Callable[[], T]) -> T:
    """What the first process makes of some work, in all of them; an error of its is theirs, too.

    Args:
        work: done by the first process while the others wait; its result can be pickled.

    Raises:
        GroupConvError: that of the first process, or another process has ended.
    """
    if count() == 1:
        return work()
    result: Any = None
    error: BaseException | None = None
    if first():
        try:
            result = work()
        except Exception as raised:
            error = raised
    said = [(result, error)]
    _together(lambda: dist.broadcast_object_list(said, src=0))
    result, error = said[0]
    if error is not None:
        raise error
    return result


def gathered(value: T) -> list[T]:
    """The values of all processes, in their order."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    _together(lambda: dist.all_gather_object(values, value))
    return values


def join() -> None:
    """Join the processes that ``torchrun`` or ``accelerate launch`` has started with this one.

    Raises:
        ArgumentError: ``GROUPCONV_TIMEOUT``, minutes after which a process that does not answer is
            given up, is no number.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _many():
        return
    text = os.environ.get(_TIMEOUT, str(_MINUTES))
    try:
        timeout = timedelta(minutes=float(text))
    except ValueError:
        raise ArgumentError(f"{_TIMEOUT}={text!r} must be a number of minutes") from None
    # Its functions take the group of all processes as a default, so importing it after the group is
    # made (torch.export does) keeps the group's threads beyond `leave`, to abort with Python's end.
    import torch.distributed.nn  # noqa: F401

    # Here, because accelerate takes seconds to import.
    from accelerate import PartialState

    PartialState(timeout=timeout)


def leave() -> None:
    """Leave the other processes."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _many() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _together(step: Callable[[], object]) -> None:
    try:
        step()
    except RuntimeError as error:
        raise GroupConvError(
            f"process {rank()} of {count()}: another process has ended or does not answer: {error}"
        ) from error
