"""What is known of every layer before anything is chosen: menus, losses, what they cost, times."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from groupconv import events, ranks
from groupconv.optimize.covariance import Moments, SeparableMoments
from groupconv.optimize.menu import Candidate, freedom, menu
from groupconv.optimize.moments import EXACT, layer_moments
from groupconv.optimize.sampling import Sampling
from groupconv.optimize.schur import Regression
from groupconv.optimize.search import Search
from groupconv.optimize.sensitivity import Sensitivity, Trials
from groupconv.optimize.structure import Layer, dense_weight, kind
from groupconv.optimize.trace import Trace, TracedConv
from groupconv.store import Store

log = logging.getLogger(__name__)

# Sums of several layers are filled in one pass over the images, up to so many bytes.
_SUMS_BYTES = 1 << 30
# Multiply-adds to spend on trying cuts in the network, and the images to try them on.
_TRIAL_MACS = 2e12
_TRIALS = 4
_LEAST_IMAGES, _MOST_IMAGES = 8, 256


@dataclass(frozen=True)
class Survey:
    """The candidates of every layer that can be changed, the layer as it is first.

    Args:
        menus: layer name to its candidates.
        sensitivities: layer name, and the kind of structure that stands in its place, to what its
            loss costs the network.
        times: layer name to measured seconds of every candidate.
        ties: candidates that stand together or not at all, as names and indices.
    """

    menus: Mapping[str, Sequence[Candidate]]
    sensitivities: Mapping[str, Mapping[str, Sensitivity]]
    times: Mapping[str, Sequence[float]]
    ties: Sequence[Sequence[tuple[str, int]]] = ()

    def error(self, name: str, index: int) -> float:
        """Predicted error of the network's output where a layer takes one of its candidates."""
        candidate = self.menus[name][index]
        if candidate.loss == 0:
            return 0.0
        return self.sensitivities[name][kind(candidate.structure)].error(candidate.loss)

    def changes(self, name: str, candidate: Candidate) -> bool:
        """Whether a candidate is not the layer as it is."""
        return candidate.structure != self.menus[name][0].structure


class Searches:
    """The regression of each layer of a network on its calibration images, made when asked for.

    Args:
        model: in evaluation mode.
        convs: its layers.
        sampling: of the calibration images; its seed is that of the searches, too.
        importance: layer name to what its output channels count.
    """

    def __init__(
        self,
        model: nn.Module,
        convs: Iterable[TracedConv],
        sampling: Sampling,
        importance: Mapping[str, Tensor],
    ) -> None:
        self.model, self.sampling, self.importance = model, sampling, importance
        self.convs = {conv.name: conv for conv in convs}
        self._known: dict[str, Search] = {}

    def __call__(self, names: Iterable[str]) -> dict[str, Search]:
        """The searches of some layers by their names."""
        return dict(self.each(names))

    def each(self, names: Iterable[str], *, spread: bool = False) -> Iterator[tuple[str, Search]]:
        """The searches of some layers, one after the other.

        Args:
            names: of the layers, the same in all processes.
            spread: whether each process gets only a share of them.
        """
        missing = []
        for name in names:
            if name in self._known:
                yield name, self._known[name]
            else:
                missing.append(self.convs[name])
        number = 0
        for some in _passes(missing):
            layers = [(conv, conv.name) for conv in some]
            found = layer_moments(self.model, layers, self.sampling)
            for conv in some:
                # Popped, so that a layer's moments are free as soon as its regression is made.
                moments = found.pop(0)
                number += 1
                if spread and number % ranks.count() != ranks.rank():
                    continue
                _tell(conv, moments)
                layer = self.model.get_submodule(conv.name)
                assert isinstance(layer, Layer)
                counts = self.importance.get(conv.name)
                problem = Regression.of(moments, dense_weight(layer), counts)
                search = Search(problem, self.sampling.seed)
                # What one process knows and others don't they could not ask for together.
                if not spread or ranks.count() == 1:
                    self._known[conv.name] = search
                yield conv.name, search


def menus_and_sensitivities(
    mapped: Trace,
    convs: Sequence[TracedConv],
    searches: Searches,
    store: Store,
    trials: Trials,
    *,
    round_to: int,
) -> tuple[dict[str, list[Candidate]], dict[str, dict[str, Sensitivity]]]:
    """The menu of every layer, and what its loss costs the network by the kind of structure.

    Kept layer by layer. Several processes share the layers.

    Args:
        mapped: trace of the network.
        convs: layers that can be cut.
        searches: of the layers.
        store: of the run.
        trials: in the network.
        round_to: see :func:`menu`.
    """
    free = freedom(mapped, convs)
    known = ranks.on_first(
        lambda: {conv.name: store.read(f"menu of {conv.name}") for conv in convs}
    )
    missing = {conv.name: conv for conv in convs if known[conv.name] is None}
    mine: dict[str, Any] = {}
    share = searches.each(missing, spread=True)
    for name, search in events.followed("survey", share, len(missing) // ranks.count()):
        candidates = menu(missing[name], search, free[name], round_to=round_to)
        found = {
            of: asdict(trials.sensitivity(name, search.problem, some))
            for of, some in _by_kind(candidates).items()
        }
        mine[name] = {"candidates": [c.to_dict() for c in candidates], "sensitivities": found}
        store.write(f"menu of {name}", mine[name])
        log.info("%s: %d candidates", name, len(candidates))
    for theirs in ranks.gathered(mine):
        known |= theirs
    return (
        {n: [Candidate.from_dict(c) for c in kept["candidates"]] for n, kept in known.items()},
        {
            name: {of: Sensitivity(**s) for of, s in kept["sensitivities"].items()}
            for name, kept in known.items()
        },
    )


def affordable(images: Tensor, layers: int, macs: int) -> Tensor:
    """As many of some images as there is time to try cuts of layers on.

    Args:
        images: ``(N, C, H, W)``.
        layers: how many.
        macs: of the network, for one image.
    """
    count = int(_TRIAL_MACS / (_TRIALS * max(layers, 1) * macs))
    return images[: min(max(count, _LEAST_IMAGES), _MOST_IMAGES)]


def _by_kind(candidates: Iterable[Candidate]) -> dict[str, list[Candidate]]:
    found: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        found.setdefault(kind(candidate.structure), []).append(candidate)
    return found


def _passes(convs: Sequence[TracedConv]) -> Iterator[list[TracedConv]]:
    """Layers whose sums fit into memory together, in the order given."""
    some: list[TracedConv] = []
    size = 0
    for conv in convs:
        inputs = conv.spec.in_channels * conv.spec.taps
        # Two sets of sums, of the images to fit and of those held out.
        needed = 16 * min(inputs, EXACT) * (min(inputs, EXACT) + conv.spec.out_channels)
        if some and size + needed > _SUMS_BYTES:
            yield some
            some, size = [], 0
        some.append(conv)
        size += needed
    if some:
        yield some


def _tell(conv: TracedConv, moments: Moments | SeparableMoments) -> None:
    log.info(
        "%s: %d positions, relative error of its %s %s",
        conv.name,
        moments.count,
        "variance" if isinstance(moments, Moments) else "separable covariance",
        "unknown" if moments.error is None else f"{moments.error:.1%}",
    )
