"""What examples/ has runs as written, on a few images."""

import json
from pathlib import Path

import pytest
import torch
from compare import assert_close
from torchvision.transforms.functional import to_pil_image

from examples import cifar10, detect_shapes, draw_clothes


def folder(root: Path, per_class: int) -> Path:
    """Two classes that colours tell apart."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", per_class), ("test", per_class // 2)):
        for number, name in enumerate(("blue", "red")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = torch.randint(0, 128, (3, 32, 32), generator=generator, dtype=torch.uint8)
                image[2 * (1 - number)] += 127
                to_pil_image(image).save(root / split / name / f"{i}.png")
    return root


@pytest.mark.slow
def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "CALIBRATION", 48)
    monkeypatch.setattr(cifar10, "BATCH", 16)
    data, out = folder(tmp_path / "data", 40), tmp_path / "out"
    arguments = ["--data", str(data), "--out", str(out), "--epochs", "2", "--target", "eager"]
    arguments += ["--budgets", "90%macs,60%macs", "--seeds", "1", "--recover", "2s"]
    cifar10.main(arguments)
    record = json.loads((out / "cifar10.json").read_text())
    assert [found["budget"] for found in record["networks"]] == ["90%macs", "60%macs"]
    assert {"commit", "machine", "versions", "settings"} <= record.keys()
    assert str(tmp_path) not in json.dumps(record)
    for found, share in zip(record["networks"], (0.9, 0.6), strict=True):
        assert found["macs"]["after"] <= share * found["macs"]["before"]
        assert found["accuracy"]["after"] > 0.9
        assert found["recovery"][-1]["stage"] == "distil"
    assert (out / "cifar10.png").stat().st_size > 10_000
    # What is done is read, not done again.
    monkeypatch.setattr("groupconv.sweep", None)
    cifar10.main(arguments)
    assert json.loads((out / "cifar10.json").read_text()) == record


def test_shapes_lie_in_their_boxes() -> None:
    images, targets = detect_shapes.draw(20, 64, [], seed=3)
    assert torch.equal(images, detect_shapes.draw(20, 64, [], seed=3)[0])
    assert not torch.equal(images, detect_shapes.draw(20, 64, [], seed=4)[0])
    assert images.shape == (20, 3, 64, 64)
    assert 0 <= images.min() < images.max() <= 1
    seen = set()
    for image, target in zip(images, targets, strict=True):
        for (left, top, right, bottom), label in zip(
            target["boxes"].round().int().tolist(), target["labels"].tolist(), strict=True
        ):
            assert 0 <= left < right <= 64
            assert 0 <= top < bottom <= 64
            # The lower middle is of one colour in every shape.
            row, middle = (top + 2 * bottom) // 3, (left + right) // 2
            inside = image[:, row, middle - 1 : middle + 1]
            assert (inside == inside[:, :1]).all()
            seen.add(detect_shapes.SHAPES[label])
    assert seen == set(detect_shapes.SHAPES)


def test_maps_of_least_loss_are_the_objects() -> None:
    _, targets = detect_shapes.draw(4, 128, [], seed=5)
    maps = [torch.zeros(4, 3 * 8, 128 // s, 128 // s) for s in detect_shapes.STRIDES]
    for found in maps:
        found.requires_grad_()
    optimizer = torch.optim.Adam(maps, 0.1)
    for _ in range(200):
        optimizer.zero_grad()
        detect_shapes.yolo_loss(maps, targets).backward()
        optimizer.step()
    found = detect_shapes.detect([x.detach() for x in maps])
    assert [x["labels"].sort().values.tolist() for x in found] == [
        x["labels"].sort().values.tolist() for x in targets
    ]
    assert detect_shapes.precision(found, targets) == {
        "map": pytest.approx(1, abs=0.05), "map_50": pytest.approx(1)
    }  # fmt: skip


@pytest.mark.slow
def test_detect_shapes(tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for number in range(3):
        noise = torch.rand(3, 80, 100, generator=torch.Generator().manual_seed(number))
        to_pil_image(noise).save(photos / f"{number}.png")
    detect_shapes.main(
        [
            "--photos", str(photos), "--out", str(out), "--images", "64", "--size", "64",
            "--width", "0.0625", "--epochs", "2", "--budget", "90%macs", "--target", "eager",
            "--recover", "2s",
        ]
    )  # fmt: skip
    record = json.loads((out / "shapes.json").read_text())
    assert (record["photos"], record["test_images"]) == (3, 8)
    assert record["macs"]["after"] <= 0.9 * record["macs"]["before"]
    assert {"before", "after"} == record["precision"].keys()
    assert 0 <= record["found_again"]["f1"] <= 1
    assert str(tmp_path) not in json.dumps(record)
    assert (out / "shapes.png").stat().st_size > 10_000


@pytest.mark.slow
def test_draw_clothes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw_clothes, "CALIBRATION", 64)
    arguments = [
        "stylegan2", "--out", str(tmp_path), "--channels", "16", "--steps", "2",
        "--budget", "80%macs", "--target", "eager", "--recover", "2s",
    ]  # fmt: skip
    draw_clothes.main(arguments)
    record = json.loads((tmp_path / "clothes.json").read_text())
    assert record["macs"]["after"] <= 0.8 * record["macs"]["before"]
    assert record["psnr"] > 20
    apart = record["feature_distance"]
    assert 0 < apart["optimized"] < apart["of_other_latents"]
    assert str(tmp_path) not in json.dumps(record)
    assert (tmp_path / "clothes.png").stat().st_size > 10_000


def test_images_are_apart_by_their_features() -> None:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    near = (images + 0.01 * torch.randn(images.shape)).clamp(0, 1)
    assert draw_clothes.distance(images, images) == 0
    assert 0 < draw_clothes.distance(images, near) < draw_clothes.distance(images, images.flip(0))


def test_what_draws_is_the_average() -> None:
    """Its energies are those of its own weights, not an average of energies."""
    options = draw_clothes._arguments(
        ["stylegan2", "--out", "unused", "--steps", "3", "--channels", "8"]
    )
    net, _ = draw_clothes._generator(options)
    average = draw_clothes.trained(net, options)
    assert not average.training
    layer = average.get_submodule("first.modulated")
    assert not torch.equal(layer.conv.weight, net.get_submodule("first.modulated.conv").weight)
    assert_close(layer.energy, layer._energy(), rtol=1e-6, atol=0)
    latents, classes = draw_clothes.inputs("stylegan2", 12)
    assert classes.argmax(1).tolist() == [*range(10), 0, 1]
    images = draw_clothes.images(average, latents)
    assert images.shape == (12, 3, 32, 32)
    assert 0 <= images.min() < images.max() <= 1
