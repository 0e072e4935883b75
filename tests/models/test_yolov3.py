"""YOLO v3: its published size, its boxes, and weights of others."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import assert_close
from torch import Tensor, nn

import groupconv
from groupconv.errors import ArgumentError, DataError
from groupconv.models.yolov3 import YOLOv3, decode, detect
from groupconv.models.yolov3_weights import load_darknet, load_ultralytics
from groupconv.optimize import profile
from groupconv.optimize.partition import Partition
from groupconv.optimize.plan import Plan


def small(seed: int = 0, width: float = 0.125) -> YOLOv3:
    torch.manual_seed(seed)
    model = YOLOv3(num_classes=3, width=width).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def test_size() -> None:
    """Darknet's file has 248,007,048 bytes and its log 65.88 billion operations at 416 pixels."""
    with torch.device("meta"):
        model = YOLOv3().eval()
    numbers = [t for k, t in model.state_dict().items() if not k.endswith("num_batches_tracked")]
    assert 20 + 4 * sum(t.numel() for t in numbers) == 248_007_048
    found = profile(model, torch.empty(1, 3, 416, 416, device="meta"), latency=False).macs
    assert 2 * found / 1e9 == pytest.approx(65.88, abs=0.05)


def test_maps() -> None:
    maps = small()(torch.rand(2, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(2, 24, 2, 3), (2, 24, 4, 6), (2, 24, 8, 12)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes=0"),
        ({"width": 0.1}, "width=0.1"),
        ({"width": 0}, "width=0"),
    ],
)
def test_illegal_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        YOLOv3(**arguments)


def test_boxes_by_hand() -> None:
    """The second anchor of the middle head, at column 2 of row 1."""
    maps = [torch.full((1, 24, n, n), -20.0) for n in (1, 2, 4)]
    place = maps[1][0, 8:16, 1, 0]
    place[:4] = torch.tensor([0.0, np.log(3.0), np.log(2.0), 0.0])
    place[4:] = torch.tensor([20.0, -20.0, 20.0, -20.0])
    corners, objects, classes = decode(maps)
    assert corners.shape == (1, 3 * (1 + 4 + 16), 4)
    assert classes.shape == (1, 3 * (1 + 4 + 16), 3)
    assert int((objects > 0.5).sum()) == 1
    (found,) = detect(maps)
    x, y, w, h = 0.5 * 16, (1 + 0.75) * 16, 2 * 62, 45
    expected = torch.tensor([[x - w / 2, y - h / 2, x + w / 2, y + h / 2]])
    assert_close(found["boxes"], expected, rtol=1e-5, atol=1e-4)
    assert found["labels"].tolist() == [1]
    assert found["scores"].item() == pytest.approx(1, abs=1e-6)


def test_lesser_boxes_go() -> None:
    """Of two on the same place and class the better stays; another class is another object."""
    maps = [torch.full((1, 24, n, n), -20.0) for n in (1, 2, 4)]
    for anchor, score, label in ((0, 5.0, 0), (1, 3.0, 0), (2, 4.0, 2)):
        place = maps[0][0, 8 * anchor : 8 * anchor + 8, 0, 0]
        # All of them 100 pixels wide and high.
        sizes = torch.tensor(((116, 90), (156, 198), (373, 326))[anchor])
        place[:2], place[2:4], place[4] = 0.0, (100 / sizes).log(), score
        place[5 + label] = 20.0
    (found,) = detect(maps)
    assert found["labels"].tolist() == [0, 2]
    assert found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True)


def darknet_file(model: YOLOv3, path: Path, version: tuple[int, int] = (0, 2)) -> None:
    """Written as Darknet does: layer by layer, as the network runs."""
    order: list[nn.Module] = []
    leaves = (nn.Conv2d, nn.BatchNorm2d)
    hooks = [
        m.register_forward_hook(lambda module, args, output: order.append(module))
        for m in model.modules()
        if isinstance(m, leaves)
    ]
    model(torch.rand(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    numbers: list[Tensor] = []
    for module, following in zip(order, [*order[1:], None], strict=True):
        if isinstance(module, nn.Conv2d):
            if isinstance(following, nn.BatchNorm2d):
                numbers += [following.bias, following.weight]
                numbers += [following.running_mean, following.running_var]
            else:
                numbers.append(module.bias)
            numbers.append(module.weight)
    seen = struct.pack("<q" if version[0] * 10 + version[1] >= 2 else "<i", 32_013_312)
    flat = torch.cat([n.detach().flatten() for n in numbers]).numpy()
    path.write_bytes(struct.pack("<3i", *version, 5) + seen + flat.astype("<f4").tobytes())


@pytest.mark.parametrize("version", [(0, 1), (0, 2), (1, 0)])
def test_darknet_weights(version: tuple[int, int], tmp_path: Path) -> None:
    trained, model = small(), small(seed=1)
    darknet_file(trained, tmp_path / "net.weights", version)
    load_darknet(model, tmp_path / "net.weights")
    x = torch.rand(1, 3, 64, 64)
    for mine, theirs in zip(model(x), trained(x), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("damage", ["missing", "empty", "short", "long", "classes"])
def test_damaged_darknet_weights(damage: str, tmp_path: Path) -> None:
    path, model = tmp_path / "net.weights", small()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    darknet_file(small(seed=1), path)
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "classes":
        model = YOLOv3(num_classes=4, width=0.125)
        before = {k: t.clone() for k, t in model.state_dict().items()}
    else:
        path.write_bytes({"empty": b"", "short": content[:-4], "long": content + b"1234"}[damage])
    with pytest.raises(DataError, match="weights="):
        load_darknet(model, path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def theirs(model: YOLOv3) -> dict[str, Tensor]:
    """As ultralytics names and orders them: the heads' outputs last, the finest first."""
    state: dict[str, Tensor] = {}
    heads = [nn.Sequential(head.boxes) for head in reversed(model.heads)]
    number = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and not name.endswith("boxes"):
            state[f"model.{number}.conv.weight"] = module.weight
        elif isinstance(module, nn.BatchNorm2d):
            for key, tensor in module.state_dict().items():
                state[f"model.{number}.bn.{key}"] = tensor
            number += 1
    state[f"model.{number}.anchors"] = torch.zeros(3, 3, 2)
    for i, head in enumerate(heads):
        state |= {f"model.{number}.m.{i}.{key[2:]}": t for key, t in head.state_dict().items()}
    return state


def test_ultralytics_weights() -> None:
    trained, model = small(), small(seed=1)
    for module in trained.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    state = theirs(trained)
    load_ultralytics(model, state)
    x = torch.rand(1, 3, 64, 64)
    for mine, other in zip(model(x), trained(x), strict=True):
        assert torch.equal(mine, other)
    state.popitem()
    with pytest.raises(DataError, match=r"not the \d+ of YOLOv3 with 3 classes"):
        load_ultralytics(model, state)


def test_conversion_leaves_the_heads() -> None:
    """At zero compression the boxes stay; cut into groups, the heads' outputs are as they were."""
    torch.manual_seed(0)
    model, x = small(width=0.0625), torch.rand(12, 3, 64, 64)
    with torch.no_grad():
        for head in model.heads:
            head.boxes.bias.fill_(0.0)
    same = groupconv.apply(model, x, groupconv.plan(model, x, budget="100%macs", keep=("*",)))
    for mine, other in zip(same.model(x[:2]), model(x[:2]), strict=True):
        assert_close(mine, other, rtol=1e-4, atol=1e-4)
    for mine, other in zip(detect(same.model(x[:2])), detect(model(x[:2])), strict=True):
        assert_close(mine["boxes"], other["boxes"], rtol=1e-3, atol=1e-2)
        assert torch.equal(mine["labels"], other["labels"])
    halves = {
        "stages.4.1.conv2.0": Partition.identity(2, 32, 64),
        "heads.2.body.1.0": Partition.identity(2, 8, 16),
    }
    grouped = groupconv.apply(model, x, Plan(halves)).model
    assert [grouped.get_submodule(name).groups for name in halves] == [2, 2]
    # Seventy layers take minutes: those of one stage and one head stand for them.
    kept = [f"{name}*" for name in ("stem", "stages.[0-3]", "heads.[01]")]
    cut = groupconv.optimize(model, x, budget="90%macs", keep=[*kept, "last"])
    assert any(name.startswith("heads.2") for name in cut.plan.layers)
    assert not any(name.endswith("boxes") for name in cut.plan.layers)
    for changed in (grouped, cut.model):
        assert [m.shape for m in changed(x[:1])] == [m.shape for m in model(x[:1])]
