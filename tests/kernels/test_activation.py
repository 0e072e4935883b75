"""Activations against float64 and against PyTorch, by a convolution that changes nothing else."""

import math

import pytest
import torch
from compare import assert_close
from kernels.kernel_cases import Case, Numbers, activated, run
from torch import Tensor

from groupconv.kernels.machine import Machine, runnable
from groupconv.kernels.spec import ACTIVATIONS, ConvSpec, KernelSpec
from groupconv.kernels.tile import Tile

every_machine = pytest.mark.parametrize("target", runnable(), ids=lambda target: target.name)
CHANNELS = 19


def _spec(name: str | None, slope: float = 0.01, channels_last: bool = True) -> KernelSpec:
    """One weight of 1 for each channel, and one row."""
    conv = ConvSpec(
        1, CHANNELS, CHANNELS, (1, 400), (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), CHANNELS
    )
    return KernelSpec(conv, channels_last_output=channels_last, activation=name, slope=slope)


def _activate(spec: KernelSpec, target: Machine, values: Tensor) -> Tensor:
    """The kernel's activation of up to ``CHANNELS * 400`` numbers."""
    x = torch.zeros(CHANNELS * spec.conv.input_size[1])
    x[: len(values)] = values
    ones = torch.ones(spec.conv.weight_shape)
    given = Numbers(x.reshape(1, CHANNELS, 1, -1), ones, None, None, None)
    y = run(Case(spec, Tile(4, 2, 1, 1)), target, given)
    return y.reshape(-1)[: len(values)]


def _values() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-30, 1.3, 2000)
    return torch.cat(
        [
            torch.linspace(-87, 87, 3001),
            torch.linspace(-8, 8, 2001),
            torch.randn(2000, generator=generator) * scales,
            torch.tensor([0.0, -0.0, 3.0, -3.0, 6.0, 1e-40, -1e-40]),
        ]
    )


@pytest.mark.parametrize("name", [None, *ACTIVATIONS])
@every_machine
def test_as_exact_as_torch(target: Machine, name: str | None) -> None:
    """By the error beside each result, not beside the largest one."""
    for slope in (0.01, -1.5) if name == "leaky_relu" else (0.01,):
        spec = _spec(name, slope)
        x = _values()
        expected = activated(spec, x.double())
        theirs, ours = activated(spec, x), _activate(spec, target, x)
        beside = expected.abs().clamp_min(2.0**-126)
        error = ((ours - expected).abs() / beside).max()
        if name in (None, "relu", "relu6"):
            assert torch.equal(ours, theirs)
        else:
            # Half of the last bit is what rounding alone may cost.
            assert error <= 4 * max(((theirs - expected).abs() / beside).max().item(), 2.0**-24)


@pytest.mark.parametrize("name", [None, *ACTIVATIONS])
@every_machine
def test_large_numbers(target: Machine, name: str | None) -> None:
    """Where exp() leaves the range of float32, and beyond."""
    spec = _spec(name)
    sizes = torch.cat([torch.linspace(85, 110, 500), torch.tensor([200.0, 1e3, 1e20, 1e36])])
    x = torch.cat([sizes, -sizes])
    expected = activated(spec, x.double())
    assert_close(_activate(spec, target, x), expected, rtol=1e-6, atol=1e-34)


@pytest.mark.parametrize("name", ["sigmoid", "silu"])
@every_machine
def test_the_end_is_zero(target: Machine, name: str) -> None:
    x = -torch.cat([torch.linspace(87.4, 110, 300), torch.logspace(2.1, 38.5, 300)])
    assert not _activate(_spec(name), target, x).any()


@pytest.mark.parametrize("name", [None, *ACTIVATIONS])
@pytest.mark.parametrize("channels_last", [True, False])
@every_machine
def test_nan_stays_nan(target: Machine, channels_last: bool, name: str | None) -> None:
    """In every lane, with either sign, and without harm to its neighbours."""
    spec = _spec(name, channels_last=channels_last)
    x = torch.linspace(-3, 3, 300)
    x[::7] = math.nan
    x[::14] = -math.nan
    y = _activate(spec, target, x)
    assert torch.equal(y.isnan(), x.isnan())


@pytest.mark.parametrize("name", [None, *ACTIVATIONS])
@every_machine
def test_any_nan_stays_nan(target: Machine, name: str | None) -> None:
    """Also those that carry a number, as arithmetic passes it on."""
    generator = torch.Generator().manual_seed(0)
    numbers = [0x400001, 0x400101, 0x7FFFFF, 0x400000, 1, 0x3FFFFF]
    numbers += torch.randint(1, 0x800000, (500,), generator=generator).tolist()
    # With either sign.
    bits = [0x7F800000 + n - negative for n in numbers for negative in (0, 2**31)]
    x = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    assert x.isnan().all()
    assert _activate(_spec(name), target, x).isnan().all()


@pytest.mark.parametrize("name", [None, *ACTIVATIONS])
@every_machine
def test_infinities(target: Machine, name: str | None) -> None:
    x = torch.tensor([math.inf, -math.inf, 1.0])
    spec = _spec(name)
    expected = activated(spec, x)
    # Both are -inf * 0 there.
    assert (name in ("silu", "hardswish")) == bool(expected[1].isnan())
    assert_close(_activate(spec, target, x), expected, rtol=1e-6, atol=1e-34, equal_nan=True)


@every_machine
def test_slopes(target: Machine) -> None:
    """Rounded to float32 once, as PyTorch does."""
    x = torch.linspace(-4, 4, 201)
    for slope in (0.0, 0.01, 0.1, 0.2, 1 / 3, 1.0, 2.0, -0.5, 1e-30):
        spec = _spec("leaky_relu", slope)
        assert torch.equal(_activate(spec, target, x), activated(spec, x)), slope
