"""Running sums against numpy, over batches, parts and processes; the error against repetition."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from compare import assert_close
from torch import Tensor

from groupconv.optimize.covariance import LayerSums, Moments, MomentSums, SeparableSums

FIELDS = ("mean_u", "mean_y", "uu", "yu", "yy")


def data(positions: int, inputs: int, outputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and outputs with means, as of one layer."""
    rng = np.random.default_rng(seed)
    u, y = 5 + rng.normal(size=(positions, inputs)), rng.normal(size=(positions, outputs)) - 3
    y[:, 0] += u[:, 0]
    return torch.from_numpy(u), torch.from_numpy(y)


def assert_same(actual: Moments, expected: Moments) -> None:
    assert actual.count == expected.count
    for name in FIELDS:
        assert_close(getattr(actual, name), getattr(expected, name), rtol=1e-9, atol=1e-9)


# The second is wider than a block of the symmetric sum.
@pytest.mark.parametrize(("positions", "inputs"), [(200, 12), (60, 1_100)])
def test_moments_are_the_covariance(positions: int, inputs: int) -> None:
    u, y = data(positions, inputs, 4)
    sums = MomentSums(inputs, 4)
    for part in np.split(np.arange(positions), [3, 50]):
        sums.add(u[part].float().double(), y[part])
    moments = sums.finish()
    both = np.cov(np.hstack([u.float(), y]).T, bias=True)
    assert moments.count == positions
    for name, expected in {
        "mean_u": u.float().double().mean(0).numpy(),
        "mean_y": y.mean(0).numpy(),
        "uu": both[:inputs, :inputs],
        "yu": both[inputs:, :inputs],
        "yy": both.diagonal()[inputs:].copy(),
    }.items():
        actual = getattr(moments, name)
        assert actual.dtype == torch.float64
        assert_close(actual, torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


def test_parts_and_the_whole() -> None:
    u, y = data(40, 6, 3)
    image = torch.arange(40) // 4
    layer, whole, rest = LayerSums(6, 3), MomentSums(6, 3), MomentSums(6, 3)
    for part in torch.arange(40).split([8, 20, 12]):
        layer.add(u[part], y[part], image[part])
    held = image % 4 == 3
    whole.add(u, y)
    rest.add(u[~held], y[~held])
    moments = layer.finish()
    assert_same(moments, whole.finish())
    assert moments.held_out is not None
    assert moments.held_out.count == int(held.sum()) == 8
    assert_same(moments.kept(), rest.finish())
    inputs, outputs = torch.tensor([4, 0, 5]), torch.tensor([2, 1])
    few = MomentSums(3, 2)
    few.add(u[:, inputs], y[:, outputs])
    assert_same(moments.part(inputs, outputs), few.finish())
    few = MomentSums(3, 2)
    few.add(u[held][:, inputs], y[held][:, outputs])
    assert_same(moments.part(inputs, outputs).held_out, few.finish())


def test_the_error_is_that_of_repeated_samples() -> None:
    """Positions of one image are alike, so that images count and not positions."""
    generator = torch.Generator().manual_seed(0)
    variances, errors = [], []
    for _ in range(400):
        level = torch.rand(50, generator=generator).double().add(0.1)
        image = torch.arange(50).repeat_interleave(20)
        y = torch.randn(1_000, 2, generator=generator).double() * level[image, None] + 7
        sums = LayerSums(0, 2)
        for part in torch.arange(1_000).split(300):  # whole images
            sums.add(y.new_empty(len(part), 0), y[part], image[part])
        moments = sums.finish()
        variances.append(float(moments.yy.sum()))
        errors.append(moments.error)
    spread = np.std(variances) / np.mean(variances)
    assert np.mean(errors) == pytest.approx(spread, rel=0.15)
    naive = np.sqrt(2 / 2_000)  # of independent positions
    assert spread > 2 * naive


def test_one_image_has_no_spread() -> None:
    sums = LayerSums(2, 1)
    sums.add(*data(5, 2, 1), torch.zeros(5, dtype=torch.int64))
    assert sums.finish().error is None


def test_separable_inputs_are_recovered() -> None:
    """Of inputs whose covariance is a Kronecker product, up to the noise of the sample."""
    rng = np.random.default_rng(0)
    between, within = (np.cov(rng.normal(size=(n, 3 * n))) for n in (100, 4))
    roots = [np.linalg.cholesky(matrix) for matrix in (between, within)]
    u = np.einsum("ab,pbt,st->pas", roots[0], rng.normal(size=(4_000, 100, 4)), roots[1]) + 2
    flat = torch.from_numpy(u).flatten(1)
    sums = SeparableSums(100, 4)
    for part in flat.split([1_000, 3_000]):
        sums.add(part)
    moments = sums.finish()
    product = np.kron(moments.channels, moments.taps)
    truth = np.kron(between, within)
    assert np.linalg.norm(product - truth) < 0.1 * np.linalg.norm(truth)
    assert moments.count == 4_000
    exact = np.cov(flat.T.numpy(), bias=True)
    blocks = exact.reshape(100, 4, 100, 4)
    assert_close(
        moments.channels, torch.from_numpy(np.einsum("atbt->ab", blocks) / 4), rtol=1e-9, atol=1e-9
    )
    # The error, from half of the channels, is near that of all.
    error = np.linalg.norm(exact - product) / np.linalg.norm(exact)
    assert moments.error == pytest.approx(error, rel=0.3)


def test_the_error_of_inputs_that_are_not_separable() -> None:
    u = torch.randn(3_000, 4, 3, generator=torch.Generator().manual_seed(0))
    u[:, 0] *= torch.tensor([3.0, 0.0, 0.0])
    u[:, 1] *= torch.tensor([0.0, 0.0, 3.0])
    sums = SeparableSums(4, 3)
    sums.add(u.flatten(1))
    assert sums.finish().error > 0.5


ON_RANK = """
import sys
import torch
import torch.distributed as dist
from groupconv.optimize.covariance import LayerSums, SeparableSums
path, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
u, y = torch.load(f"{path}/data")
mine = slice(0, 16) if rank == 0 else slice(16, 48)
layer, wide = LayerSums(6, 4), SeparableSums(3, 2)
layer.add(u[mine], y[mine], torch.arange(48)[mine] // 4)
wide.add(u[mine])
torch.save((layer.finish(), wide.finish()), f"{path}/{rank}")
dist.destroy_process_group()
"""


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")
def test_sums_over_two_processes(tmp_path: Path) -> None:
    u, y = data(48, 6, 4)
    torch.save((u, y), tmp_path / "data")
    ranks = [
        subprocess.Popen([sys.executable, "-c", ON_RANK, str(tmp_path), str(rank)])
        for rank in range(2)
    ]
    assert [process.wait(timeout=60) for process in ranks] == [0, 0]
    layer, wide = LayerSums(6, 4), SeparableSums(3, 2)
    layer.add(u, y, torch.arange(48) // 4)
    wide.add(u)
    expected, separable = layer.finish(), wide.finish()
    for rank in range(2):
        moments, product = torch.load(tmp_path / str(rank), weights_only=False)
        assert_same(moments, expected)
        assert_same(moments.held_out, expected.held_out)
        assert moments.error == pytest.approx(expected.error)
        assert_close(product.channels, separable.channels, rtol=1e-9, atol=1e-9)
        assert_close(product.taps, separable.taps, rtol=1e-9, atol=1e-9)
        assert product.error == pytest.approx(separable.error)
