"""Train the network of ``groupconv demo`` on the 60,000 training images of Fashion-MNIST.

    python examples/train_fashion_mnist.py --data FOLDER --out net.safetensors

FOLDER has the four ``*-ubyte.gz`` files (as Debian's package dataset-fashion-mnist installs). About
half an hour on two CPU cores. Weights are kept in half precision; the accuracy printed last is that
of the file as written.
"""

import argparse
import gzip
import shutil
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.datasets import FashionMNIST

from groupconv.models import fashion_resnet


def read(folder: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) in [0, 1] and labels (N,) of one split."""
    with tempfile.TemporaryDirectory() as root:
        raw = Path(root) / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for path in folder.glob("*-ubyte.gz"):
            with gzip.open(path) as src, (raw / path.stem).open("wb") as dst:
                shutil.copyfileobj(src, dst)
        split = FashionMNIST(root, train=train)
        return split.data[:, None].float() / 255, split.targets


def augment(x: Tensor) -> Tensor:
    """Mirror half of the images and shift each by up to two pixels."""
    n = len(x)
    x = torch.where(torch.rand(n, 1, 1, 1) < 0.5, x.flip(3), x)
    windows = F.pad(x, (2, 2, 2, 2)).unfold(2, 28, 1).unfold(3, 28, 1)
    return windows[torch.arange(n), :, torch.randint(5, (n,)), torch.randint(5, (n,))]


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    hits = sum(
        int((model(x).argmax(1) == y).sum())
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    return hits / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    images, labels = read(args.data, train=True)
    test = read(args.data, train=False)
    model = fashion_resnet().to(memory_format=torch.channels_last)
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.SGD(
        [{"params": decay, "weight_decay": 5e-4}, {"params": plain}],
        lr=0.1,
        momentum=0.9,
        nesterov=True,
    )
    steps = args.epochs * (len(images) // args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=steps)
    for epoch in range(args.epochs):
        start, model = time.perf_counter(), model.train()
        for batch in torch.randperm(len(images)).split(args.batch_size):
            if len(batch) < args.batch_size:
                continue
            x = augment(images[batch]).to(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(x), labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1}: test {accuracy(model, *test):.4f}, {seconds:.0f} s", flush=True)

    state = {
        name: (value.half() if value.ndim > 1 else value).contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(state, args.out)
    model.load_state_dict(load_file(args.out))
    print(f"{args.out}: {args.out.stat().st_size} bytes, test {accuracy(model, *test):.4f}")


if __name__ == "__main__":
    main()
