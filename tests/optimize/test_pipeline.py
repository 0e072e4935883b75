"""The whole job: identity when nothing is asked, budgets kept, nothing lost on bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import assert_close
from networks import images, residual
from torch import Tensor, nn

import groupconv
from groupconv.data import Images
from groupconv.recovery import Recovery
from groupconv.timing import Timing

pytestmark = pytest.mark.usefixtures("steady_clock")


def _outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(x)


@pytest.mark.parametrize("budget", ["1x", "100%", "100%macs", "100%params"])
def test_nothing_to_do_is_the_identity(budget: str) -> None:
    model, x = residual(), images()
    result = groupconv.optimize(model, x, budget=budget, recover="bn")
    assert not result.plan.layers
    assert_close(_outputs(result.model, x), _outputs(model, x), rtol=0, atol=1e-6)
    assert result.report["macs"]["before"] == result.report["macs"]["after"]


@pytest.mark.parametrize(("budget", "key"), [("70%macs", "macs"), ("70%params", "params")])
def test_budget_holds(budget: str, key: str, tmp_path: Path) -> None:
    model, x = residual(channels=32), images()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = groupconv.optimize(model, x, budget=budget, out=tmp_path)
    assert result.report[key]["after"] <= 0.7 * result.report[key]["before"]
    profile = groupconv.profile(result.model, x[:1], latency=False)
    assert getattr(profile, key) == result.report[key]["after"]
    assert result.plan.layers
    assert set(result.plan.reasons) == {"conv1", "conv2"}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} of the user's model was changed"


def test_planted_blocks_behind_hidden_permutations_are_found() -> None:
    torch.manual_seed(0)
    weight = torch.zeros(16, 16, 3, 3)
    rows, columns = torch.randperm(16), torch.randperm(16)
    for q in range(4):
        block = torch.randn(4, 4, 3, 3)
        weight[rows[4 * q : 4 * q + 4, None], columns[None, 4 * q : 4 * q + 4]] = block
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    x = torch.randn(64, 16, 14, 14)
    # The one layer is both the first and the last.
    result = groupconv.optimize(model, x, budget="40%macs", keep=())
    assert result.plan.layers["0"].groups == 4
    assert_close(_outputs(result.model, x), _outputs(model, x), rtol=1e-5, atol=1e-5)


def test_one_seed_and_one_table_give_one_plan() -> None:
    model, x = residual(channels=32), images()
    first = groupconv.optimize(model, x, budget="60%macs", seed=3)
    second = groupconv.optimize(model, x, budget="60%macs", seed=3)
    assert first.plan == second.plan
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_known_times_are_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = sys.modules["groupconv.targets.table"]
    measured = []

    def fast_enough(calls: dict[str, object], seconds: float, **_: object) -> dict[str, Timing]:
        measured.extend(calls)
        values = {name: 3.3e-3 if name.endswith("after") else 4e-3 for name in calls}
        return {name: Timing(value, value, value, 5) for name, value in values.items()}

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    model, x = residual(channels=32), images()
    monkeypatch.setattr(table, "interleave", fast_enough)
    first = groupconv.optimize(model, x, budget="1.2x", out=tmp_path)
    assert len(measured) == 4
    assert first.plan.layers
    monkeypatch.setattr(table, "interleave", forbidden)
    assert groupconv.optimize(model, x, budget="1.2x", out=tmp_path).plan == first.plan


def test_saved_network_loads_in_a_new_process(tmp_path: Path) -> None:
    model, x = residual(), images()
    result = groupconv.optimize(model, x, budget="60%macs", recover="bn", out=tmp_path / "out")
    torch.save({"x": x[:4], "y": _outputs(result.model, x[:4])}, tmp_path / "expected.pt")
    code = f"""
import sys, torch, groupconv
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from networks import residual
expected = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
net = groupconv.load({str(tmp_path / "out")!r}, residual(seed=99))
torch.testing.assert_close(net(expected["x"]), expected["y"], rtol=0, atol=1e-6)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_folded_shuffle_survives_saving(tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(5)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), groupconv.nn.ChannelShuffle(4), nn.Conv2d(16, 16, 1)
        ).eval()

    x = images()
    result = groupconv.optimize(build(), x, budget="100%macs", out=tmp_path)
    assert not any(isinstance(m, nn.ChannelShuffle) for m in result.model.modules())
    assert_close(_outputs(result.model, x), _outputs(build(), x), rtol=1e-5, atol=1e-5)
    loaded = groupconv.load(tmp_path, build())
    assert_close(_outputs(loaded, x), _outputs(build(), x), rtol=1e-5, atol=1e-5)


def test_distillation_trains_the_converted_network_only() -> None:
    model, x = residual(), images(128)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    # There is always something to learn: outputs that the original does not have.
    recover = Recovery(
        "3s",
        train=images(256, seed=1),
        loss=lambda student, teacher, labels: (student - teacher - 1).square().mean(),
    )
    plain = groupconv.optimize(model, x, budget="40%macs", recover="none")
    taught = groupconv.optimize(model, x, budget="40%macs", recover=recover)
    # The calibration images are the same: none of them is needed to judge by.
    assert plain.plan == taught.plan
    assert plain.report["recovery"] == []
    stages = {stage["stage"]: stage for stage in taught.report["recovery"]}
    assert list(stages) == ["batch norm", "blocks", "distil"]
    assert stages["distil"]["after"] < stages["batch norm"]["before"]
    assert "recover" in taught.report["seconds"]
    weights = zip(plain.model.parameters(), taught.model.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in weights)
    assert torch.isfinite(_outputs(taught.model, x)).all()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_last_batch_of_one_image_does_not_break_batch_norm() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 12), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten()
    ).eval()
    test = Images(images(4), None, "noise")
    for recover in ("bn", "1s"):
        result = groupconv.optimize(
            model,
            images(129),
            budget="99%macs",
            recover=recover,
            test=test,
            max_images=129,
            keep=(),
        )
        assert result.plan.layers
        assert torch.isfinite(_outputs(result.model, images(4))).all()


def test_one_image_is_not_enough() -> None:
    with pytest.raises(groupconv.DataError, match="1 images are left"):
        groupconv.optimize(residual(), images(2))


def test_labels_give_accuracy_with_its_interval() -> None:
    model, x = residual(), images()
    labels = _outputs(model, x).argmax(1)
    report = groupconv.optimize(model, Images(x, labels, "noise"), budget="60%macs").report
    assert report["accuracy"]["before"] == 1.0
    low, high = report["accuracy_interval"]["after"]
    assert low <= report["accuracy"]["after"] <= high
    assert report["test_images"] == 12


def test_kept_layers_stay_dense() -> None:
    result = groupconv.optimize(residual(), images(), budget="70%macs", keep=("conv1",))
    assert set(result.plan.layers) == {"conv2"}


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"budget": "fast"}, groupconv.ArgumentError, "budget='fast'"),
        ({"target": "abacus"}, groupconv.ArgumentError, "target='abacus'"),
        ({"recover": "soon"}, groupconv.ArgumentError, "recover='soon'"),
        ({"keep": ("conv9",)}, groupconv.ArgumentError, "keep='conv9'"),
        ({"task": "count"}, groupconv.ArgumentError, "task='count' must be one of auto, classify"),
        ({"task": "detect"}, groupconv.DataError, "task='detect': the model returns a Tensor"),
        ({"batch_size": 0}, groupconv.ArgumentError, "batch_size=0"),
        ({"budget": "1%macs"}, groupconv.BudgetError, "budget='1%macs'"),
        ({"data": torch.randn(8, 4, 12, 12)}, groupconv.DataError, r"\(1, 4, 12, 12\)"),
        ({"data": torch.full((8, 3, 12, 12), float("nan"))}, groupconv.DataError, "NaN"),
        ({"data": torch.randn(0, 3, 12, 12)}, groupconv.DataError, "no images"),
        ({"data": torch.randn(3, 12, 12)}, groupconv.DataError, r"\(1, 12, 12\)"),
    ],
)
def test_bad_input_is_one_error_and_loses_nothing(
    change: dict, kind: type[Exception], message: str, tmp_path: Path
) -> None:
    model = residual()
    groupconv.optimize(model, images(), budget="60%macs", out=tmp_path)
    kept = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    arguments = {"data": images(), "budget": "60%macs", "out": tmp_path, **change}
    with pytest.raises(kind, match=message):
        groupconv.optimize(model, arguments.pop("data"), **arguments)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name in kept} == kept
    left = {p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob(".*")}
    # What was finished before a budget proved too tight serves the next one.
    unfinished = {".unfinished"} if kind is groupconv.BudgetError else set()
    assert left <= unfinished, "temporary files left behind"


def test_bad_weights_and_models_are_named() -> None:
    model = residual()
    with torch.no_grad():
        model.conv2.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(groupconv.DataError, match=r"conv2\.weight"):
        groupconv.optimize(model, images())
    with pytest.raises(groupconv.ArgumentError, match="no convolution"):
        groupconv.optimize(nn.Linear(4, 4), images())


@pytest.mark.parametrize("folder", ["/proc/groupconv", "{file}/out"])
def test_output_that_cannot_be_written_is_found_before_the_work(
    folder: str, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    out = folder.format(file=file)
    with pytest.raises(groupconv.DataError, match="can't be written"):
        groupconv.optimize(residual(), images(), out=out)
    assert file.read_text() == "in the way"


def test_half_written_folders_are_refused(tmp_path: Path) -> None:
    groupconv.optimize(residual(), images(), budget="60%macs", out=tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(groupconv.DataError, match="not a whole safetensors file"):
        groupconv.load(tmp_path, residual())
    weights.unlink()
    with pytest.raises(groupconv.DataError, match="did not finish"):
        groupconv.load(tmp_path, residual())


def test_report_is_plain_json_and_the_page_stands_alone(tmp_path: Path) -> None:
    result = groupconv.optimize(residual(), images(), budget="60%macs", out=tmp_path)
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["macs"] == result.report["macs"]
    assert {"processor", "threads", "torch"} <= stored["machine"].keys()
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "src=" not in page
    assert "<script" not in page
    assert groupconv.Plan.from_json((tmp_path / "plan.json").read_text()) == result.plan
