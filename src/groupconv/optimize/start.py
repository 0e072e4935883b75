"""How a run begins and ends: arguments checked, images at hand, the folder claimed."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from groupconv import ranks
from groupconv.data import Images, load_images
from groupconv.errors import ArgumentError, DataError
from groupconv.files import output_folder
from groupconv.optimize.capture import evaluation_mode
from groupconv.optimize.evaluate import task_of
from groupconv.optimize.finish import Finish
from groupconv.optimize.job import Job
from groupconv.optimize.planning import FIRST, LAST
from groupconv.recovery import Recovery
from groupconv.recovery.lessons import judged, with_images
from groupconv.store import claimed, fingerprint
from groupconv.targets import get_target
from groupconv.task import check_task
from groupconv.version import __version__

KEEP = (FIRST, LAST)
_MOST_IMAGES = 1_000_000


@dataclass(frozen=True)
class Options:
    """Arguments that the verbs share."""

    target: str
    recover: str | Recovery
    batch_size: int
    min_accuracy: float | None
    baselines: bool
    task: str

    def __post_init__(self) -> None:
        get_target(self.target)
        check_task(self.task)
        if self.batch_size < 1:
            raise ArgumentError(f"batch_size={self.batch_size!r} must be a positive integer")
        if self.min_accuracy is not None and not 0 <= self.min_accuracy <= 1:
            raise ArgumentError(f"min_accuracy={self.min_accuracy!r} must be between 0 and 1")
        if self.baselines and ranks.count() > 1:
            raise ArgumentError("baselines=True must be measured by one process alone")


@dataclass(frozen=True)
class Source:
    """Where the images come from."""

    data: Any
    test: Any
    max_images: int
    image_size: int
    seed: int

    def load(self) -> tuple[Images, Images]:
        """Images to calibrate on and to report on."""
        if self.max_images < 1:
            raise ArgumentError(f"max_images={self.max_images!r} must be a positive integer")
        size, seed = self.image_size, self.seed
        images = load_images(self.data, limit=self.max_images, image_size=size, seed=seed)
        if self.test is None:
            held_out, images = images.shuffled(seed).split(max(1, len(images) // 5))
        else:
            held_out = load_images(self.test, limit=_MOST_IMAGES, image_size=size, seed=seed)
        if len(images) < 2:
            raise DataError(
                f"{images.source}: {len(images)} images are left to calibrate on; give more"
            )
        return images, held_out


@contextmanager
def started(
    model: nn.Module,
    source: Source,
    options: Options,
    out: str | Path | None,
    asked: Mapping[str, Any],
    restart: bool,
) -> Iterator[tuple[Job, Finish]]:
    """A job after its arguments were checked, and how it ends; the model evaluates meanwhile.

    Args:
        asked: what the verb was asked for beside the options.
    """
    folder = None if out is None else output_folder(out)
    _check_weights(model)
    images, held_out = source.load()
    recovery = with_images(options.recover, source.image_size, source.seed)
    images, recovery, aside = judged(images, recovery, source.seed)
    with ExitStack() as stack:
        if folder is not None:
            inputs = {
                "model": f"{type(model).__name__} {fingerprint(model.state_dict().items())}",
                "data": _described(images),
                "test": _described(held_out),
                **asked,
                **asdict(replace(options, recover=recovery.described())),
                "seed": source.seed,
                "groupconv": __version__,
                "torch": torch.__version__,
            }
            ranks.on_first(lambda: stack.enter_context(claimed(folder, inputs, restart=restart)))
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(torch.random.fork_rng())
        torch.manual_seed(source.seed)
        job = Job(
            model,
            images,
            get_target(options.target),
            seed=source.seed,
            batch_size=options.batch_size,
            folder=folder,
        )
        finish = Finish(
            job,
            held_out,
            recovery,
            aside,
            options.min_accuracy,
            options.baselines,
            task_of(job.model, held_out.images[:1], options.task),
        )
        yield job, finish


def end(job: Job) -> None:
    """Forget what was kept for going on, when all processes have done their part."""
    ranks.gathered(None)
    if ranks.first():
        job.store().clear()


def _described(images: Images) -> str:
    return f"{len(images)} images, {images.fingerprint()}"


def texts(given: str | Sequence[str]) -> list[str]:
    """One text or several, as several."""
    return [given] if isinstance(given, str) else list(given)


def check_round_to(round_to: int) -> None:
    if round_to < 1:
        raise ArgumentError(f"round_to={round_to!r} must be a positive integer")


def _check_weights(model: nn.Module) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if not any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules()):
        raise ArgumentError(f"model: {type(model).__name__} has no convolution")
    for name, tensor in tensors:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise DataError(f"model: {name} holds NaN or Inf")
