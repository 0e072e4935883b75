"""A generator from images to a faster one: BigGAN or StyleGAN2 draws clothes.

    python -m examples.draw_clothes biggan --out runs/biggan --budget 60% --recover 2min
    python -m examples.draw_clothes stylegan2 --out runs/stylegan2 --budget 60% --recover 2min

A generator of few channels learns from the 8,000 images of Fashion-MNIST that come with the
package, against a critic, in minutes on a CPU; it is optimized on latents, and both networks draw
the same ones. How alike their images are: the signal-to-noise ratio, and the distance of the
features that the classifier of ``groupconv demo`` sees in them.

``clothes.json`` has the figures, ``clothes.png`` images before and, below each row, after.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.utils import make_grid, save_image

import groupconv
from benchmarks.provenance import commit, versions
from groupconv.data.sample import fashion_mnist, trained_fashion_resnet
from groupconv.models.biggan import BigGAN
from groupconv.models.stylegan2 import StyleGAN2
from groupconv.timing import machine

CLASSES, SIDE = 10, 32
# Of BigGAN's last block, and of StyleGAN2's widest layers.
CHANNELS = {"biggan": 8, "stylegan2": 64}
BATCH, RATE, CRITIC_RATE, AVERAGED = 32, 2e-4, 4e-4, 0.995
CALIBRATION, TEST = 512, 256
ROWS, COLUMNS = 2, 10


def main(arguments: Sequence[str] | None = None) -> None:
    options = _arguments(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    net, keep = _generator(options)
    path = options.out / "net.safetensors"
    if path.exists():
        net.load_state_dict(load_file(path))
    else:
        net = trained(net, options)
        save_file(net.state_dict(), path)
    torch.manual_seed(options.seed + 1)
    result = groupconv.optimize(
        net.eval(),
        inputs(options.generator, CALIBRATION)[0],
        budget=options.budget,
        target=options.target,
        keep=keep,
        recover=options.recover,
        task="generate",
        out=options.out / "optimized",
        seed=options.seed,
    )
    latents, _ = inputs(options.generator, TEST)
    before, after = (images(some, latents) for some in (net, result.model))
    noise = float((before - after).square().mean())
    record = {
        "machine": machine(),
        **commit(),
        "versions": versions(["torch", "torchvision"]),
        "settings": {key: str(value) for key, value in vars(options).items() if key != "out"},
        "psnr": -10 * float(torch.tensor(noise).log10()),
        "feature_distance": {
            "optimized": distance(before, after),
            "of_other_latents": distance(before, before.roll(1, 0)),
        },
        **{name: result.report[name] for name in ("latency", "speedup", "macs", "params")},
    }
    (options.out / "clothes.json").write_text(json.dumps(record, indent=1) + "\n")
    save_image(picture(before, after), options.out / "clothes.png")
    apart = record["feature_distance"]
    print(
        f"{record['speedup']:.2f}x faster, {record['psnr']:.1f} dB, features "
        f"{apart['optimized']:.3f} apart; those of other latents {apart['of_other_latents']:.3f}"
    )


def _generator(options: argparse.Namespace) -> tuple[nn.Module, list[str]]:
    """The network, and the layers to keep: those that read no image."""
    channels = options.channels or CHANNELS[options.generator]
    if options.generator == "biggan":
        return BigGAN(CLASSES, channels), ["first", "last", "*.gain", "*.bias"]
    return StyleGAN2(SIDE, channels / 512), ["first", "mapping.*", "*.affine"]


def inputs(generator: str, count: int) -> tuple[Tensor, Tensor]:
    """What a generator reads for so many images, and their classes as one-hot, ten in turn."""
    classes = F.one_hot(torch.arange(count) % CLASSES, CLASSES).float()
    if generator == "stylegan2":
        return torch.randn(count, StyleGAN2.latent_dim), classes
    return torch.cat([torch.randn(count, BigGAN.latent_dim), classes], 1), classes


class Critic(nn.Module):
    """Scores images of 32 x 32 pixels, and larger ones as they are at that size.

    Args:
        conditional: whether it knows the classes: their projection is added to the score (Miyato
            and Koyama 2018, https://arxiv.org/abs/1802.05637).
    """

    def __init__(self, conditional: bool) -> None:
        super().__init__()
        widths = (3, 48, 96, 192)
        layers: list[nn.Module] = []
        for reads, writes in itertools.pairwise(widths):
            layers += [spectral_norm(nn.Conv2d(reads, writes, 4, 2, 1)), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers)
        self.score = spectral_norm(nn.Linear(widths[-1] * 16, 1))
        self.classes = (
            spectral_norm(nn.Linear(CLASSES, widths[-1] * 16, bias=False)) if conditional else None
        )

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        features = self.body(F.adaptive_avg_pool2d(x, SIDE)).flatten(1)
        score = self.score(features)[:, 0]
        return score if self.classes is None else score + (self.classes(classes) * features).sum(1)


def trained(net: nn.Module, options: argparse.Namespace) -> nn.Module:
    """The moving average of a generator that learned against a critic, by the hinge loss."""
    real, _ = fashion_mnist()
    assert real.labels is not None
    x = F.pad(2 * real.images - 1, [2] * 4, value=-1.0).expand(-1, 3, -1, -1)
    critic = Critic(conditional=options.generator == "biggan")
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(AVERAGED), use_buffers=True)
    makers = torch.optim.Adam(net.parameters(), RATE, betas=(0.0, 0.99))
    judges = torch.optim.Adam(critic.parameters(), CRITIC_RATE, betas=(0.0, 0.99))
    net.train()
    for step in range(options.steps):
        index = torch.randint(len(x), (BATCH,))
        known = F.one_hot(real.labels[index], CLASSES).float()
        latents, classes = inputs(options.generator, BATCH)
        with torch.no_grad():
            drawn = net(latents)
        judged = F.relu(1 - critic(x[index], known)) + F.relu(1 + critic(drawn, classes))
        _step(judges, judged.mean())
        latents, classes = inputs(options.generator, BATCH)
        wrong = -critic(net(latents), classes).mean()
        _step(makers, wrong)
        average.update_parameters(net)
        if (step + 1) % max(options.steps // 20, 1) == 0:
            print(
                f"step {step + 1} of {options.steps}: {judged.mean():.3f} {wrong:.3f}", flush=True
            )
    result: nn.Module = average.module
    # Statistics, and energies of the weights, of the average.
    with torch.no_grad():
        result.train()
        for _ in range(50):
            result(inputs(options.generator, BATCH)[0])
    return result.eval()


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.inference_mode()
def images(net: nn.Module, latents: Tensor) -> Tensor:
    """``(N, 3, H, W)``, from 0 to 1."""
    drawn = torch.cat([net(some) for some in latents.split(BATCH)])
    return ((drawn + 1) / 2).clamp(0, 1)


@torch.inference_mode()
def distance(some: Tensor, others: Tensor) -> float:
    """How differently a classifier of clothes sees two sets of images.

    Features of each of its blocks, of length 1 at every position, as in LPIPS (Zhang et al. 2018,
    https://arxiv.org/abs/1801.03924) without its learned weights: 0 for equal ones, 2 at most for
    each block's.
    """
    net = trained_fashion_resnet()
    apart = []
    x, y = (F.adaptive_avg_pool2d(part.mean(1, keepdim=True), SIDE) for part in (some, others))
    x, y = x[..., 2:-2, 2:-2], y[..., 2:-2, 2:-2]
    for block in [net.stem, *net.blocks]:
        x, y = block(x), block(y)
        apart.append((F.normalize(x) - F.normalize(y)).square().sum(1).mean())
    return float(torch.stack(apart).mean())


def picture(before: Tensor, after: Tensor) -> Tensor:
    """Rows of images, each with what stands in their place below it."""
    rows = [
        some[start : start + COLUMNS]
        for start in range(0, ROWS * COLUMNS, COLUMNS)
        for some in (before, after)
    ]
    large = F.interpolate(torch.cat(rows), (96, 96), mode="bilinear", antialias=True)
    return make_grid(large, nrow=COLUMNS)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("generator", choices=CHANNELS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--channels", type=int, help=f"default: {CHANNELS}")
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--budget", default="60%")
    parser.add_argument("--target", default="native")
    parser.add_argument("--recover", default="2min")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
