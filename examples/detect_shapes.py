"""A detector from drawn images to a faster one: YOLO v3 finds shapes on photographs.

    python -m examples.detect_shapes --photos FOLDER --out runs/shapes --budget 50% --recover 3min

Circles, squares and triangles are drawn on pieces of the photographs, or, without ``--photos``, on
clouds of colour. A YOLO v3 of few channels learns to find them; it is optimized on images without
their boxes, and both networks are tested on new ones: mean average precision as in COCO, and how
many of the original's objects are found again. Needs ``groupconv[examples]``.

``shapes.json`` has the figures, ``shapes.png`` some of the images with what both networks find.
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.ops import box_convert, box_iou, generalized_box_iou_loss
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import draw_bounding_boxes, make_grid, save_image

import groupconv
from benchmarks.provenance import commit, versions
from groupconv.models.yolov3 import ANCHORS, STRIDES, YOLOv3, decode, detect
from groupconv.optimize.objects import match_all
from groupconv.timing import machine

SHAPES = ("circle", "square", "triangle")
# Boxes that overlap one of an object so far are neither right nor wrong, as in the paper.
IGNORED = 0.5
BATCH, RATE, CALIBRATION = 32, 2e-3, 1_000

Target = dict[str, Tensor]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _arguments(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    photos = sorted(p for p in options.photos.rglob("*.*")) if options.photos else []
    images, targets = draw(options.images, options.size, photos, options.seed)
    test, truth = draw(max(8, options.images // 8), options.size, photos, options.seed + 1)
    net = trained(options.out / "net.safetensors", images, targets, options)
    result = groupconv.optimize(
        net,
        images[:CALIBRATION],
        budget=options.budget,
        target=options.target,
        keep=["first", "heads.*.boxes"],
        recover=groupconv.Recovery(options.recover, train=images),
        test=test,
        out=options.out / "optimized",
        seed=options.seed,
    )
    found = [objects(network, test) for network in (net, result.model)]
    again = match_all(*found)
    report = result.report
    record = {
        "machine": machine(),
        **commit(),
        "versions": versions(["torch", "torchvision", "torchmetrics"]),
        "settings": {
            key: str(value) for key, value in vars(options).items() if key not in ("photos", "out")
        },
        "photos": len(photos),
        "test_images": len(test),
        "precision": {
            when: precision(some, truth)
            for when, some in zip(("before", "after"), found, strict=True)
        },
        "found_again": {"f1": again.f1, "overlap": again.overlap},
        **{name: report[name] for name in ("latency", "speedup", "macs", "params", "output_error")},
    }
    (options.out / "shapes.json").write_text(json.dumps(record, indent=1) + "\n")
    save_image(picture(test, found), options.out / "shapes.png")
    for when, values in record["precision"].items():
        print(f"{when}: mAP {values['map']:.3f}, at an overlap of one half {values['map_50']:.3f}")
    print(f"{again.f1:.1%} of the objects found again, {report['speedup']:.2f}x faster")


def draw(count: int, size: int, photos: Sequence[Path], seed: int) -> tuple[Tensor, list[Target]]:
    """Images ``(N, 3, size, size)`` from 0 to 1, and ``boxes`` and ``labels`` of each."""
    dice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    images, targets = [], []
    for _ in range(count):
        image = _background(size, photos, dice, generator)
        pen = ImageDraw.Draw(image)
        boxes: list[tuple[float, ...]] = []
        labels: list[int] = []
        for _ in range(dice.randint(1, 4)):
            side = dice.uniform(0.12, 0.4) * size
            left, top = (dice.uniform(0, size - side) for _ in range(2))
            box = (left, top, left + side, top + side)
            if boxes and float(box_iou(torch.tensor([box]), torch.tensor(boxes)).max()) > 0.05:
                continue
            labels.append(dice.randrange(len(SHAPES)))
            boxes.append(box)
            _shape(pen, SHAPES[labels[-1]], box, tuple(dice.randrange(256) for _ in range(3)))
        images.append(pil_to_tensor(image).float() / 255)
        targets.append({"boxes": torch.tensor(boxes), "labels": torch.tensor(labels)})
    return torch.stack(images), targets


def _background(
    size: int, photos: Sequence[Path], dice: random.Random, generator: torch.Generator
) -> Image.Image:
    if not photos:
        cloud = torch.rand(1, 3, 5, 5, generator=generator)
        cloud = F.interpolate(cloud, (size, size), mode="bicubic").clamp(0, 1)[0]
        return Image.fromarray((255 * cloud).byte().permute(1, 2, 0).numpy())
    with Image.open(dice.choice(photos)) as photo:
        whole = photo.convert("RGB")
    side = dice.uniform(0.5, 1) * min(whole.size)
    left, top = (dice.uniform(0, extent - side) for extent in whole.size)
    return whole.resize((size, size), box=(left, top, left + side, top + side))


def _shape(
    pen: ImageDraw.ImageDraw, kind: str, box: tuple[float, ...], colour: tuple[int, ...]
) -> None:
    left, top, right, bottom = box
    if kind == "circle":
        pen.ellipse(box, fill=colour)
    elif kind == "square":
        pen.rectangle(box, fill=colour)
    else:
        pen.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=colour)


def trained(
    path: Path, images: Tensor, targets: Sequence[Target], options: argparse.Namespace
) -> nn.Module:
    """The network at a path, trained first if there is none."""
    torch.manual_seed(options.seed)
    net = YOLOv3(len(SHAPES), options.width)
    if path.exists():
        net.load_state_dict(load_file(path))
        return net.eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=0.02)
    steps = options.epochs * len(range(0, len(images), BATCH))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for epoch in range(options.epochs):
        total = torch.zeros((), device=device)
        for x, wanted in _batches(images, targets):
            optimizer.zero_grad()
            loss = yolo_loss(net(x.to(device, memory_format=torch.channels_last)), wanted)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 10.0)
            optimizer.step()
            schedule.step()
            total += loss.detach()
        print(
            f"epoch {epoch + 1} of {options.epochs}: {total * options.epochs / steps:.4f}",
            flush=True,
        )
    net.to("cpu", memory_format=torch.contiguous_format).eval()
    save_file(net.state_dict(), path)
    return net


def _batches(images: Tensor, targets: Sequence[Target]) -> Iterator[tuple[Tensor, list[Target]]]:
    """All images in a new order, half of them mirrored."""
    for index in torch.randperm(len(images)).split(BATCH):
        mirrored = torch.rand(len(index)) < 0.5
        x = torch.where(mirrored[:, None, None, None], images[index].flip(3), images[index])
        wanted = []
        for number, mirror in zip(index.tolist(), mirrored.tolist(), strict=True):
            boxes = targets[number]["boxes"]
            if mirror:
                boxes = torch.stack(
                    [x.shape[3] - boxes[:, 2], boxes[:, 1], x.shape[3] - boxes[:, 0], boxes[:, 3]],
                    1,
                )
            wanted.append({"boxes": boxes, "labels": targets[number]["labels"]})
        yield x, wanted


def yolo_loss(maps: Sequence[Tensor], targets: Sequence[Target]) -> Tensor:
    """The loss of the paper's section 2, boxes by their overlap (https://arxiv.org/abs/1902.09630).

    Of the nine anchors that of an object is the one most like it in size, at the position of its
    centre; others there, and everywhere else, are to find nothing, unless they overlap an object.
    """
    corners, objects, classes = decode(maps)
    sizes = torch.tensor(ANCHORS, dtype=torch.float32).flatten(0, 1)
    sides = [tuple(found.shape[2:]) for found in maps]
    starts = [0]
    for h, w in sides:
        starts.append(starts[-1] + len(ANCHORS[0]) * h * w)
    losses = []
    for number, target in enumerate(targets):
        boxes, labels = (target[key].to(corners.device) for key in ("boxes", "labels"))
        places = []
        for cx, cy, w, h in box_convert(target["boxes"], "xyxy", "cxcywh").tolist():
            overlap = torch.minimum(sizes, torch.tensor([w, h])).prod(1)
            likeness = overlap / (sizes.prod(1) + w * h - overlap)
            head, anchor = divmod(int(likeness.argmax()), len(ANCHORS[0]))
            rows, columns = sides[head]
            row, column = (int(c / STRIDES[head]) for c in (cy, cx))
            places.append(starts[head] + (anchor * rows + row) * columns + column)
        at = torch.tensor(places, device=corners.device)
        right = torch.zeros_like(objects[number]).index_fill(0, at, 1.0)
        counts = (box_iou(corners[number].detach(), boxes).max(1).values < IGNORED) | right.bool()
        found = F.binary_cross_entropy(objects[number], right, counts.float(), reduction="sum")
        named = F.binary_cross_entropy(
            classes[number, at], F.one_hot(labels, len(SHAPES)).float(), reduction="sum"
        )
        off = generalized_box_iou_loss(corners[number, at], boxes, reduction="sum")
        losses.append((found + named + 5 * off) / len(boxes))
    return torch.stack(losses).mean()


@torch.inference_mode()
def objects(net: nn.Module, images: Tensor, min_score: float = 0.05) -> list[Target]:
    """What a network finds in each image."""
    return [found for x in images.split(BATCH) for found in detect(net(x), min_score=min_score)]


def precision(found: Sequence[Target], truth: Sequence[Target]) -> dict[str, float]:
    """Mean average precision as in COCO, and at an overlap of one half."""
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision()
    # COCO counts the hundred surest of an image, and nothing is amiss where there are more.
    metric.warn_on_many_detections = False
    metric.update(list(found), list(truth))
    values = metric.compute()
    return {name: float(values[name]) for name in ("map", "map_50")}


def picture(images: Tensor, found: Sequence[Sequence[Target]], count: int = 6) -> Tensor:
    """Some images with the boxes of both networks, the original's above."""
    drawn = []
    for some in found:
        for image, objects in zip(images[:count], some, strict=False):
            sure = objects["scores"] > 0.5
            names = [SHAPES[label] for label in objects["labels"][sure].tolist()]
            large = F.interpolate(image[None], scale_factor=2)[0]
            boxes = 2 * objects["boxes"][sure]
            drawn.append(
                draw_bounding_boxes(large, boxes, names, "white", width=2) if names else large
            )
    return make_grid(torch.stack(drawn), nrow=count)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--photos", type=Path, help="folder of images to draw on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=4_000, help="to learn from")
    parser.add_argument("--size", type=int, default=128, help="rows and columns of them")
    parser.add_argument(
        "--width", type=float, default=0.25, help="of the network, the paper's is 1"
    )
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--budget", default="50%")
    parser.add_argument("--target", default="native")
    parser.add_argument("--recover", default="3min")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
