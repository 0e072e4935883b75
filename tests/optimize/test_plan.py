"""Plans as text, and networks rebuilt from their files."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import assert_close
from networks import images, residual
from safetensors.torch import save_file
from torch import Tensor, nn

from groupconv.errors import DataError
from groupconv.optimize.convert import Converted, convert
from groupconv.optimize.partition import Partition
from groupconv.optimize.plan import WEIGHTS, Plan, load, save_weights
from groupconv.optimize.structure import Grouped, Pair
from groupconv.optimize.trace import trace

FORWARD = tuple(range(16))
SHUFFLED = (7, 2, 15, 0, 9, 4, 11, 6, 1, 12, 3, 14, 5, 8, 13, 10)
# The second layer's outputs are tied to the first one's inputs: explicit permutations there.
LAYERS = {
    "conv2": Partition(4, SHUFFLED, FORWARD),
    "conv1": Partition(2, SHUFFLED, SHUFFLED[::-1]),
}
OTHERS = {"conv2": Pair(8, 2, 4, True), "stem.0": Grouped(1), "conv1": Grouped(4)}
PLAN = Plan(LAYERS, {"conv1": "2 groups", "stem": "kept: «keep»"}, "2x", "eager", 3)


def converted() -> Converted:
    model = residual()
    return convert(model, trace(model, (images(2),)), LAYERS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    done = converted()
    save_weights(tmp_path, done)
    return tmp_path


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    return model(images(4))


@pytest.mark.parametrize("plan", [PLAN, Plan({}), Plan(OTHERS), Plan({**LAYERS, **OTHERS})])
def test_round_trip(plan: Plan) -> None:
    read = Plan.from_json(plan.to_json())
    assert read == plan
    assert list(read.layers) == list(plan.layers)  # the order is part of the plan
    assert read.to_json() == plan.to_json()


def test_one_line_per_list() -> None:
    lines = PLAN.to_json().splitlines()
    assert f'   "in_order": {list(SHUFFLED)},' in lines
    assert '   "groups": 4,' in lines


def test_edited_by_hand() -> None:
    values = json.loads(PLAN.to_json())
    del values["layers"]["conv1"], values["reasons"]
    values["layers"]["conv2"] = {"out_order": [1, 0], "in_order": [0, 1], "groups": "2"}
    values["note"] = "mine"
    assert Plan.from_json(json.dumps(values)) == Plan(
        {"conv2": Partition(2, (0, 1), (1, 0))}, {}, "2x", "eager", 3
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"format": 1', '"format": 2', "format 2 must be 1"),
        ('"format": 1,', "", "not a plan of groupconv: KeyError"),
        ('"groups": 4', '"groups": null', "not a plan of groupconv"),
        ('"groups": 4', '"groups": "many"', "not a plan of groupconv"),
        ('"groups": 4', '"parts": 4', "not a plan of groupconv: KeyError"),
        ("[7, 2, ", "[7, 7, ", "conv2: in_order must hold each of 0 .. C-1 exactly once"),
        ("[7, 2, ", "[2, ", "conv2: in_order must hold each of 0 .. C-1 exactly once"),
        ("14, 15]", "14, 16]", "conv2: out_order must hold each of 0 .. C-1 exactly once"),
        ("14, 15]", "14, -1]", "conv2: out_order must hold each of 0 .. C-1 exactly once"),
        ("14, 15]", '14, "x"]', "not a plan of groupconv"),
        ('"seed": 3', '"seed": [3]', "not a plan of groupconv"),
    ],
)
def test_wrong_plans(old: str, new: str, message: str) -> None:
    text = PLAN.to_json()
    assert old in text
    with pytest.raises(DataError, match=re.escape(message)):
        Plan.from_json(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            {"structure": "ghost", "groups": 2},
            "structure='ghost' must be one of grouped, narrowed, pair",
        ),
        ({"structure": "pair", "groups": 2}, "not a plan of groupconv: KeyError('middle')"),
        ({"groups": 2, "in_order": [0, 1]}, "conv1: in_order alone is given; give both orders"),
        ({"groups": 2, "out_order": [0, 1]}, "conv1: out_order alone is given; give both orders"),
    ],
)
def test_layers_that_are_no_structure(layer: dict[str, object], message: str) -> None:
    values = json.loads(PLAN.to_json())
    values["layers"]["conv1"] = layer
    with pytest.raises(DataError, match=re.escape(message)):
        Plan.from_json(json.dumps(values))


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", '{"format": 1}', PLAN.to_json()[:-5]])
def test_text_that_is_no_plan(text: str) -> None:
    with pytest.raises(DataError, match="plan: not a plan of groupconv"):
        Plan.from_json(text)


def test_load_in_a_new_process(folder: Path) -> None:
    code = """
import sys, torch
from networks import images, residual
from groupconv import load
model = load(sys.argv[1], residual(seed=9).train())
assert not any(m.training for m in model.modules())
with torch.no_grad():
    torch.save(model(images(4)), sys.argv[2])
"""
    result = folder / "outputs.pt"
    subprocess.run(
        [sys.executable, "-c", code, str(folder), str(result)],
        check=True,
        env={"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )
    assert_close(torch.load(result), outputs(converted().model), rtol=1e-6, atol=1e-6)


def test_load_from_the_file_itself(folder: Path) -> None:
    model = load(folder / WEIGHTS, residual(seed=9))
    assert_close(outputs(model), outputs(converted().model), rtol=0, atol=0)
    assert [m.groups for m in (model.conv1.conv, model.conv2)] == [2, 4]
    assert [path.name for path in folder.iterdir()] == [WEIGHTS]


def test_missing(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="does not exist: not an output folder, or its run did"):
            load(path, residual())


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated(folder: Path, keep: int) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=f"{path}: not a whole safetensors file"):
        load(folder, residual())


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_foreign_safetensors(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file(residual().state_dict(), str(tmp_path / WEIGHTS), metadata)
    with pytest.raises(DataError, match="holds weights, but was not written by groupconv"):
        load(tmp_path, residual())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # One that lacks a layer, one whose layer is another, two of other sizes.
        (lambda m: delattr(m, "conv2"), "the model has no layer 'conv2', which the plan converts"),
        (lambda m: setattr(m, "conv2", nn.ReLU()), "layer 'conv2' is a ReLU"),
        (lambda m: setattr(m, "conv2", nn.Conv2d(16, 7, 3)), "weights of another network: conv2"),
        (lambda m: setattr(m, "conv2", nn.Conv2d(8, 8, 3)), "weights of another network: .*conv2"),
        (lambda m: setattr(m, "fc", nn.Linear(16, 6)), "weights of another network: .*fc"),
        (lambda m: setattr(m, "extra", nn.Linear(1, 1)), "weights of another network: .*extra"),
        (lambda m: delattr(m, "fc"), "weights of another network: .*fc"),
    ],
)
def test_another_network(folder: Path, change: object, message: str) -> None:
    model = residual()
    change(model)
    with pytest.raises(DataError, match=f"(?s){message}"):
        load(folder, model)
