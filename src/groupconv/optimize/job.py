"""One run: the network made ready, its images in batches, and what it is measured with."""

import hashlib
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from groupconv import ranks
from groupconv.busy import require_quiet
from groupconv.data import Images, largest_map
from groupconv.memory_format import fastest_format
from groupconv.optimize.bake import bake
from groupconv.optimize.cost import count_macs
from groupconv.optimize.fold import fold_permutations
from groupconv.optimize.importance import output_importance
from groupconv.optimize.sampling import Sampling
from groupconv.optimize.survey import Searches
from groupconv.optimize.trace import trace
from groupconv.optimize.visit import accepted, images_at_once
from groupconv.recovery import lessons
from groupconv.store import Store, fingerprint
from groupconv.targets import LatencyTable, Target
from groupconv.timing import TURN, Timing, interleave
from groupconv.version import __version__

log = logging.getLogger(__name__)

_MOMENT_IMAGES = 2_048
_MAX_POSITIONS = 20_000
# A backward pass keeps all activations of a batch.
_IMPORTANCE_IMAGES, _IMPORTANCE_BATCH = 64, 16


class Job:
    """The network of a run, its norms of weights baked and its permutations folded; and tools.

    Args:
        model: in evaluation mode; left as it was.
        images: for calibration.
        target: the runtime whose time counts.
        seed: of every random choice.
        batch_size: images per call when latency is measured.
        folder: for the results, or None.

    Attributes:
        name: of the network's class.
        model: the network made ready.
        mapped: its trace.
        importance: layer name to what its output channels count.
        baked, folded: what was changed in it, by name.
        pixels: of an image, or of the largest map that the network makes of it if those are more.
        macs: of one image.
        weights: bytes of all parameters and buffers.
        steps: seconds of each step so far.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        target: Target,
        *,
        seed: int,
        batch_size: int,
        folder: Path | None,
    ) -> None:
        self.name = type(model).__name__
        self.images, self.target, self.seed, self.batch_size = images, target, seed, batch_size
        self.device = next(model.parameters()).device
        self.folder = folder
        self.table = LatencyTable(target, None if folder is None else folder / "latency.json")
        if self.table.reused:
            log.info("reusing %d measured times of %s", len(self.table.reused), self.table.path)
        self.steps: dict[str, float] = {}
        ranks.on_first(require_quiet)
        with self.step("trace"):
            image = self.example(1)
            with torch.inference_mode(), accepted(image):
                self.pixels = largest_map(image, model(image))
            self._format = fastest_format(image, model)
            model, self.baked = bake(model)
            if self.baked:
                log.info("norms of weights made plain: %s", ", ".join(self.baked))
            self.model, self.folded = fold_permutations(model, (self.example(2),))
            self.mapped = trace(self.model, (self.example(2),))
            # Some networks enlarge what they are given.
            sizes = (conv.spec.input_size for conv in self.mapped.convs)
            self.pixels = max(self.pixels, *map(math.prod, sizes))
            self.macs = self.count_macs(self.model)
            self.weights = sum(tensor.nbytes for tensor in self.model.state_dict().values())
        for name, reason in self.mapped.skipped.items():
            log.info("left as it is: %s (%s)", name, reason)
        self.sampling = Sampling(
            self._moment_batches, min(len(images), _MOMENT_IMAGES), _MAX_POSITIONS, seed
        )
        with self.step("importance"):
            names = [conv.name for conv in self.mapped.convs]
            size = min(_IMPORTANCE_BATCH, lessons.batch_size(self.pixels))
            sample = self.images.images[:_IMPORTANCE_IMAGES].split(size)
            batches = map(self.ready, sample)
            self.importance = output_importance(self.model, names, batches, seed, self.mapped.ends)
        self.searches = Searches(self.model, self.mapped.convs, self.sampling, self.importance)

    def store(self, *options: object) -> Store:
        """Where the finished parts of this run are kept; they depend on the options too."""
        if self.folder is None:
            return Store(None, "")
        return Store(self.folder, f"{self._inputs} {options!r}")

    @cached_property
    def _inputs(self) -> str:
        """Fingerprint of the network and the images, which are read whole for it."""
        tensors = [*self.model.state_dict().items(), ("images", self.images.images)]
        return fingerprint(tensors, __version__, self.seed, self.name)

    def count_macs(self, net: nn.Module) -> int:
        """Multiply-adds of one image."""
        return count_macs(net, (self.example(1),))

    def known_latency(self, net: nn.Module, name: str) -> tuple[Timing, Timing]:
        """As :meth:`latency`, kept in the table under a name: one table gives one plan."""
        shapes = [(key, tuple(value.shape)) for key, value in self.model.state_dict().items()]
        example = (self.example(self.batch_size),)
        network = repr((self.name, shapes, tuple(example[0].shape), name))
        digest = hashlib.sha256(network.encode()).hexdigest()[:16]
        before, after = (f"network {digest} {x}" for x in ("before", "after"))
        builds = {
            before: lambda: self.target.build(self.model, example),
            after: lambda: self.target.build(net, example),
        }
        # Asked for by the first process alone, which chooses.
        times = self.table.measure(builds, seconds=1.5, turn=TURN)
        return times[before], times[after]

    def latency(self, net: nn.Module) -> tuple[Timing, Timing]:
        """The original and another network in one interleaved run of the first process."""
        return ranks.on_first(lambda: self._latency(net))

    def _latency(self, net: nn.Module) -> tuple[Timing, Timing]:
        example = (self.example(self.batch_size),)
        calls = {
            "before": self.target.build(self.model, example),
            "after": self.target.build(net, example),
        }
        timings = interleave(
            calls, seconds=3.0, min_runs=7, max_runs=400, rest=self.target.rest, turn=TURN
        )
        return timings["before"], timings["after"]

    def example(self, batch: int) -> Tensor:
        """Real images, repeated if there are too few."""
        index = torch.arange(batch) % len(self.images)
        return self.images.images[index].to(self.device)

    def ready(self, images: Tensor) -> Tensor:
        """Images on the device of the network, in the order in memory that it takes fastest."""
        return images.to(self.device).contiguous(memory_format=self._format)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Note how long a step takes."""
        start = time.perf_counter()
        yield
        self.steps[name] = self.steps.get(name, 0.0) + time.perf_counter() - start
        log.info("%s: %.1f s", name, self.steps[name])

    def _moment_batches(self) -> Iterator[Tensor]:
        size = images_at_once(self.pixels, self.device)
        images = self.images.images[:_MOMENT_IMAGES]
        yield from map(self.ready, images.tensor_split(math.ceil(len(images) / size)))
