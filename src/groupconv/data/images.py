"""Images from wherever people keep them: tensor, loader, folder, .npz."""

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from groupconv.errors import ArgumentError, DataError
from groupconv.store import fingerprint

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Images:
    """Images ready for a network.

    Args:
        images: ``(N, C, H, W)``, floating point; sequences ``(N, C, L)`` or latents ``(N, C)``
            where the network takes those.
        labels: ``(N,)`` class numbers, or None.
        source: where they come from, in words.
    """

    images: Tensor
    labels: Tensor | None
    source: str

    def __len__(self) -> int:
        return len(self.images)

    def split(self, count: int) -> "tuple[Images, Images]":
        """The first ``count`` images, and the others."""
        labels = (None, None) if self.labels is None else (self.labels[:count], self.labels[count:])
        return (
            Images(self.images[:count], labels[0], self.source),
            Images(self.images[count:], labels[1], self.source),
        )

    def fingerprint(self) -> str:
        """A text that differs where any image or label does."""
        labels = [] if self.labels is None else [("labels", self.labels)]
        return fingerprint([("images", self.images), *labels])

    def shuffled(self, seed: int) -> "Images":
        return self.take(torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)))

    def take(self, index: Tensor) -> "Images":
        """Those of some numbers, in that order, or those where a mask is true."""
        labels = None if self.labels is None else self.labels[index]
        return Images(self.images[index], labels, self.source)


def load_images(
    data: Any,
    *,
    limit: int,
    image_size: int = 224,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    seed: int = 0,
) -> Images:
    """At most ``limit`` images from any of the accepted forms, picked at random by ``seed``.

    Args:
        data: an :class:`Images`; a tensor ``(N, C, H, W)``, ``(N, C, L)`` or ``(N, C)``; a pair of
            images and labels; a loader or other iterable of such batches; a folder of images,
            labelled by sub-folder or flat; an ``.npz`` with ``images`` and perhaps ``labels``.
        limit: number of images to keep.
        image_size, mean, std: for a folder: the short side is scaled to 256/224 of image_size,
            the centre is cropped, and each channel is normalised.
        seed: of the choice, when there are more. A loader is read in its own order instead.

    Raises:
        DataError: no images, an unreadable one, NaN values, or a shape that is none of these.
        ArgumentError: none of the accepted forms.
    """
    if isinstance(data, str | Path):
        path = Path(data)
        if path.is_dir():
            return _from_folder(path, limit, image_size, mean, std, seed)
        if path.suffix == ".npz":
            return _checked(_from_npz(path), limit, seed)
        raise DataError(f"data={str(data)!r} is neither a folder of images nor an .npz file")
    if isinstance(data, Images):
        return _checked(data, limit, seed)
    if isinstance(data, Tensor):
        return _checked(Images(data, None, "a tensor"), limit, seed)
    if _is_pair(data):
        return _checked(Images(data[0], data[1], "a pair of tensors"), limit, seed)
    if isinstance(data, Iterable):
        return _checked(_from_loader(data, limit), limit, seed)
    raise ArgumentError(
        f"data={data!r} must be a tensor (N, C, H, W), a DataLoader, a folder or an .npz file"
    )


def largest_map(*values: Any) -> int:
    """Positions of the largest tensor ``(N, C, *size)`` in any nesting: memory grows with them."""
    tensors = (value for value in tree_leaves(values) if isinstance(value, Tensor))
    return max(math.prod(tensor.shape[2:]) for tensor in tensors)


def _is_pair(data: Any) -> bool:
    """Whether data are images and their labels, and not two batches of images."""
    two_tensors = isinstance(data, tuple | list) and [isinstance(t, Tensor) for t in data]
    return two_tensors == [True, True] and data[1].ndim == 1


def _checked(found: Images, limit: int, seed: int) -> Images:
    images, labels = found.images, found.labels
    if not 2 <= images.ndim <= 4:
        raise DataError(
            f"{found.source}: images have shape {tuple(images.shape)}; expected (N, C, H, W), "
            "sequences (N, C, L) or latents (N, C)"
        )
    if not len(images):
        raise DataError(f"{found.source}: no images")
    if labels is not None and labels.shape != (len(images),):
        raise DataError(
            f"{found.source}: {len(images)} images but labels of shape {tuple(labels.shape)}"
        )
    if len(images) > limit:
        found = found.shuffled(seed).split(limit)[0]
    images = found.images if found.images.is_floating_point() else found.images.float() / 255
    if not torch.isfinite(images).all():
        raise DataError(f"{found.source}: images hold NaN or Inf")
    return Images(images, found.labels, found.source)


def _from_loader(loader: Iterable[Any], limit: int) -> Images:
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in loader:
        x, y = batch if isinstance(batch, list | tuple) and len(batch) == 2 else (batch, None)
        if not isinstance(x, Tensor):
            raise DataError(
                f"a batch of the loader is a {type(x).__name__}; expected a tensor (N, C, H, W), "
                "or that and labels"
            )
        images.append(x)
        if isinstance(y, Tensor):
            labels.append(y)
        if sum(map(len, images)) >= limit:
            break
    if len({x.shape[1:] for x in images}) > 1:
        raise DataError(
            "the loader gives images of different shapes: "
            + ", ".join(sorted({str(tuple(x.shape[1:])) for x in images}))
        )
    if not images:
        raise DataError("the loader gives no batches")
    found = Images(
        torch.cat(images), torch.cat(labels) if len(labels) == len(images) else None, "a loader"
    )
    return found.split(limit)[0]


def _from_npz(path: Path) -> Images:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            names = sorted(arrays.files)
            if "images" not in names:
                raise DataError(f"{path}: holds {names}, but no array called 'images'")
            images = torch.from_numpy(arrays["images"])
            labels = torch.from_numpy(arrays["labels"]).long() if "labels" in names else None
    except (OSError, EOFError, ValueError, TypeError, BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: can't be read as .npz: {error}") from error
    return Images(images, labels, str(path))


def _from_folder(
    folder: Path,
    limit: int,
    image_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    seed: int,
) -> Images:
    from PIL import Image, UnidentifiedImageError
    from torchvision.datasets.folder import IMG_EXTENSIONS
    from torchvision.transforms import v2

    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
    if not paths:
        raise DataError(f"{folder}: no images (looked for {', '.join(IMG_EXTENSIONS)})")
    classes = sorted({p.parent.name for p in paths if p.parent != folder})
    flat = any(p.parent == folder for p in paths)
    rng = np.random.default_rng(seed)
    paths = [paths[i] for i in np.sort(rng.permutation(len(paths))[:limit])]
    transform = v2.Compose(
        [
            v2.Resize(round(image_size * 256 / 224), antialias=True),
            v2.CenterCrop(image_size),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
        ]
    )
    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                images.append(transform(image.convert("RGB")))
        except (OSError, UnidentifiedImageError, SyntaxError) as error:
            raise DataError(f"{path}: can't be read as an image: {error}") from error
    labels = None
    if not flat:
        labels = torch.tensor([classes.index(p.parent.name) for p in paths])
    return Images(torch.stack(images), labels, str(folder))
