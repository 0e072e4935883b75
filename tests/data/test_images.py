"""Images in every accepted form, and every way in which they can be wrong."""

from pathlib import Path

import numpy as np
import pytest
import torch
from compare import assert_close
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from groupconv.data import Images, largest_map, load_images
from groupconv.data.images import IMAGENET_MEAN, IMAGENET_STD
from groupconv.errors import ArgumentError, DataError

COUNT = 10
# Image i holds i everywhere, and is of class i mod 3.
NUMBERED = torch.arange(float(COUNT)).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4)
LABELS = torch.arange(COUNT) % 3


def numbers(images: Images) -> list[int]:
    return images.images[:, 0, 0, 0].int().tolist()


def loader(batch_size: int = 3) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(NUMBERED, LABELS), batch_size=batch_size)


def save_png(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def save_npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("form", ["images", "tensor", "loader", "npz"])
def test_forms(form: str, labelled: bool, tmp_path: Path) -> None:
    arrays = {"images": NUMBERED.numpy(), **({"labels": LABELS.numpy()} if labelled else {})}
    data = {
        "images": Images(NUMBERED, LABELS if labelled else None, "mine"),
        "tensor": (NUMBERED, LABELS) if labelled else NUMBERED,
        "loader": loader() if labelled else NUMBERED.split(3),
        "npz": str(save_npz(tmp_path / "a.npz", **arrays)),
    }[form]
    images = load_images(data, limit=COUNT)
    assert_close(images.images, NUMBERED, rtol=0, atol=0)
    assert len(images) == COUNT
    if labelled:
        assert images.labels is not None
        assert torch.equal(images.labels, LABELS)
    else:
        assert images.labels is None
    assert images.source


def test_two_batches_are_no_pair() -> None:
    images = load_images(NUMBERED.split(5), limit=COUNT)
    assert (numbers(images), images.labels) == (list(range(COUNT)), None)


def test_pair_as_a_list() -> None:
    images = load_images([NUMBERED, LABELS], limit=COUNT)
    assert images.labels is not None
    assert torch.equal(images.labels, LABELS)


def test_limit_and_seed() -> None:
    first, again, other = (load_images((NUMBERED, LABELS), limit=4, seed=s) for s in (0, 0, 1))
    assert len(first) == 4
    assert len(set(numbers(first))) == 4
    assert numbers(first) == numbers(again) != numbers(other)
    assert first.labels is not None
    assert [n % 3 for n in numbers(first)] == first.labels.tolist()
    # No more than there are, and then in their own order.
    assert numbers(load_images(NUMBERED, limit=COUNT, seed=1)) == list(range(COUNT))


def test_a_loader_is_read_only_as_far_as_needed() -> None:
    taken: list[int] = []

    def batches() -> object:
        for i in range(100):
            taken.append(i)
            yield NUMBERED[2 * i : 2 * i + 2], LABELS[2 * i : 2 * i + 2]

    images = load_images(batches(), limit=5)
    assert numbers(images) == [0, 1, 2, 3, 4]
    assert taken == [0, 1, 2]
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 2, 0, 1]


def test_whole_numbers_become_shares() -> None:
    images = load_images(torch.full((2, 3, 4, 4), 51, dtype=torch.uint8), limit=2)
    assert images.images.dtype == torch.float32
    assert_close(images.images, torch.full((2, 3, 4, 4), 0.2), rtol=1e-6, atol=0)


def test_split_and_shuffled() -> None:
    images = Images(NUMBERED, LABELS, "mine")
    first, rest = images.split(4)
    assert (numbers(first), numbers(rest)) == ([0, 1, 2, 3], [4, 5, 6, 7, 8, 9])
    assert first.labels is not None
    assert first.labels.tolist() == [0, 1, 2, 0]
    shuffled = images.shuffled(0)
    assert sorted(numbers(shuffled)) == list(range(COUNT)) != numbers(shuffled)
    assert shuffled.labels is not None
    assert shuffled.labels.tolist() == [n % 3 for n in numbers(shuffled)]
    assert numbers(images.shuffled(0)) == numbers(shuffled) != numbers(images.shuffled(1))


def test_folder_by_class(tmp_path: Path) -> None:
    for i, name in enumerate(("dog", "cat", "dog", "ant")):
        save_png(tmp_path / name / f"{i}.png", (255, 51 * i, 0))
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    images = load_images(tmp_path, limit=10, image_size=28)
    assert images.images.shape == (4, 3, 28, 28)
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 2, 2]  # ant, cat, dog, dog
    expected = torch.tensor([[1, 0.6, 0], [1, 0.2, 0], [1, 0, 0], [1, 0.4, 0]])
    expected = (expected - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    assert_close(images.images.mean((2, 3)), expected, rtol=1e-5, atol=1e-5)
    # A choice keeps the numbers of all classes.
    for seed in range(6):
        chosen = load_images(str(tmp_path), limit=2, image_size=28, seed=seed)
        assert chosen.labels is not None
        for image, label in zip(chosen.images, chosen.labels, strict=True):
            same = [torch.equal(image, other) for other in images.images]
            assert images.labels[same.index(True)] == label


def test_flat_folder(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", (0, 0, 0))
    save_png(tmp_path / "b.JPG", (255, 255, 255), (300, 20))
    Image.new("L", (20, 20), 51).save(tmp_path / "c.png")  # grey
    images = load_images(tmp_path, limit=10, image_size=32, mean=(0, 0, 0), std=(1, 1, 1))
    assert images.labels is None
    assert images.images.shape == (3, 3, 32, 32)
    expected = torch.tensor([0.0, 1.0, 0.2])[:, None].expand(3, 3)
    assert_close(images.images.mean((2, 3)), expected, rtol=0, atol=1e-2)


def test_the_centre_of_a_folders_images(tmp_path: Path) -> None:
    stripe = Image.new("RGB", (128, 64), (0, 0, 0))
    stripe.paste((255, 255, 255), (40, 0, 88, 64))
    stripe.save(tmp_path / "stripe.png")
    images = load_images(tmp_path, limit=1, image_size=28, mean=(0, 0, 0), std=(1, 1, 1))
    # 128 x 64 becomes 64 x 32, and its middle 28 columns are 18 to 45, wherein 20 to 43 are white.
    row = images.images[0, 0, 14]
    assert (row[:1] < 0.1).all()
    assert (row[3:25] > 0.9).all()
    assert (row[-1:] < 0.1).all()


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"no images \(looked for \.jpg"):
        load_images(tmp_path, limit=1)


@pytest.mark.parametrize("content", ["nothing", "text", "half"])
def test_unreadable_image(tmp_path: Path, content: str) -> None:
    bad = tmp_path / "b.png"
    save_png(tmp_path / "a.png", (1, 2, 3))
    save_png(bad, (1, 2, 3), (300, 300))
    whole = bad.read_bytes()
    bad.write_bytes({"nothing": b"", "text": b"hello", "half": whole[: len(whole) // 2]}[content])
    with pytest.raises(DataError, match=r"b\.png: can't be read as an image"):
        load_images(tmp_path, limit=5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite(value: float) -> None:
    images = NUMBERED.clone()
    images[3, 1, 2, 2] = value
    for data in (images, images.split(2), (images, LABELS)):
        with pytest.raises(DataError, match="images hold NaN or Inf"):
            load_images(data, limit=COUNT)


@pytest.mark.parametrize("shape", [(4, 16), (4, 3, 8), (4, 3, 8, 8)])
def test_what_a_network_may_take(shape: tuple[int, ...]) -> None:
    assert load_images(torch.ones(shape), limit=3).images.shape == (3, *shape[1:])


def test_the_largest_map() -> None:
    maps = [torch.ones(2, 3, 8, 4), {"boxes": torch.ones(5, 4)}, torch.ones(1, 1, 6, 6)]
    assert largest_map(maps[0]) == 32
    assert largest_map(*maps, "a text") == 36
    assert largest_map(maps[1]) == 1


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4, 4, 4)])
def test_shapes(shape: tuple[int, ...]) -> None:
    for data in (torch.ones(shape), [torch.ones(shape)], Images(torch.ones(shape), None, "mine")):
        with pytest.raises(DataError, match=r"images have shape .*; expected \(N, C, H, W\)"):
            load_images(data, limit=9)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.ones(0, 3, 4, 4), "a tensor: no images"),
        ([], "the loader gives no batches"),
        (["a", "b"], "a batch of the loader is a str"),
        ([{"image": NUMBERED}], "a batch of the loader is a dict"),
        ([torch.ones(1, 3, 4, 4), torch.ones(1, 3, 5, 4)], "images of different shapes: .*5, 4"),
        ((NUMBERED, LABELS[:4]), r"10 images but labels of shape \(4,\)"),
        (Images(NUMBERED, LABELS[:, None], "mine"), r"mine: 10 images but labels of shape \(10, 1"),
        ("nowhere", "data='nowhere' is neither a folder of images nor an .npz file"),
        (Path("nowhere.npz"), "nowhere.npz: can't be read as .npz"),
    ],
)
def test_data_that_cannot_be_used(data: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_images(data, limit=COUNT)


@pytest.mark.parametrize("data", [None, 3, torch.nn.ReLU()])
def test_no_source_of_images(data: object) -> None:
    with pytest.raises(
        ArgumentError, match=r"must be a tensor .* a DataLoader, a folder or an \.npz"
    ):
        load_images(data, limit=1)


def test_npz_without_images(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "a.npz", pictures=NUMBERED.numpy(), labels=LABELS.numpy())
    message = r"holds \['labels', 'pictures'\], but no array called 'images'"
    with pytest.raises(DataError, match=message):
        load_images(path, limit=1)


@pytest.mark.parametrize("damage", ["empty", "text", "half", "flipped", "npy", "objects", "words"])
def test_broken_npz(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.npz"
    if damage in ("objects", "words"):
        value = np.array([{}, "x"]) if damage == "objects" else np.array(["a", "b"])
        save_npz(path, images=value)
    elif damage == "npy":
        with path.open("wb") as file:
            np.save(file, NUMBERED.numpy())
    else:
        np.savez_compressed(path, images=np.random.default_rng(0).random((2, 3, 4, 4)))
        whole = path.read_bytes()
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes(255 - b for b in whole[middle : middle + 20])
        path.write_bytes(
            {
                "empty": b"",
                "text": b"hello",
                "half": whole[:middle],
                "flipped": flipped + whole[middle + 20 :],
            }[damage]
        )
    with pytest.raises(DataError, match=r"a\.npz: can't be read as \.npz"):
        load_images(path, limit=1)
