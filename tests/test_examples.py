"""What examples/ has runs as written, on a few images."""

import json
from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from examples import cifar10


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
