"""Which threads do a step, and where all of them wait for each other.

A thread that is done with its part of a step goes on to the next one at once, unless that reads or
writes what another thread may still be at.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from groupconv.compiler.graph import Value
from groupconv.compiler.library import WORTH_SHARING
from groupconv.compiler.memory import Place
from groupconv.compiler.task import Task


@dataclass
class Turn:
    """How threads do one task.

    Args:
        threads: that share it, the first ones.
        meet: whether all threads wait for each other after it.
    """

    threads: int
    meet: bool = False


def schedule(tasks: Sequence[Task], places: Mapping[Value, Place], threads: int) -> list[Turn]:
    """The turns of tasks that are done in order by so many threads."""
    turns = [Turn(threads if task.seconds >= WORTH_SHARING else 1) for task in tasks]
    # Tasks since all threads met.
    open_: list[int] = []
    for i, task in enumerate(tasks):
        # What one thread does, it does in order.
        others = [j for j in open_ if max(turns[i].threads, turns[j].threads) > 1]
        if any(_touch(task, tasks[j], places) for j in others):
            turns[i - 1].meet = True
            open_ = []
        open_.append(i)
    return turns


def _touch(task: Task, other: Task, places: Mapping[Value, Place]) -> bool:
    """Whether one of them writes what the other one reads or writes."""
    if task.output is other.output:
        # They are parts of one node, which none of the others reads.
        return False
    pairs = [(task.output, value) for value in (*other.inputs, other.output)]
    pairs += [(other.output, value) for value in task.inputs]
    return any(_overlap(a, places[a], b, places[b]) for a, b in pairs)


def _overlap(a: Value, at: Place, b: Value, there: Place) -> bool:
    """Whether two values may share memory."""
    one, two = at.storage, there.storage
    if one is not two:
        arena = one.kind == two.kind == "arena"
        return arena and one.offset < two.offset + two.size and two.offset < one.offset + one.size
    # Side by side in the pixels of a wider value.
    ends = at.channel + a.channels, there.channel + b.channels
    apart = ends[0] <= there.channel or ends[1] <= at.channel
    return not (apart and at.pixel == there.pixel and max(ends) <= at.pixel)
