"""The functions on every sample and every error input that PyTorch keeps for its own."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as torch_functional
from compare import assert_close
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import ErrorInput, OpInfo, SampleInput

from groupconv.errors import ArgumentError
from groupconv.nn import functional

OURS: dict[str, Callable[..., Tensor]] = {
    "nn.functional.conv1d": functional.group_conv1d,
    "nn.functional.conv2d": functional.group_conv2d,
    "nn.functional.conv3d": functional.group_conv3d,
    "nn.functional.conv_transpose1d": functional.group_conv_transpose1d,
    "nn.functional.conv_transpose2d": functional.group_conv_transpose2d,
    "nn.functional.conv_transpose3d": functional.group_conv_transpose3d,
}
OPS: dict[str, OpInfo] = {op.name: op for op in op_db if op.name in OURS}
# torch asks for a copy of the input when "same" padding is uneven, and says so.


def _samples(name: str, dtype: torch.dtype) -> list[SampleInput]:
    torch.manual_seed(0)
    return list(OPS[name].sample_inputs("cpu", dtype, requires_grad=False))


def _cases() -> list[object]:
    return [
        pytest.param(name, i, id=f"{name.removeprefix('nn.functional.')}-{i}")
        for name in OPS
        for i in range(len(_samples(name, torch.float64)))
    ]


def _errors(*, of_dtype: bool) -> list[object]:
    """Dtypes that differ are torch's to judge; every other error is ours."""
    return [
        pytest.param(name, error, id=f"{name.removeprefix('nn.functional.')}-{i}")
        for name, op in OPS.items()
        if op.error_inputs_func is not None
        for i, error in enumerate(op.error_inputs("cpu"))
        if of_dtype == ("should be the same" in error.error_regex)
    ]


def _leaves(sample: SampleInput) -> list[Tensor | None]:
    """Input, weight and bias as fresh leaves that need gradients."""
    tensors = (sample.input, *sample.args)
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def test_every_entry_was_found() -> None:
    assert OPS.keys() == OURS.keys()
    assert all(len(_samples(name, torch.float64)) >= 10 for name in OPS)
    assert len(_errors(of_dtype=True)) == 6
    assert len(_errors(of_dtype=False)) >= 20


@pytest.mark.parametrize(("name", "index"), _cases())
def test_forward_and_gradients_equal_torch(name: str, index: int) -> None:
    sample = _samples(name, torch.float64)[index]
    ours, theirs = _leaves(sample), _leaves(sample)
    actual = OURS[name](*ours, **sample.kwargs)
    expected = OPS[name].op(*theirs, **sample.kwargs)
    assert actual.dtype == torch.float64
    assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    seed = torch.randn_like(expected)
    actual.backward(seed)
    expected.backward(seed)
    for mine, other in zip(ours, theirs, strict=True):
        if other is not None:
            assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "index"), _cases())
def test_first_and_second_derivatives(name: str, index: int) -> None:
    sample = _samples(name, torch.float64)[index]
    leaves = _leaves(sample)

    def function(*tensors: Tensor) -> Tensor:
        return OURS[name](*tensors, *[None] * (3 - len(tensors)), **sample.kwargs)

    inputs = tuple(t for t in leaves if t is not None)
    assert len(inputs) >= 2
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.complex64, 1e-5), (torch.float32, 1e-5), (torch.bfloat16, 0.02)]
)
@pytest.mark.parametrize("name", OPS)
def test_other_dtypes(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Against torch's result in the wider type, from the same rounded numbers."""
    wide = torch.complex128 if dtype.is_complex else torch.float64
    for sample in _samples(name, dtype):
        tensors = (sample.input, *sample.args)
        actual = OURS[name](*tensors, **sample.kwargs)
        expected = OPS[name].op(*(t if t is None else t.to(wide) for t in tensors), **sample.kwargs)
        assert actual.dtype == dtype
        scale = expected.abs().max().item()
        assert_close(actual, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize(("name", "error"), _errors(of_dtype=True))
def test_dtypes_that_differ_raise(name: str, error: ErrorInput) -> None:
    sample = error.sample_input
    with pytest.raises(RuntimeError, match=error.error_regex):
        OURS[name](sample.input, *sample.args, **sample.kwargs)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("name", "error"), _errors(of_dtype=False))
def test_error_inputs_raise(name: str, error: ErrorInput, device: str) -> None:
    sample = error.sample_input
    tensors = [t.to(device) for t in (sample.input, *sample.args)]
    with pytest.raises(ArgumentError, match=OURS[name].__name__) as caught:
        OURS[name](*tensors, **sample.kwargs)
    values = [f"{key}={value!r}" for key, value in sample.kwargs.items()]
    weight = str(tuple(sample.args[0].shape))
    assert any(v in str(caught.value) for v in [*values, weight]), caught.value


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"stride": -1}, "stride=-1"),
        ({"padding": -1}, "padding=-1"),
        ({"dilation": -1}, "dilation=-1"),
        ({"output_padding": -1}, "output_padding=-1"),
        ({"output_padding": 2, "stride": 2}, "output_padding=(2"),
        ({"padding": "same"}, "padding='same'"),
        ({"padding": 4}, "padding=4"),
        ({"groups": 0}, "groups=0"),
        ({"groups": -1}, "groups=-1"),
        ({"groups": 3}, "groups=3"),
        ({"stride": (1, 1, 1, 1)}, "stride=(1, 1, 1, 1)"),
        ({"bias": (3,)}, "bias has shape (3,)"),
    ],
)
def test_transposed_errors(dims: int, kwargs: dict[str, object], message: str, device: str) -> None:
    """torch keeps no error inputs for the transposed functions."""
    name = f"nn.functional.conv_transpose{dims}d"
    x = torch.ones(2, 4, *[4] * dims, device=device)
    weight = torch.ones(4, 1, *[3] * dims, device=device)
    arguments = {"groups": 2, **kwargs}
    if "bias" in arguments:
        arguments["bias"] = torch.ones(arguments["bias"], device=device)
    with pytest.raises(ArgumentError) as caught:
        OURS[name](x, weight, **arguments)
    assert message in str(caught.value)
    assert OURS[name].__name__ in str(caught.value)


def test_signatures_are_torchs() -> None:
    """Names and order of the arguments, which a positional call depends on."""
    for name, ours in OURS.items():
        names = ours.__code__.co_varnames[: ours.__code__.co_argcount]
        doc = getattr(torch_functional, name.removeprefix("nn.functional.")).__doc__
        listed = doc[doc.index("(") + 1 : doc.index(")")].split(", ")
        assert list(names) == [argument.split("=")[0] for argument in listed]
