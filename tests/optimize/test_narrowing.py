"""Spaces that lose channels: which go, what that costs, and the smaller network saved and found."""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compare import assert_close
from random_networks import randomize
from torch import Tensor, nn
from traced import Net, conv, found

import groupconv
from groupconv.errors import ArgumentError, DataError
from groupconv.optimize.convert import check, convert
from groupconv.optimize.kept import Kept, kept_by_layers, strands_kept
from groupconv.optimize.narrowing import narrowable, narrowings, removal
from groupconv.optimize.partition import Partition
from groupconv.optimize.plan import Plan, load, save_weights
from groupconv.optimize.refit import refit
from groupconv.optimize.sampling import Sampling
from groupconv.optimize.schur import Regression
from groupconv.optimize.sensitivity import Trials
from groupconv.optimize.structure import DENSE, Narrowed, from_dict, to_dict
from groupconv.optimize.survey import Searches
from groupconv.optimize.trace import Trace, trace
from groupconv.store import Store

X = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def inverted(hidden: int = 24) -> nn.Module:
    """A block of MobileNetV2's kind: pointwise, depthwise, a gate, pointwise, and a residual."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x)
        h = m.act(m.spread_norm(m.spread(x)))
        h = m.act(m.depth_norm(m.depth(h)))
        h = h * m.up(m.down(h.mean((2, 3), keepdim=True)).relu()).sigmoid()
        x = x + m.join_norm(m.join(h))
        return m.end(x.relu().mean((2, 3)))

    net = Net(
        forward,
        stem=conv(3, 8, 3),
        spread=conv(8, hidden, bias=False), spread_norm=nn.BatchNorm2d(hidden),
        depth=conv(hidden, hidden, 3, groups=hidden, bias=False),
        depth_norm=nn.BatchNorm2d(hidden), act=nn.ReLU6(),
        down=conv(hidden, 4), up=conv(4, hidden),
        join=conv(hidden, 8, bias=False), join_norm=nn.BatchNorm2d(8),
        end=nn.Linear(8, 5),
    )  # fmt: skip
    return randomize(net)


def problem(inputs: int, outputs: int, taps: int = 1, seed: int = 0) -> Regression:
    generator = torch.Generator().manual_seed(seed)
    size = inputs * taps
    u = torch.randn(4 * size, size, generator=generator, dtype=torch.float64)
    u = u @ torch.randn(size, size, generator=generator, dtype=torch.float64)
    h, w = u.T @ u, torch.randn(outputs, size, generator=generator, dtype=torch.float64)
    t = w @ h
    return Regression(torch.cat([h, t.T], 1), float((t * w).sum()), taps, outputs)


@pytest.mark.parametrize(
    ("inputs", "taps", "positions"),
    [
        (12, 1, torch.arange(12)[:, None]),
        (6, 4, torch.arange(6)[:, None]),
        # Two positions each, in a concatenation with four other channels.
        (12, 2, torch.tensor([[1, 5], [2, 11], [3, 7], [9, 4]])),
    ],
)
def test_losses_are_those_of_the_regression(inputs: int, taps: int, positions: Tensor) -> None:
    known, strands = problem(inputs, 5, taps), len(positions)
    widths = [strands - 1, strands // 2, 1]
    for width, (left, (lost,)) in zip(widths, removal([(known, positions)], widths), strict=True):
        assert len(left) == width
        gone = positions[[s for s in range(strands) if s not in left]].flatten().tolist()
        stays = [c for c in range(inputs) if c not in gone]
        expected = known.share_lost(float(known.explained(stays).sum()))
        assert lost == pytest.approx(expected, abs=1e-9)


def test_the_least_needed_goes_first() -> None:
    known = problem(10, 4)
    each = [
        known.share_lost(float(known.explained([c for c in range(10) if c != gone]).sum()))
        for gone in range(10)
    ]
    ((left, _),) = removal([(known, torch.arange(10)[:, None])], [9])
    assert set(range(10)) - set(left) == {each.index(min(each))}


def test_of_two_that_say_the_same_one_stays() -> None:
    known = problem(10, 4)
    mixed = torch.eye(10, dtype=torch.float64)
    mixed[7] = mixed[3]
    h = mixed @ known.h @ mixed.T + 1e-9 * torch.eye(10, dtype=torch.float64)
    t = known.t @ torch.linalg.inv(known.h) @ h
    twice = Regression(torch.cat([h, t.T], 1), float((t @ torch.linalg.inv(h) * t).sum()), 1, 4)
    ((left, (lost,)),) = removal([(twice, torch.arange(10)[:, None])], [9])
    assert len({3, 7} & set(left)) == 1
    assert lost == pytest.approx(0, abs=1e-6)


def test_all_that_read_a_space_have_a_say() -> None:
    one, other = problem(8, 3, seed=1), problem(8, 3, seed=2)
    places = torch.arange(8)[:, None]
    ((left, losses),) = removal([(one, places), (other, places)], [7])
    sums = [
        sum(
            p.share_lost(float(p.explained([c for c in range(8) if c != gone]).sum()))
            for p in (one, other)
        )
        for gone in range(8)
    ]
    assert set(range(8)) - set(left) == {sums.index(min(sums))}
    assert sum(losses) == pytest.approx(min(sums))


def test_spaces_between_layers_not_the_stream() -> None:
    net = inverted()
    mapped = trace(net, (X[:2],))
    names = {layer.name for layer in mapped.convs}
    (space,) = narrowable(net, mapped, names, X[:2])
    assert narrowable(net, mapped, names, X[:2])[space] == ["down", "join"]
    assert found(mapped, "spread").outputs.space == space
    # What a user keeps does not lose channels, nor does what shares them.
    for kept in ("spread", "depth", "join", "up"):
        assert narrowable(net, mapped, names - {kept}, X[:2]) == {}


def narrowed(net: nn.Module, mapped: Trace, width: int) -> dict[str, Kept]:
    """Every layer on the hidden space with its first channels."""
    space = found(mapped, "spread").outputs.space
    assert space is not None
    return kept_by_layers(mapped, {space: tuple(range(width))})


def test_a_smaller_network_is_refitted_saved_and_loaded(tmp_path: Path) -> None:
    net = inverted()
    with torch.no_grad():
        # The last channels say what the first ones do.
        for tensor in (
            net.spread.weight, net.depth.weight, net.up.weight, net.up.bias,
            *net.spread_norm.state_dict().values(), *net.depth_norm.state_dict().values(),
        ):  # fmt: skip
            if tensor.ndim:
                tensor[16:] = tensor[:8]
    mapped = trace(net, (X[:2],))
    layers = narrowed(net, mapped, 16)
    assert {name: str(kept.structure) for name, kept in layers.items()} == {
        "spread": "8 to 16 channels",
        "depth": "16 to 16 channels, depthwise",
        "down": "16 to 4 channels",
        "up": "4 to 16 channels",
        "join": "16 to 8 channels",
    }
    converted = convert(net, mapped, layers)
    sampling = Sampling(lambda: X.split(8), images=len(X), max_positions=10**6, seed=0)
    with torch.no_grad():
        expected, before = net(X), converted.model(X)
        refit(net, converted, sampling, Store(None, ""), {})
        result = converted.model(X)
    assert (before - expected).norm() > 0.05 * expected.norm()
    assert (result - expected).norm() < 0.01 * expected.norm()
    assert (converted.model.depth.groups, converted.model.depth_norm.num_features) == (16, 16)
    save_weights(tmp_path, converted)
    again = load(tmp_path, copy.deepcopy(net))
    with torch.no_grad():
        assert_close(again(X), result, rtol=0, atol=0)


def test_plans_say_what_stays() -> None:
    net = inverted()
    layers = narrowed(net, trace(net, (X[:2],)), 16)
    text = Plan(layers).to_json()
    assert Plan.from_json(text).layers == layers
    values = json.loads(text)
    values["layers"]["join"]["kept_in"].pop()
    with pytest.raises(DataError, match="join: kept_in and kept_out must be as many"):
        Plan.from_json(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layers: layers.pop("depth"), "must keep the same ones: depth"),
        (
            lambda layers: layers.update(join=Kept((*range(15), 20), tuple(range(8)))),
            "must keep the same ones: ",
        ),
        (lambda layers: layers.update(depth=DENSE), "layer 'depth' is depthwise already"),
        (
            lambda layers: layers.update(end=Kept((1, 0), (0,))),
            "end: kept inputs must be some of 0 to 7, ascending",
        ),
        (lambda layers: layers.update(end=Kept((), (0,))), "end: inputs=0 must be 1 to 8"),
        (
            lambda layers: layers.update(depth=Kept(tuple(range(16)), tuple(range(16)))),
            "depth: groups=1 must be 16",
        ),
        (
            lambda layers: layers.update(end=Kept(tuple(range(8)), (0, 1))),
            "can't be taken out: output of the network",
        ),
    ],
)
def test_illegal_plans(change: Callable[[dict[str, object]], object], message: str) -> None:
    net = inverted()
    mapped = trace(net, (X[:2],))
    layers: dict[str, object] = dict(narrowed(net, mapped, 16))
    change(layers)
    with pytest.raises(DataError, match=message):
        check(net, mapped, layers)  # type: ignore[arg-type]


def test_strands_of_layers() -> None:
    net = inverted()
    mapped = trace(net, (X[:2],))
    space = found(mapped, "spread").outputs.space
    assert space is not None
    strands = {space: (0, 3, *range(9, 23))}
    assert strands_kept(mapped, kept_by_layers(mapped, strands)) == strands
    assert strands_kept(mapped, {}) == {}


@pytest.mark.parametrize("structure", [Narrowed(3, 4), Narrowed(6, 6, 6)], ids=str)
def test_plain_values(structure: Narrowed) -> None:
    assert from_dict(json.loads(json.dumps(to_dict(structure)))) == structure


def test_a_linear_layer_with_fewer_channels() -> None:
    layer = nn.Linear(8, 6)
    Narrowed(3, 4).check("fc", layer)
    (built,) = Narrowed(3, 4).build(layer, bias=True).values()
    assert built(torch.randn(2, 3)).shape == (2, 4)
    with pytest.raises(ArgumentError, match="fc: outputs=7 must be 1 to 6"):
        Narrowed(8, 7).check("fc", nn.Linear(8, 6))


def joined() -> nn.Module:
    """Two spaces side by side, read by one layer."""
    return randomize(
        Net(
            lambda m, x: m.end(m.join(torch.cat([m.a(x), m.b(x)], 1).relu()).mean((2, 3))),
            a=conv(3, 16, 3), b=conv(3, 24, 3), join=conv(40, 8), end=nn.Linear(8, 5),
        )
    )  # fmt: skip


@pytest.mark.parametrize(("make", "count"), [(inverted, 1), (joined, 2)])
def test_what_was_found_is_kept(make: Callable[[], nn.Module], count: int, tmp_path: Path) -> None:
    net = make()
    mapped = trace(net, (X[:2],))
    passes = []

    def batches() -> list[Tensor]:
        passes.append(1)
        return list(X.split(8))

    def find(folder: Path | None) -> list[object]:
        searches = Searches(net, mapped.convs, Sampling(batches, len(X), 4_000, 0), {})
        names = {layer.name for layer in mapped.convs}
        store = Store(folder, "run")
        trials = Trials(net, X)
        return list(narrowings(mapped, names, searches, store, trials, example=X[:2], round_to=1))

    first = find(tmp_path)
    assert len(first) == count
    assert first == find(None)
    passes.clear()
    assert find(tmp_path) == first
    assert not passes


@pytest.mark.usefixtures("steady_clock")
def test_optimize_takes_channels_out(tmp_path: Path) -> None:
    """Dead channels are what a budget costs least by; the plan, read again, does the same."""
    net = inverted(hidden=32)
    with torch.no_grad():
        net.join.weight[:, ::2] = 0
        net.down.weight[:, ::2] = 0
    folder = tmp_path / "out"
    result = groupconv.optimize(net, X, budget="65%macs", keep=["stem", "end"], out=folder, test=X)
    kept = result.plan.layers["depth"]
    assert isinstance(kept, Kept)
    assert set(kept.outputs) <= set(range(1, 32, 2)) or len(kept.outputs) > 16
    assert result.report["macs"]["after"] <= 0.65 * result.report["macs"]["before"]
    assert result.report["output_error"] < 1e-3
    rows = {row["name"]: row["structure"] for row in result.report["layers"]}
    assert rows["depth"] == str(kept.structure)
    again = groupconv.apply(net, X, Plan.from_json((folder / "plan.json").read_text()), test=X)
    with torch.no_grad():
        assert_close(again.model(X), result.model(X), rtol=1e-5, atol=1e-5)
        assert_close(load(folder, inverted(hidden=32))(X), result.model(X), rtol=0, atol=0)


@pytest.mark.usefixtures("steady_clock")
def test_depthwise_layers_between_grouped_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is on the menu for its channels only is not searched for groups."""
    monkeypatch.setattr(sys.modules["groupconv.optimize.narrowing"], "_SHARES", (3 / 4,))
    plan = groupconv.plan(inverted(hidden=32), X, budget="70%macs", keep=["stem", "end"])
    assert "depth" not in plan.layers
    assert any(isinstance(settled, Partition) for settled in plan.layers.values())


@pytest.mark.usefixtures("steady_clock")
def test_a_floor_gives_a_space_back_whole() -> None:
    net = inverted(hidden=32)
    with torch.no_grad():
        wrong = (net(X).argmax(1) + 1) % 5
    asked = {"budget": "65%macs", "keep": ["stem", "end"], "test": (X, wrong)}
    plain = groupconv.optimize(net, X, **asked)
    narrower = {n for n, settled in plain.plan.layers.items() if isinstance(settled, Kept)}
    assert len(narrower) == 5
    strict = groupconv.optimize(net, X, min_accuracy=0.9, **asked)
    assert strict.plan.layers == {}
    for row in strict.report["layers"]:
        assert row["structure"] == row["was"]
        if row["name"] in narrower:
            assert "kept: without it the accuracy was 0.0000" in row["why"]
