"""Plans: planted structures found, every rule held, and a plan that was edited is obeyed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compare import assert_close
from networks import images, residual
from planted import plant_pair
from torch import Tensor, nn

import groupconv
from groupconv.data import Images
from groupconv.kernels.spec import ConvSpec
from groupconv.optimize.convert import structure_of
from groupconv.optimize.partition import Partition
from groupconv.optimize.structure import Grouped, Pair
from groupconv.optimize.trace import trace

pytestmark = pytest.mark.usefixtures("steady_clock")


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def chain(*middle: tuple[int, int, int], seed: int = 0) -> nn.Sequential:
    """A first layer, layers of the given channels and kernel sizes, and a last one."""
    torch.manual_seed(seed)
    steps: list[nn.Module] = [nn.Conv2d(3, middle[0][0], 3, padding=1), nn.ReLU()]
    for inputs, channels, kernel in middle:
        steps += [nn.Conv2d(inputs, channels, kernel, padding=kernel // 2), nn.ReLU()]
    return nn.Sequential(*steps, nn.Conv2d(middle[-1][1], 5, 1)).eval()


def specs(model: nn.Module) -> dict[str, ConvSpec]:
    return {conv.name: conv.spec for conv in trace(model, (images(2),)).convs}


def same(first: nn.Module, second: nn.Module) -> bool:
    """Whether two networks have the same tensors."""
    tensors = [net.state_dict() for net in (first, second)]
    return tensors[0].keys() == tensors[1].keys() and all(
        torch.equal(value, tensors[1][name]) for name, value in tensors[0].items()
    )


@pytest.mark.parametrize(
    ("layer", "pair"),
    [
        ((16, 32, 3), Pair(8, 1, 1, False)),
        ((16, 32, 3), Pair(16, 16, 1, False)),
        ((24, 24, 3), Pair(24, 24, 1, False)),
        ((16, 32, 3), Pair(32, 16, 1, False)),
        ((32, 32, 1), Pair(32, 8, 8, True)),
    ],
    ids=str,
)
def test_planted_pairs_are_found(layer: tuple[int, int, int], pair: Pair) -> None:
    """Between other layers: of all that the budget allows, the exact one."""
    model, x = chain(layer), images()
    plant_pair(model[2], pair)
    result = groupconv.optimize(model, x, budget="90%macs")
    assert result.plan.layers == {"2": pair}
    assert result.report["macs"]["after"] <= 0.9 * result.report["macs"]["before"]
    assert result.report["layers"][0]["loss"] == pytest.approx(0, abs=1e-5)
    expected = outputs(model, x)
    assert_close(outputs(result.model, x), expected, rtol=1e-3, atol=1e-3 * expected.abs().max())


@pytest.mark.parametrize("round_to", [4, 8])
@pytest.mark.parametrize(
    "model",
    [
        residual(channels=48),
        chain((24, 40, 3), (40, 32, 1)),
        chain((16, 24, 3), (24, 72, 1), (72, 16, 1), seed=1),
    ],
    ids=["residual", "narrowing", "bottleneck"],
)
def test_widths_are_multiples(model: nn.Module, round_to: int) -> None:
    dense = specs(model)
    for budget in ("75%macs", "45%macs"):
        plan = groupconv.plan(model, images(40), budget=budget, round_to=round_to)
        assert plan.layers
        for name, settled in plan.layers.items():
            for spec in structure_of(settled).specs(dense[name]):
                widths = (spec.in_channels // spec.groups, spec.out_channels // spec.groups)
                depthwise = spec.groups == spec.in_channels
                assert depthwise or not any(width % round_to for width in widths), settled


def test_what_no_multiple_allows_is_refused() -> None:
    """Layers of 12, 20 and 36 channels: 8 divides no width, and only depthwise ones are exempt.

    Both layers with 16 of the 20 channels between them are all that is left.
    """
    model = chain((12, 20, 3), (20, 36, 3))
    narrow = groupconv.plan(model, images(), budget="90%macs", round_to=1)
    widths = [
        spec.in_channels // spec.groups
        for name, settled in narrow.layers.items()
        for spec in structure_of(settled).specs(specs(model)[name])
    ]
    assert any(width % 8 for width in widths)
    rounded = groupconv.plan(model, images(), budget="90%macs", round_to=8)
    assert [str(structure_of(settled)) for settled in rounded.layers.values()] == [
        "16 to 36 channels", "12 to 16 channels",
    ]  # fmt: skip
    with pytest.raises(groupconv.BudgetError, match="budget='30%macs'"):
        groupconv.plan(model, images(), budget="30%macs", round_to=8)
    # Depthwise, then 24 to 24 channels: the second is a multiple of 8.
    separable = groupconv.plan(chain((24, 24, 3)), images(), budget="40%macs", round_to=24)
    assert separable.layers == {"2": Pair(24, 24, 1, False)}


@pytest.mark.parametrize("round_to", [0, -4])
def test_multiples_that_are_none(round_to: int) -> None:
    with pytest.raises(groupconv.ArgumentError, match=f"round_to={round_to} must be a positive"):
        groupconv.plan(residual(), images(), round_to=round_to)


def several_classes(seed: int = 0) -> tuple[nn.Module, Images]:
    """A network of three layers to cut, and images with its own classes as labels."""
    model = chain((16, 16, 3), (16, 16, 3), (16, 16, 3), seed=seed)
    model = nn.Sequential(*model, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    x = images(120)
    with torch.no_grad():
        scores = model(x)
        # Else one class would be the answer for all images, whatever is cut.
        model[-3].bias.sub_(scores.mean(0))
        return model, Images(x, model(x).argmax(1), "noise")


def test_a_floor_on_accuracy_rolls_back_until_it_holds() -> None:
    model, labelled = several_classes()
    free = groupconv.optimize(model, labelled, budget="25%macs", min_accuracy=0.0)
    assert len(free.plan.layers) == 3
    reached = free.report["accuracy"]["after"]
    assert reached < 0.95
    for floor in ((reached + 1) / 2, 1.0):
        result = groupconv.optimize(model, labelled, budget="25%macs", min_accuracy=floor)
        assert result.report["accuracy"]["after"] >= floor
        undone = [name for name in free.plan.layers if name not in result.plan.layers]
        kept = {n: settled for n, settled in free.plan.layers.items() if n not in undone}
        assert undone
        assert list(result.plan.layers.items()) == list(kept.items())
        assert all(f"the floor {floor}" in result.plan.reasons[name] for name in undone)
        # No layer more than needed: with the last of them cut as well the floor does not hold.
        cuts = (
            groupconv.apply(
                model,
                labelled,
                replace(free.plan, layers={n: x for n, x in free.plan.layers.items() if n in some}),
            )
            for some in ({*kept, name} for name in undone)
        )
        assert any(cut.report["accuracy"]["after"] < floor for cut in cuts)


def test_a_floor_without_labels_is_about_agreement() -> None:
    model, labelled = several_classes()
    plan = groupconv.plan(model, labelled.images, budget="25%macs")
    result = groupconv.apply(model, labelled.images, plan, min_accuracy=0.98)
    assert result.report["accuracy"]["after"] is None
    assert result.report["agreement"] >= 0.98
    assert len(result.plan.layers) < len(plan.layers)
    for floor in (-0.1, 1.1, float("nan")):
        with pytest.raises(groupconv.ArgumentError, match=r"min_accuracy=.* must be between 0 and"):
            groupconv.apply(model, labelled.images, plan, min_accuracy=floor)


def test_several_budgets_all_hold() -> None:
    model, x = residual(channels=32), images()
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    for budget, bounds in (
        (["95%macs", "50%params", "90%size"], {"macs": 0.95, "params": 0.5, "size": 0.9}),
        (["99%macs", "45%size"], {"macs": 0.99, "size": 0.45}),
    ):
        result = groupconv.optimize(model, x, budget=budget)
        after = sum(t.numel() * t.element_size() for t in result.model.state_dict().values())
        sizes = {"before": size, "after": after}
        for quantity, share in bounds.items():
            found = sizes if quantity == "size" else result.report[quantity]
            assert found["after"] <= share * found["before"], (budget, quantity)
        assert result.report["settings"]["budget"] == ", ".join(budget)
    with pytest.raises(groupconv.BudgetError, match=r"'99%macs'.*can't be met.*'1%params'"):
        groupconv.optimize(model, x, budget=["99%macs", "1%params"])


def test_a_plan_applied_is_what_optimize_does(tmp_path: Path) -> None:
    model, x = chain((16, 32, 3), (32, 16, 3), (16, 16, 1)), images()
    whole = groupconv.optimize(model, x, budget="45%macs", seed=2)
    made = groupconv.plan(model, x, budget="45%macs", seed=2, out=tmp_path)
    assert made == whole.plan
    text = (tmp_path / "plan.json").read_text()
    read = groupconv.Plan.from_json(text)
    applied = groupconv.apply(model, x, read, out=tmp_path)
    assert applied.plan == made
    assert same(applied.model, whole.model)
    assert (tmp_path / "plan.json").read_text() == text
    assert same(groupconv.load(tmp_path, chain((16, 32, 3), (32, 16, 3), (16, 16, 1))), whole.model)
    assert not (tmp_path / ".unfinished").exists()


def test_an_edited_plan_is_obeyed() -> None:
    """Groups without orders get some; all else stays as the plan has it, whatever was made."""
    model, x = residual(channels=32), images()
    made = json.loads(groupconv.plan(model, x, budget="60%macs").to_json())
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0)).tolist()
    made["layers"] = {
        "conv2": {"groups": 8},
        "conv1": {"groups": 4, "in_order": order, "out_order": order[::-1]},
    }
    plan = groupconv.Plan.from_json(json.dumps(made))
    assert plan.layers["conv2"] == Grouped(8)
    result = groupconv.apply(model, x, plan)
    assert result.plan.layers["conv1"] == Partition(4, tuple(order), tuple(order[::-1]))
    settled = result.plan.layers["conv2"]
    assert isinstance(settled, Partition)
    assert settled.groups == 8
    # Within the orders that the first layer wants, as far as they suit; none has to be permuted.
    rows = {row["name"]: row for row in result.report["layers"]}
    assert {name: row["groups"] for name, row in rows.items()} == {"conv1": 4, "conv2": 8}
    given = Partition.identity(8, 32, 32)
    plain = groupconv.apply(model, x, replace(plan, layers={**plan.layers, "conv2": given}))
    plain_rows = {row["name"]: row for row in plain.report["layers"]}
    assert rows["conv2"]["loss"] < plain_rows["conv2"]["loss"]
    assert rows["conv2"]["explicit_permutations"] <= plain_rows["conv2"]["explicit_permutations"]


def test_a_plan_by_hand_may_keep_layers_dense_and_take_pairs() -> None:
    model, x = residual(channels=32), images()
    layers = {"conv1": Grouped(1), "conv2": Pair(16, 1, 1, False)}
    result = groupconv.apply(model, x, groupconv.Plan(layers))
    assert type(result.model.conv1) is nn.Conv2d
    assert result.model.conv1.groups == 1
    assert [tuple(p.weight.shape) for p in result.model.conv2] == [(16, 32, 3, 3), (32, 16, 1, 1)]
    assert result.report["settings"]["budget"] == ""


def test_an_illegal_plan_names_all_faults_and_writes_nothing(tmp_path: Path) -> None:
    model = residual()
    layers = {
        "conv1": Grouped(3),
        "conv2": Partition.identity(2, 8, 8),
        "conv3": Grouped(2),
        "stem.0": Pair(6, 2, 4, False),
    }
    with pytest.raises(groupconv.DataError) as raised:
        groupconv.apply(model, images(), groupconv.Plan(layers), out=tmp_path)
    for fault in (
        "conv1: in_channels=16 and out_channels=16 not divisible by groups=3",
        "conv2: 8 input and 8 output channels listed; the layer has 16 and 16",
        "layer 'conv3' can't be converted: no such layer",
        "stem.0: first of the pair",
    ):
        assert fault in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_sweep_is_optimize_under_each_budget(tmp_path: Path) -> None:
    model, x, budgets = residual(channels=32), images(), ["80%macs", "50%macs"]
    results = groupconv.sweep(model, x, budgets=budgets, out=tmp_path)
    for budget, result in zip(budgets, results, strict=True):
        assert result.plan == groupconv.plan(model, x, budget=budget)
        assert same(groupconv.load(tmp_path / budget, residual(channels=32)), result.model)
    assert same(result.model, groupconv.optimize(model, x, budget=budgets[-1]).model)
    frontier = json.loads((tmp_path / "frontier.json").read_text())
    assert [report["settings"]["budget"] for report in frontier] == budgets
    assert "<svg" in (tmp_path / "frontier.html").read_text()
    assert not (tmp_path / ".unfinished").exists()
    with pytest.raises(groupconv.ArgumentError, match="budgets="):
        groupconv.sweep(model, x, budgets=[])
