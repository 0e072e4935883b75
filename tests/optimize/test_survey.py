"""The survey: every layer's regression made once, menus kept and found again as they were."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from compare import assert_close
from networks import Residual, images, residual
from torch import Tensor

from groupconv.optimize.moments import layer_moments
from groupconv.optimize.sampling import Sampling
from groupconv.optimize.schur import Regression
from groupconv.optimize.sensitivity import Sensitivity, Trials
from groupconv.optimize.structure import Pair
from groupconv.optimize.survey import Searches, Survey, menus_and_sensitivities
from groupconv.optimize.trace import Trace, trace
from groupconv.store import Store

NAMES = ("conv1", "conv2")


class Batches:
    """Calibration images, and how often they were asked for."""

    def __init__(self) -> None:
        self.passes = 0

    def __call__(self) -> Iterator[Tensor]:
        self.passes += 1
        yield from images().split(16)


def made() -> tuple[Residual, Trace, Batches, Searches]:
    net, batches = residual(), Batches()
    mapped = trace(net, (images(2),))
    return net, mapped, batches, Searches(net, mapped.convs, Sampling(batches, 64, 4_000, 0), {})


def test_a_regression_is_that_of_the_layers_moments_and_made_once() -> None:
    net, mapped, batches, searches = made()
    found = searches(NAMES)
    # Both fit into one pass.
    assert batches.passes == 1
    assert searches(reversed(NAMES)) == found
    assert batches.passes == 1
    for conv in mapped.convs:
        if conv.name not in NAMES:
            continue
        (moments,) = layer_moments(net, [(conv, conv.name)], searches.sampling)
        expected = Regression.of(moments, net.get_submodule(conv.name).weight)
        problem = found[conv.name].problem
        assert_close(problem.system, expected.system, rtol=1e-12, atol=1e-12)
        assert problem.total == pytest.approx(expected.total)


def test_layers_that_do_not_fit_have_passes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[Searches.__module__], "_SUMS_BYTES", 1)
    _, _, batches, searches = made()
    apart = searches(NAMES)
    assert batches.passes == 2
    monkeypatch.undo()
    together = made()[3](NAMES)
    for name in NAMES:
        assert_close(
            apart[name].problem.system, together[name].problem.system, rtol=1e-12, atol=1e-12
        )


def test_menus_are_kept_layer_by_layer(tmp_path: Path) -> None:
    _, mapped, batches, searches = made()
    convs = [conv for conv in mapped.convs if conv.name in NAMES]

    def survey(kept: Store, known: Searches = searches) -> tuple[dict, dict]:
        trials = Trials(known.model, images(), known.importance)
        return menus_and_sensitivities(mapped, convs, known, kept, trials, round_to=2)

    first = survey(Store(tmp_path, "run"))
    assert set(first[0]) == set(first[1]) == set(NAMES)
    assert all(s.scale > 0 for kinds in first[1].values() for s in kinds.values())
    # As it was in memory, no image needed.
    batches.passes = 0
    assert survey(Store(tmp_path, "run"), made()[3]) == first
    assert survey(Store(None, "")) == first
    # One layer's part is lost: the others' are used.
    (tmp_path / ".unfinished").joinpath(
        sorted(path.name for path in (tmp_path / ".unfinished").iterdir())[0]
    ).write_bytes(b"{")
    assert survey(Store(tmp_path, "run")) == first
    assert batches.passes == 0


def test_predicted_errors() -> None:
    _, mapped, _, searches = made()
    convs = [conv for conv in mapped.convs if conv.name in NAMES]
    trials = Trials(searches.model, images())
    menus, _ = menus_and_sensitivities(mapped, convs, searches, Store(None, ""), trials, round_to=1)
    by_kind = {"grouped": Sensitivity(2.0, 1.5), "pair": Sensitivity(3.0, 1.5)}
    known = Survey(menus, dict.fromkeys(NAMES, by_kind), {})
    for name, menu in menus.items():
        assert known.error(name, 0) == 0.0
        for index, candidate in enumerate(menu[1:], 1):
            scale = 3 if isinstance(candidate.structure, Pair) else 2
            assert known.error(name, index) == pytest.approx(scale * candidate.loss**1.5)
            assert 0 < candidate.loss <= 1
