"""Native kernels on every sample input that PyTorch keeps for its own convolutions."""

import math
from collections.abc import Callable

import pytest
import torch
from compare import assert_close
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput

from groupconv.kernels import dispatch
from groupconv.kernels.native import Native
from groupconv.nn import functional

OURS: dict[str, Callable[..., Tensor]] = {
    "nn.functional.conv1d": functional.group_conv1d,
    "nn.functional.conv2d": functional.group_conv2d,
    "nn.functional.conv_transpose1d": functional.group_conv_transpose1d,
    "nn.functional.conv_transpose2d": functional.group_conv_transpose2d,
}
OPS: dict[str, OpInfo] = {op.name: op for op in op_db if op.name in OURS}
# torch asks for a copy of the input when "same" padding is uneven, and says so.


@pytest.fixture(autouse=True)
def _native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native kernels wherever they are legal, chosen anew; their output holds NaN before."""
    monkeypatch.setenv("GROUPCONV_NATIVE", "1")
    monkeypatch.setattr(dispatch, "_choices", {})
    compute = Native.compute

    def poisoned(
        self: Native, x: Tensor, weights: tuple[Tensor, ...], bias: Tensor | None, y: Tensor
    ) -> None:
        y.fill_(math.nan)
        compute(self, x, weights, bias, y)

    monkeypatch.setattr(Native, "compute", poisoned)


def _samples(name: str, dtype: torch.dtype) -> list[SampleInput]:
    torch.manual_seed(0)
    return list(OPS[name].sample_inputs("cpu", dtype, requires_grad=False))


every_sample = pytest.mark.parametrize(
    ("name", "index"),
    [
        pytest.param(name, i, id=f"{name.removeprefix('nn.functional.')}-{i}")
        for name in OPS
        for i in range(len(_samples(name, torch.float32)))
    ],
)
both_layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])


def _leaves(sample: SampleInput, channels_last: bool) -> list[Tensor | None]:
    """Input, weight and bias as fresh leaves that need gradients, laid out as asked."""
    leaves = []
    for tensor in (sample.input, *sample.args):
        if tensor is not None:
            tensor = tensor.detach().clone()
            if channels_last and tensor.ndim > 2:
                tensor = tensor.movedim(-tensor.ndim + 1, -1).contiguous()
                tensor = tensor.movedim(-1, -tensor.ndim + 1)
            tensor.requires_grad_()
        leaves.append(tensor)
    return leaves


def _run(name: str, sample: SampleInput, tensors: list[Tensor | None]) -> tuple[Tensor, list[str]]:
    """The result of our function, and what ran."""
    ran: list[str] = []
    with dispatch.listening(lambda choice, _: ran.append(choice)):
        return OURS[name](*tensors, **sample.kwargs), ran


def _truth(name: str, sample: SampleInput, tensors: list[Tensor | None]) -> Tensor:
    """torch's result in float64 from the same numbers."""
    return OPS[name].op(*(t if t is None else t.double() for t in tensors), **sample.kwargs)


def _uneven(sample: SampleInput) -> bool:
    """Whether the padding differs at both ends, so that gradients run on PyTorch."""
    if sample.kwargs.get("padding") != "same":
        return False
    dilation = sample.kwargs.get("dilation", 1)
    kernel = sample.args[0].shape[2:]
    spread = dilation if isinstance(dilation, tuple) else (dilation,) * len(kernel)
    return any(d * (k - 1) % 2 for k, d in zip(kernel, spread, strict=True))


def _places(x: Tensor) -> list[tuple[int, int]]:
    """Where its numbers lie: axes of one element have no say in it."""
    return [(n, step) for n, step in zip(x.shape, x.stride(), strict=True) if n > 1]


def test_every_entry_was_found() -> None:
    assert OPS.keys() == OURS.keys()
    assert all(len(_samples(name, torch.float32)) >= 10 for name in OPS)
    samples = [s for name in OPS for s in _samples(name, torch.float32)]
    assert any(_uneven(s) for s in samples)
    assert any(s.kwargs.get("groups", 1) > 1 for s in samples)
    assert any(s.input.ndim == s.args[0].ndim - 1 for s in samples)


@both_layouts
@every_sample
def test_forward_is_native_and_right(name: str, index: int, channels_last: bool) -> None:
    sample = _samples(name, torch.float32)[index]
    leaves = _leaves(sample, channels_last)
    with torch.no_grad():
        actual, ran = _run(name, sample, leaves)
        expected = _truth(name, sample, leaves)
        theirs = OPS[name].op(*leaves, **sample.kwargs)
    assert ran == ["native"]
    assert actual.dtype == torch.float32
    assert _places(actual) == _places(theirs)
    scale = expected.abs().max().item()
    assert_close(actual, expected, rtol=1e-6, atol=2e-6 * scale)


@both_layouts
@every_sample
def test_gradients_equal_torchs(name: str, index: int, channels_last: bool) -> None:
    """First and second ones; the seed is random, so that no two outputs weigh the same."""
    sample = _samples(name, torch.float32)[index]
    ours = _leaves(sample, channels_last)
    theirs = [None if t is None else t.detach().double().requires_grad_() for t in ours]
    actual, ran = _run(name, sample, ours)
    expected = _truth(name, sample, theirs)
    assert ran == ["native"]
    if not _uneven(sample):
        # An unbatched result is a view of the batched one.
        nodes = {actual.grad_fn.name(), *(n.name() for n, _ in actual.grad_fn.next_functions if n)}
        assert any("_Differentiable" in node for node in nodes), nodes
    seed = torch.randn_like(expected)
    first = _gradients(actual, seed.float(), ours)
    truth = _gradients(expected, seed, theirs)
    for mine, other in zip(first, truth, strict=True):
        assert_close(mine, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())
    # The sum of their squares depends on input and weight again.
    mine = _gradients(sum(g.square().sum() for g in first), None, ours[:2])
    other = _gradients(sum(g.square().sum() for g in truth), None, theirs[:2])
    for a, b in zip(mine, other, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def _gradients(out: Tensor, seed: Tensor | None, leaves: list[Tensor | None]) -> list[Tensor]:
    """With their own graph."""
    wanted = [leaf for leaf in leaves if leaf is not None]
    return list(torch.autograd.grad(out, wanted, seed, create_graph=True))


@both_layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_sample
def test_half_precision_is_rounded_once(
    name: str, index: int, dtype: torch.dtype, channels_last: bool
) -> None:
    """Sums in float32: the result lies half a unit from the truth, and what float32 adds."""
    sample = _samples(name, dtype)[index]
    leaves = _leaves(sample, channels_last)
    with torch.no_grad():
        actual, ran = _run(name, sample, leaves)
        expected = _truth(name, sample, leaves)
    assert ran == ["native in float32"]
    assert actual.dtype == dtype
    scale = expected.abs().max().item()
    assert_close(actual, expected, rtol=torch.finfo(dtype).eps / 2, atol=2e-6 * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_sample
def test_gradients_in_half_precision(name: str, index: int, dtype: torch.dtype) -> None:
    sample = _samples(name, dtype)[index]
    ours = _leaves(sample, channels_last=False)
    theirs = [None if t is None else t.detach().double().requires_grad_() for t in ours]
    actual, ran = _run(name, sample, ours)
    expected = _truth(name, sample, theirs)
    assert ran == ["native in float32"]
    seed = torch.randn_like(actual)
    first = _gradients(actual, seed, ours)
    truth = _gradients(expected, seed.double(), theirs)
    for mine, other in zip(first, truth, strict=True):
        assert mine.dtype == dtype
        # PyTorch computes these, in this dtype.
        assert_close(mine, other, rtol=0.02, atol=0.02 * other.abs().max().item())
