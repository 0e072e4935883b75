"""A long run watched: progress on the screen, events in a file, scalars for TensorBoard."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from groupconv import events, ranks
from groupconv.cli.console import people
from groupconv.errors import ArgumentError
from groupconv.files import output_folder

EVENTS, TENSORBOARD = "events.jsonl", "tensorboard"

Quiet = Annotated[bool, typer.Option("--quiet", help="Print the result and what goes wrong only.")]
TensorBoard = Annotated[
    bool,
    typer.Option("--tensorboard", help="Write scalars of learning to a folder of the result."),
]


@contextmanager
def watching(out: Path | None, quiet: bool = False, tensorboard: bool = False) -> Iterator[None]:
    """Show and record what the library tells in the block.

    Args:
        out: folder of the result, where ``events.jsonl`` is written; None: it isn't.
        quiet: show warnings only.
        tensorboard: whether scalars go to ``tensorboard/`` there.

    Raises:
        ArgumentError: TensorBoard is not installed.
        DataError: the folder can't be written.
    """
    logger = logging.getLogger("groupconv")
    logger.handlers = [
        RichHandler(console=people, show_level=False, show_path=False, highlighter=None)
    ]
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    if not ranks.first():
        logger.setLevel(logging.ERROR)
        yield
        return
    with ExitStack() as stack:
        if not quiet and people.is_terminal:
            bars = _Bars()
            stack.enter_context(bars.progress)
            stack.enter_context(events.listening(bars))
        if out is not None:
            output_folder(out)
            stack.enter_context(events.listening(_journal(out / EVENTS)))
            if tensorboard:
                stack.enter_context(_scalars(out / TENSORBOARD))
        try:
            yield
        except KeyboardInterrupt:
            if out is not None:
                people.print("stopped: the same command goes on from here")
            raise


class _Bars:
    """A bar for each step that is under way, with the time left."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=people,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, kind: str, values: dict[str, Any]) -> None:
        if kind != "progress":
            return
        step, done, total = values["step"], values["done"], values["total"]
        if step not in self._tasks:
            self._tasks[step] = self.progress.add_task(step, total=total, completed=done)
        self.progress.update(self._tasks[step], completed=done, total=total)
        if done == total:
            self.progress.remove_task(self._tasks.pop(step))


def _journal(path: Path) -> events.Listener:
    """Appends each event as a line of JSON; of progress only the beginning and the end."""

    def listen(kind: str, values: dict[str, Any]) -> None:
        if kind == "progress" and values["done"] not in (0, values["total"]):
            return
        now = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": now, "event": kind, **values}) + "\n")

    return listen


@contextmanager
def _scalars(folder: Path) -> Iterator[None]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ArgumentError(
            "tensorboard=True: TensorBoard is not installed: pip install 'groupconv[train]'"
        ) from error

    with SummaryWriter(str(folder)) as writer:

        def listen(kind: str, values: dict[str, Any]) -> None:
            if kind == "scalars":
                for name in values.keys() - {"step", "at"}:
                    writer.add_scalar(f"{values['step']}/{name}", values[name], values["at"])

        with events.listening(listen):
            yield
