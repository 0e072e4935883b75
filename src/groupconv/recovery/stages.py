"""Accuracy back after conversion, in stages: batch norm, blocks apart, the whole network.

None needs labels: the original network is the teacher. Each stage is scored on images held out, and
what makes the score worse is not kept.
"""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from groupconv import ranks
from groupconv.data import Images
from groupconv.errors import ArgumentError
from groupconv.memory_format import fastest_format
from groupconv.recovery.augment import augment
from groupconv.recovery.engine import Lesson, learn, parts
from groupconv.recovery.features import Feature, Taps
from groupconv.recovery.loss import comparable, distance, is_classes
from groupconv.recovery.options import Recovery
from groupconv.store import Store

log = logging.getLogger(__name__)

# Share of the time in which blocks learn apart.
_APART = 0.1
# Weight of the features beside the outputs.
_FEATURES = 0.1
# A classifier's outputs are learned from if there are so many images for each of its classes: of
# fewer, a student learns which classes they are of, and takes other images for those too.
_PER_CLASS = 10
# Labels are learned from if the teacher knows so many times more of them than it would by chance.
_KNOWS = 2.0
_SCORED = 128
# A student of less loss learns better with batch norm's statistics frozen. One that has lost more
# has a longer way, on which they change. VGG on CIFAR-10, two minutes: from 0.14 and 0.17 on, 0.5
# points more with them frozen, from 2.2 and 3.4 on 1.1 points less.
_LITTLE = 0.5
# Batches that statistics are taken from.
_STATISTICS = 32


@dataclass(frozen=True)
class School:
    """Where a student is taught.

    Args:
        teacher: the original network, in evaluation mode.
        features: to compare, see :class:`Feature`.
        loader: batches to learn from.
        held_out: images to score on, on the networks' device.
        options: of the recovery.
        classes: of a classifier, or 0.
        few: whether there are too few images to learn a classifier's outputs from: features are.
        labelled: whether the loader's labels are learned from; a loss of the user's has them.
        seed: of all that is random.
        store: keeps how far each stage has come.
    """

    teacher: nn.Module
    features: Sequence[Feature]
    loader: DataLoader[Any]
    held_out: Images
    options: Recovery
    classes: int
    few: bool
    labelled: bool
    seed: int
    store: Store

    @classmethod
    def of(
        cls,
        teacher: nn.Module,
        features: Sequence[Feature],
        images: Images,
        held_out: Images,
        options: Recovery,
        *,
        batch: int,
        seed: int,
        store: Store,
    ) -> "School":
        """With given images, or those of the options.

        Args:
            teacher, features, held_out, options, seed, store: see the class.
            images: to learn from where the options have none.
            batch: images of one.

        Raises:
            ArgumentError: a loader without a length.
        """
        loader = options.train if isinstance(options.train, DataLoader) else None
        if loader is None:
            others = images if options.train is None else options.train
            assert isinstance(others, Images)
            tensors = [t for t in (others.images, others.labels) if t is not None]
            # A last batch of a single image would break batch norm.
            loader = DataLoader(
                TensorDataset(*tensors), batch, shuffle=True, drop_last=len(others) > batch
            )
        try:
            len(loader)
        except TypeError as error:
            raise ArgumentError(
                "train=DataLoader of an IterableDataset must have a length: how many batches "
                "are an epoch?"
            ) from error
        with torch.inference_mode():
            sample = held_out.images[:2].to(next(teacher.parameters()).device)
            output = teacher(sample)
        classes = int(output.shape[1]) if is_classes(output) else 0
        count = len(loader) * (loader.batch_size or 1)
        few = bool(features) and options.loss is None and count < _PER_CLASS * classes
        if few:
            log.info("%d images for %d classes: features are compared, not classes", count, classes)
        labelled = options.loss is not None or bool(
            classes and not few and ranks.on_first(lambda: _knows(teacher, loader, classes))
        )
        return cls(
            teacher, features, loader, held_out, options, classes, few, labelled, seed, store
        )

    def teach(self, student: nn.Module) -> list[dict[str, Any]]:
        """All stages that the options ask for, in place.

        Args:
            student: in evaluation mode, and left in it.

        Returns:
            of each stage its name, how it went and the seconds it took.
        """
        seconds = self.options.seconds
        if seconds is None:
            return []
        stages = []
        frozen = False
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in student.modules()):
            stages.append(self._reestimate(student))
            # Statistics that make it worse would be noise in every step, too.
            frozen = not stages[0]["kept"] and stages[0]["before"] < _LITTLE
        if not seconds:
            return stages
        apart = _APART if self.features else 0.0
        if apart:
            stages.append(
                self._learn("blocks", student, apart * seconds, apart=True, frozen=frozen)
            )
        stages.append(
            self._learn("distil", student, (1 - apart) * seconds, apart=False, frozen=frozen)
        )
        return stages

    def score(self, net: nn.Module) -> float:
        """The loss of a network on the images held out."""
        device = next(net.parameters()).device
        self.teacher.to(device)
        taps = self._taps(net, apart=False)
        total = 0.0
        labels = self.held_out.labels if self.labelled else None
        for start in range(0, len(self.held_out), _SCORED):
            part = slice(start, start + _SCORED)
            images = self.held_out.images[part].to(device)
            known = None if labels is None else labels[part].to(device)
            with taps.open(), torch.no_grad():
                loss = self._outputs_loss(net, images, known, taps)
            total += float(loss) * len(images)
        return total / len(self.held_out)

    def _reestimate(self, student: nn.Module) -> dict[str, Any]:
        """Replace the statistics of every batch norm by those of the converted activations.

        It helps where the layers lost much; where the refit kept the statistics, it adds noise.
        """
        start = time.perf_counter()
        kept = {name: value.clone() for name, value in student.named_buffers()}
        before = self.score(student)
        device = next(student.parameters()).device
        # The same batches whenever it is done.
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            batches = islice(self.loader, _STATISTICS)
            reestimate_batch_norm(student, (parts(batch)[0].to(device) for batch in batches))
        before, after = ranks.on_first(lambda: (before, self.score(student)))
        if not after < before:
            log.info("batch norm: its re-estimate is not kept, the loss went from %.4f to %.4f",
                     before, after)  # fmt: skip
            for name, value in student.named_buffers():
                value.copy_(kept[name])
        return {
            "stage": "batch norm", "before": before, "after": min(before, after),
            "kept": after < before, "seconds": time.perf_counter() - start,
        }  # fmt: skip

    def _learn(
        self, name: str, student: nn.Module, seconds: float, *, apart: bool, frozen: bool
    ) -> dict[str, Any]:
        start = time.perf_counter()
        taps = self._taps(student, apart=apart)
        home = next(self.teacher.parameters()).device
        sample = self.held_out.images[:2].to(home)
        layout = fastest_format(sample, self.teacher, student)
        moved = self.options.augment
        moved = bool(self.classes) and self.options.loss is None if moved is None else moved

        def loss(
            net: nn.Module, images: Tensor, labels: Tensor | None, generator: torch.Generator
        ) -> Tensor:
            if moved and images.ndim == 4:
                images = augment(images, generator)
            if images.ndim == 4:
                images = images.contiguous(memory_format=layout)
            with taps.open():
                if apart:
                    with torch.no_grad():
                        self.teacher(images)
                    net(images)
                    return taps.loss()
                return self._outputs_loss(net, images, labels, taps)

        try:
            learned = learn(
                name,
                student,
                Lesson(loss, self.score, self.loader, self.labelled, self.teacher, frozen),
                seconds=seconds,
                learning_rate=self.options.learning_rate,
                sync_batch_norm=self.options.sync_batch_norm,
                seed=self.seed,
                store=self.store,
            )
        finally:
            self.teacher.to(home)
        log.info("%s: %d steps, loss %.4f -> %.4f", name, learned.steps, learned.before,
                 learned.after)  # fmt: skip
        return {"stage": name, **asdict(learned), "seconds": time.perf_counter() - start}

    def _taps(self, student: nn.Module, *, apart: bool) -> Taps:
        # A loss of the user's is all that counts when the whole network learns.
        features = self.features if apart or self.options.loss is None else ()
        return Taps(self.teacher, student, features, apart=apart)

    def _outputs_loss(
        self, net: nn.Module, images: Tensor, labels: Tensor | None, taps: Taps
    ) -> Tensor:
        """Of what the networks return, and of the features read on the way."""
        with torch.no_grad():
            wanted = self.teacher(images)
        found = net(images)
        if self.options.loss is not None:
            return self.options.loss(found, wanted, labels)
        if not self.features:
            return distance(found, wanted, labels)
        features = taps.loss()
        # Detectors return as many boxes as they find: there is nothing to compare one to one.
        if self.few or not comparable(found, wanted):
            return features
        return distance(found, wanted, labels) + _FEATURES * features


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the statistics of every batch norm by their means over some batches.

    As :func:`torch.optim.swa_utils.update_bn`, but all else stays in evaluation mode: in training
    mode some networks return something else, or want something else.
    """
    norms = {
        module: module.momentum
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    }
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        for batch in batches:
            model(batch)
    finally:
        for norm, momentum in norms.items():
            norm.momentum = momentum
            norm.eval()


@torch.inference_mode()
def _knows(teacher: nn.Module, loader: DataLoader[Any], classes: int) -> bool:
    """Whether labels are those that the teacher learned from.

    Those of a folder with some of the classes only, or sorted otherwise, would mislead.
    """
    images, labels = parts(next(iter(loader)))
    if not isinstance(labels, Tensor) or labels.shape != (len(images),):
        return False
    if labels.is_floating_point():
        return False
    device = next(teacher.parameters()).device
    hits = teacher(images.to(device)).argmax(1).cpu() == labels.cpu()
    share = float(hits.float().mean())
    known = int(labels.max()) < classes and share >= _KNOWS / classes
    if not known:
        log.warning(
            "labels are not learned from: the original is right on %.1f%% of %d images, as if by "
            "chance", 100 * share, len(images),
        )  # fmt: skip
    return known
