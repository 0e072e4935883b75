"""CIFAR-10 from the images to the frontier: train, optimize under several budgets, recover, plot.

    python -m examples.cifar10 --data FOLDER --out runs/cifar10 --budgets 50%,40%,25% --seeds 3

FOLDER has ``train/CLASS/*`` and ``test/CLASS/*``, or is the root of torchvision's CIFAR10. A VGG
is trained on it first, or another network taken by ``--model``. Each seed takes 1,000 of the
training images to plan with; what is lost is learned again from all of them, with their labels, or,
by ``--unlabelled``, from those 1,000 without. Started again, it goes on where it was interrupted.

``cifar10.json`` has every network; ``cifar10.png`` the mean accuracy against the measured speed,
with bars from the least to the most of the seeds.
"""

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.transforms import v2

import groupconv
from benchmarks.provenance import commit, versions
from groupconv.cli.models import load_model
from groupconv.timing import machine

CALIBRATION, BATCH, RATE = 1_000, 128, 3e-3


def main(arguments: Sequence[str] | None = None) -> None:
    options = _arguments(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    images, labels = read(options.data, "train", options.scale)
    test = read(options.data, "test", options.scale)
    if options.model:
        net = load_model(options.model, options.weights).eval()
    else:
        net = trained(options.out / "net.safetensors", images, labels, options.epochs)
    reports = [
        report
        for seed in range(options.seeds)
        for report in frontier(net, (images, labels), test, options, seed)
    ]
    record = {
        "machine": machine(),
        **commit(),
        "versions": versions(["torch", "torchvision", "accelerate"]),
        "settings": {
            key: str(value) for key, value in vars(options).items() if key not in ("data", "out")
        },
        "training_images": len(images),
        "test_images": len(test[0]),
        "networks": [summary(report) for report in reports],
    }
    (options.out / "cifar10.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(record["networks"], options).savefig(options.out / "cifar10.png", dpi=120)


def read(folder: Path, split: str, scale: float) -> tuple[Tensor, Tensor]:
    """Images ``(N, 3, 32, 32)`` from 0 to ``scale``, and labels ``(N,)``."""
    to_tensor = v2.PILToTensor()
    found: Any = (
        ImageFolder(folder / split, to_tensor)
        if (folder / split).is_dir()
        else CIFAR10(folder, split == "train", to_tensor)
    )
    loader = torch.utils.data.DataLoader(found, 1_000, num_workers=os.cpu_count() or 1)
    batches = list(loader)
    images = torch.cat([batch for batch, _ in batches]).float() * (scale / 255)
    return images, torch.cat([labels for _, labels in batches])


def vgg() -> nn.Sequential:
    """Six 3x3 convolutions and three linear layers, 57M multiply-adds."""

    def block(reads: int, writes: int) -> list[nn.Module]:
        return [nn.Conv2d(reads, writes, 3, bias=False), nn.BatchNorm2d(writes), nn.ReLU()]

    return nn.Sequential(
        *block(3, 64), *block(64, 64), nn.MaxPool2d(2),
        *block(64, 128), *block(128, 128), nn.MaxPool2d(2),
        *block(128, 64), *block(64, 64), nn.Flatten(),
        nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 10),
    )  # fmt: skip


def trained(path: Path, images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    """The network at a path, trained first if there is none."""
    torch.manual_seed(0)
    net = vgg()
    if path.exists():
        net.load_state_dict(load_file(path))
        return net.eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net.to(device).train()
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=0.05)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    augment = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(32, 4, padding_mode="reflect")])
    for epoch in range(epochs):
        total = 0.0
        for index in torch.randperm(len(images))[: steps // epochs * BATCH].split(BATCH):
            # Moved in a few parts: each image by itself would take longer than the learning.
            x = torch.cat([augment(part) for part in images[index].chunk(16)])
            loss = F.cross_entropy(net(x.to(device)), labels[index].to(device), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1} of {epochs}: loss {total / (steps // epochs):.4f}", flush=True)
    net.cpu().eval()
    save_file(net.state_dict(), path)
    return net


def frontier(
    net: nn.Module,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    options: argparse.Namespace,
    seed: int,
) -> list[dict[str, Any]]:
    """A report for each budget; of a sweep that was done before as it was written."""
    folder = options.out / f"seed{seed}"
    written = folder / "frontier.json"
    if written.exists():
        reports: list[dict[str, Any]] = json.loads(written.read_text())
        return reports
    generator = torch.Generator().manual_seed(seed)
    few = train[0][torch.randperm(len(train[0]), generator=generator)[:CALIBRATION]]
    results = groupconv.sweep(
        net,
        few,
        budgets=options.budgets.split(","),
        target=options.target,
        keep=["first"],
        recover=groupconv.Recovery(options.recover, train=None if options.unlabelled else train),
        test=test,
        out=folder,
        seed=seed,
    )
    return [result.report for result in results]


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a report."""
    layers = {layer["name"]: layer["structure"] for layer in report["layers"]}
    asked = {key: report["settings"][key] for key in ("budget", "seed")}
    names = (
        "accuracy", "accuracy_before_recovery", "latency", "speedup", "macs", "params", "seconds",
        "recovery",
    )  # fmt: skip
    return asked | {name: report[name] for name in names} | {"layers": layers}


def plot(networks: Sequence[dict[str, Any]], options: argparse.Namespace) -> Figure:
    """Accuracy against speed: a point for each budget, refitted and recovered."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    before = 100 * networks[0]["accuracy"]["before"]
    axes.axhline(before, color="#8a8f98", lw=1, ls="--", label=f"original, {before:.2f}%")
    by_budget = [
        [found for found in networks if found["budget"] == budget]
        for budget in options.budgets.split(",")
    ]
    for label, colour, read_accuracy in (
        ("refitted", "#e0a030", lambda found: found["accuracy_before_recovery"]),
        (f"recovered, {options.recover}", "#0b6e4f", lambda found: found["accuracy"]["after"]),
    ):
        heights = [[100 * read_accuracy(found) for found in some] for some in by_budget]
        speeds = [[found["speedup"] for found in some] for some in by_budget]
        axes.errorbar(
            *([statistics.mean(some) for some in values] for values in (speeds, heights)),
            xerr=_spread(speeds), yerr=_spread(heights), fmt="o-", capsize=3, color=colour,
            label=label,
        )  # fmt: skip
    axes.set_xlabel(f"times faster, measured on {options.target}")
    axes.set_ylabel("top-1 accuracy, %")
    axes.set_title(f"CIFAR-10, {len(by_budget[0])} seeds")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure


def _spread(values: Sequence[Sequence[float]]) -> list[list[float]]:
    """What the least and the most are away from the mean."""
    means = [statistics.mean(some) for some in values]
    return [
        [mean - min(some) for mean, some in zip(means, values, strict=True)],
        [max(some) - mean for mean, some in zip(means, values, strict=True)],
    ]


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="of an original that is trained: as for groupconv optimize")
    parser.add_argument("--weights", type=Path, help="of --model")
    parser.add_argument("--scale", type=float, default=1.0, help="what white is to the network")
    parser.add_argument("--epochs", type=int, default=20, help="to train the original for")
    parser.add_argument("--budgets", default="50%,40%,25%")
    parser.add_argument("--target", default="native")
    parser.add_argument("--recover", default="10min", help="for each network")
    parser.add_argument("--unlabelled", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
