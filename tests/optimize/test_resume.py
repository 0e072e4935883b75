"""Interrupted at any moment and run again: the same result, the finished layers not repeated."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import images
from torch import nn

import groupconv
from groupconv.store import claimed

pytestmark = pytest.mark.usefixtures("steady_clock")

LAYERS = 4
MODULES = {
    "menu": "groupconv.optimize.survey",
    "_fit_groups": "groupconv.optimize.refit",
    "_fit_pair": "groupconv.optimize.refit",
}


class Interrupted(BaseException):
    """As a KeyboardInterrupt is: no error that anything may handle."""


def network(seed: int = 0) -> nn.Sequential:
    """A first and a last layer, which stay, and four others; pairs and groups suit different."""
    torch.manual_seed(seed)
    steps: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()]
    for _ in range(LAYERS // 2):
        steps += [nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        steps += [nn.Conv2d(16, 16, 1), nn.ReLU()]
    return nn.Sequential(*steps, nn.Conv2d(16, 4, 1)).eval()


def optimize(out: Path, **changes: object) -> groupconv.Result:
    arguments = {"data": images(40), "budget": "35%macs", "recover": "bn", "seed": 1, **changes}
    return groupconv.optimize(network(), arguments.pop("data"), out=out, **arguments)


class Watch:
    """Counts the calls of steps of the optimizer, and stops one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = dict.fromkeys(MODULES, 0)
        self.stop: tuple[str, int, bool] | None = None
        for name, module in MODULES.items():
            whole = getattr(sys.modules[module], name)
            monkeypatch.setattr(sys.modules[module], name, self._counted(name, whole))

    def _counted(self, name: str, whole: Callable) -> Callable:
        def counted(*args: object, **kwargs: object) -> object:
            here = self.stop is not None and self.stop[:2] == (name, self.calls[name])
            if here and not self.stop[2]:
                raise Interrupted
            self.calls[name] += 1
            found = whole(*args, **kwargs)
            if here:
                raise Interrupted
            return found

        return counted

    def during(self, run: Callable[[], object]) -> dict[str, int]:
        """How often each step began in a run."""
        before = dict(self.calls)
        run()
        return {name: count - before[name] for name, count in self.calls.items()}


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def assert_same(first: groupconv.Result, second: groupconv.Result) -> None:
    assert first.plan == second.plan
    states = [result.model.state_dict() for result in (first, second)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


@pytest.mark.parametrize("share", [0.5, pytest.param(None, marks=pytest.mark.slow)])
def test_interrupted_anywhere(share: float | None, watch: Watch, tmp_path: Path) -> None:
    """Before and after every layer's survey and every layer's refit, or half-way through each."""
    results: list[groupconv.Result] = []
    every = watch.during(lambda: results.append(optimize(tmp_path / "whole")))
    assert every["menu"] == LAYERS
    assert every["_fit_groups"] > 0
    assert every["_fit_pair"] > 0
    moments = [
        (name, number, after)
        for i, (name, count) in enumerate(every.items())
        for number in (range(count) if share is None else [int(share * count)])
        for after in ((False, True) if share is None else [i % 2 == 0])
    ]
    for i, (name, number, after) in enumerate(moments):
        out = tmp_path / str(i)
        watch.calls = dict.fromkeys(MODULES, 0)
        watch.stop = (name, number, after)
        with pytest.raises(Interrupted):
            optimize(out)
        assert (out / ".unfinished").is_dir()
        assert not (out / "model.safetensors").exists()
        assert not (out / "plan.json").exists()
        watch.stop = None
        done = dict(watch.calls)
        # The step that was stopped at its end had not been kept.
        done[name] -= after
        repeated = watch.during(lambda out=out: results.append(optimize(out)))
        assert repeated == {step: count - done[step] for step, count in every.items()}
        assert_same(results[-1], results[0])
        assert not (out / ".unfinished").exists()
        assert {path.name for path in out.iterdir()} == {
            "model.safetensors", "plan.json", "report.json", "report.html"
        }  # fmt: skip
        loaded = groupconv.load(out, network(seed=5))
        for tensor, expected in zip(
            loaded.parameters(), results[0].model.parameters(), strict=True
        ):
            assert torch.equal(tensor, expected)


def test_interrupted_again_and_again(watch: Watch, tmp_path: Path) -> None:
    """Every run comes one layer further."""
    whole = optimize(tmp_path / "whole")
    watch.stop = ("menu", 1, False)
    for _ in range(LAYERS - 1):
        watch.calls = dict.fromkeys(MODULES, 0)
        with pytest.raises(Interrupted):
            optimize(tmp_path / "out")
    watch.calls = dict.fromkeys(MODULES, 0)
    assert_same(optimize(tmp_path / "out"), whole)
    assert watch.calls["menu"] == 1


@pytest.mark.parametrize(
    "change",
    [{"seed": 2}, {"round_to": 4}, {"keep": ("first",)}, {"data": images(40, seed=2)}],
    ids=lambda change: next(iter(change)),
)
def test_what_is_kept_serves_the_same_run_only(
    change: dict[str, object], watch: Watch, tmp_path: Path
) -> None:
    """Another seed, other images or another rule are named, and begin afresh if asked to."""
    watch.stop = ("_fit_groups", 0, False)
    with pytest.raises(Interrupted):
        optimize(tmp_path / "out")
    watch.stop = None
    (name,) = change
    with pytest.raises(
        groupconv.DataError, match=f"unfinished run with other inputs: .*{name} was"
    ):
        optimize(tmp_path / "out", **change)
    results: list[groupconv.Result] = []
    counts = watch.during(
        lambda: results.append(optimize(tmp_path / "out", restart=True, **change))
    )
    assert counts["menu"] == LAYERS + (change.get("keep") == ("first",))
    assert_same(results[0], optimize(tmp_path / "other", **change))
    assert not (tmp_path / "out" / ".unfinished").exists()


def test_one_run_at_a_time(tmp_path: Path) -> None:
    """Two in one folder: the second is refused, and the first not disturbed."""
    with claimed(tmp_path, {}, restart=False):
        for restart in (False, True):
            with pytest.raises(groupconv.DataError, match="another run writes there"):
                optimize(tmp_path, restart=restart)
        assert (tmp_path / ".unfinished" / "inputs.json").exists()
    assert optimize(tmp_path, restart=True).plan.layers


def test_the_survey_serves_another_budget(watch: Watch, tmp_path: Path) -> None:
    """One that is too tight ends the run; the layers are not examined again for the next."""
    with pytest.raises(groupconv.BudgetError):
        optimize(tmp_path / "out", budget="1%macs")
    result: list[groupconv.Result] = []
    counts = watch.during(lambda: result.append(optimize(tmp_path / "out")))
    assert counts["menu"] == 0
    assert_same(result[0], optimize(tmp_path / "other"))


def test_an_applied_plan_goes_on_too(watch: Watch, tmp_path: Path) -> None:
    plan = groupconv.plan(network(), images(40), budget="35%macs", seed=1)
    whole = groupconv.apply(network(), images(40), plan)
    watch.calls = dict.fromkeys(MODULES, 0)
    watch.stop = ("_fit_groups", 2, False)
    with pytest.raises(Interrupted):
        groupconv.apply(network(), images(40), plan, out=tmp_path)
    done, watch.stop = dict(watch.calls), None
    result: list[groupconv.Result] = []
    counts = watch.during(
        lambda: result.append(groupconv.apply(network(), images(40), plan, out=tmp_path))
    )
    assert done["_fit_groups"] == 2
    every = watch.during(lambda: groupconv.apply(network(), images(40), plan))
    assert counts == {step: every[step] - done[step] for step in every}
    assert_same(result[0], whole)
    assert not (tmp_path / ".unfinished").exists()
