"""Random legal specifications against the reference, and random illegal ones against the errors."""

from typing import NamedTuple

import pytest
import torch
from compare import assert_close
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from groupconv import nn as our_nn
from groupconv.errors import ArgumentError
from groupconv.kernels.reference import group_conv_reference
from groupconv.kernels.spec import ConvSpec, same_padding
from groupconv.nn import functional as ours

FUNCTIONS = {
    False: (ours.group_conv1d, ours.group_conv2d, ours.group_conv3d),
    True: (ours.group_conv_transpose1d, ours.group_conv_transpose2d, ours.group_conv_transpose3d),
}
LAYERS = {
    False: (our_nn.GroupConv1d, our_nn.GroupConv2d, our_nn.GroupConv3d),
    True: (
        our_nn.GroupConvTranspose1d,
        our_nn.GroupConvTranspose2d,
        our_nn.GroupConvTranspose3d,
    ),
}


def budget(examples: int) -> settings:
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


class Case(NamedTuple):
    """A convolution, and how it is called."""

    spec: ConvSpec
    bias: bool
    batched: bool
    same: bool
    seed: int

    @property
    def function_arguments(self) -> dict[str, object]:
        spec = self.spec
        arguments: dict[str, object] = {
            "stride": spec.stride,
            "padding": "same" if self.same else tuple(before for before, _ in spec.padding),
            "dilation": spec.dilation,
            "groups": spec.groups,
        }
        if spec.transposed:
            arguments["output_padding"] = spec.output_padding
        return arguments

    @property
    def layer_arguments(self) -> dict[str, object]:
        return {
            "in_channels": self.spec.in_channels,
            "out_channels": self.spec.out_channels,
            "kernel_size": self.spec.kernel_size,
            "bias": self.bias,
            **self.function_arguments,
        }

    def layer(self, **changes: object) -> nn.Module:
        cls = LAYERS[self.spec.transposed][len(self.spec.input_size) - 1]
        return cls(**{**self.layer_arguments, **changes})

    def function(self, *tensors: Tensor | None, **changes: object) -> Tensor:
        function = FUNCTIONS[self.spec.transposed][len(self.spec.input_size) - 1]
        return function(*tensors, **{**self.function_arguments, **changes})

    def tensors(self) -> list[Tensor | None]:
        """Input, weight and bias in float64."""
        spec, generator = self.spec, torch.Generator().manual_seed(self.seed)
        shapes = [(spec.batch, spec.in_channels, *spec.input_size), spec.weight_shape]
        if not self.batched:
            shapes[0] = shapes[0][1:]
        drawn: list[Tensor | None] = [
            torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
        ]
        bias = torch.randn(spec.out_channels, generator=generator, dtype=torch.float64)
        return [*drawn, bias if self.bias else None]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dims = draw(st.integers(1, 3))
    transposed = draw(st.booleans())
    groups = draw(st.integers(1, 5))

    def per_axis(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, stride, dilation = per_axis(1, 3), per_axis(1, 3), per_axis(1, 3)
    same = not transposed and set(stride) == {1} and draw(st.booleans())
    padding: tuple[tuple[int, int], ...]
    if same:
        padding = tuple(same_padding(kernel, dilation))
    else:
        padding = tuple((p, p) for p in per_axis(0, 3))
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    extra: tuple[int, ...] = ()
    if transposed:
        extra = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
        # (n - 1) * stride + span + extra > before + after
        least = [
            max(1, (2 * p - span - e) // s + 2)
            for (p, _), span, e, s in zip(padding, spans, extra, stride, strict=True)
        ]
    else:
        least = [
            max(1, span - before - after)
            for (before, after), span in zip(padding, spans, strict=True)
        ]
    batched = draw(st.booleans())
    spec = ConvSpec(
        batch=draw(st.integers(0, 3)) if batched else 1,
        in_channels=groups * draw(st.integers(1, 3)),
        out_channels=groups * draw(st.integers(1, 3)),
        input_size=tuple(n + draw(st.integers(0, 3)) for n in least),
        kernel_size=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        transposed=transposed,
        output_padding=extra,
    )
    return Case(spec, draw(st.booleans()), batched, same, draw(st.integers(0, 2**32 - 1)))


def check_against_reference(case: Case) -> None:
    """Function and layer: output and all gradients equal the reference's, in float64."""
    mine, other = (
        [None if t is None else t.clone().requires_grad_() for t in case.tensors()]
        for _ in range(2)
    )
    actual = case.function(*mine)
    image = other[0] if case.batched else other[0][None]
    expected = group_conv_reference(case.spec, image, *other[1:])
    assert tuple(expected.shape[2:]) == case.spec.output_size
    expected = expected if case.batched else expected[0]
    assert_close(actual, expected, rtol=1e-11, atol=1e-11)

    layer = case.layer(dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(mine[1])
        if case.bias:
            layer.bias.copy_(mine[2])
    x = mine[0].detach().clone().requires_grad_()
    from_layer = layer(x)
    assert_close(from_layer, expected, rtol=1e-11, atol=1e-11)

    seed = torch.randn_like(expected)
    for out in (actual, from_layer, expected):
        out.backward(seed)
    for a, b, c in zip(mine, [x, layer.weight, layer.bias], other, strict=True):
        if c is not None:
            assert_close(a.grad, c.grad, rtol=1e-10, atol=1e-10)
            assert_close(b.grad, c.grad, rtol=1e-10, atol=1e-10)


@budget(300)
@given(cases())
def test_legal_specifications(case: Case) -> None:
    check_against_reference(case)


@pytest.mark.slow
@budget(5000)
@given(cases())
def test_legal_specifications_at_length(case: Case) -> None:
    check_against_reference(case)


@st.composite
def illegal_changes(draw: st.DrawFn) -> tuple[Case, str, object]:
    """A legal case, an argument of function and constructor, and a value it must not have."""
    case = draw(cases())
    spec, dims = case.spec, len(case.spec.input_size)
    names = ["stride", "padding", "dilation", "groups"]
    name = draw(st.sampled_from(names + ["output_padding"] * spec.transposed))
    not_integers = st.sampled_from([None, 1.0, 2.5, "1", True, "full"])
    if name == "groups":
        not_divisors = st.integers(2, 40).filter(lambda g: spec.in_channels % g != 0)
        return case, name, draw(st.one_of(st.integers(max_value=0), not_divisors, not_integers))
    minimum = 1 if name in ("stride", "dilation") else 0
    legal = st.integers(minimum, 3)
    faulty = st.one_of(st.integers(max_value=minimum - 1), not_integers)
    values = [draw(legal) for _ in range(dims)]
    values[draw(st.integers(0, dims - 1))] = draw(faulty)
    wrong_length = st.lists(legal, max_size=5).filter(lambda v: len(v) not in (1, dims))
    options = [faulty, st.just(tuple(values)), wrong_length.map(tuple)]
    if name == "output_padding":  # legal by itself, but not below stride and dilation
        limits = [max(s, d) for s, d in zip(spec.stride, spec.dilation, strict=True)]
        options.append(st.tuples(*[st.integers(n, n + 3) for n in limits]))
    return case, name, draw(st.one_of(options))


def check_refused(case: Case, name: str, value: object) -> None:
    for device in ("cpu", "meta"):
        tensors = [None if t is None else t.to(device) for t in case.tensors()]
        for call in (
            lambda tensors=tensors: case.function(*tensors, **{name: value}),
            lambda device=device: case.layer(**{name: value}, device=device),
        ):
            with pytest.raises(ArgumentError) as caught:
                call()
            assert f"{name}={value!r}" in str(caught.value)


@budget(300)
@given(illegal_changes())
def test_illegal_arguments(change: tuple[Case, str, object]) -> None:
    check_refused(*change)


@pytest.mark.slow
@budget(5000)
@given(illegal_changes())
def test_illegal_arguments_at_length(change: tuple[Case, str, object]) -> None:
    check_refused(*change)


@budget(200)
@given(cases(), st.integers(0, 2), st.integers(-1, 3))
def test_illegal_tensors(case: Case, which: int, axis: int) -> None:
    """An axis that is missing, empty, or too long for the others; on both devices alike."""
    shapes = [None if t is None else list(t.shape) for t in case.tensors()]
    shape = shapes[which]
    assume(shape is not None)
    channels = [1 if case.batched else 0, 0, 0][which]
    if axis == -1:
        shape.insert(0, 1)  # one axis more; a second one for an unbatched input
        if which == 0 and not case.batched:
            shape.insert(0, 1)
    elif axis < len(shape) and not (which == 0 and case.batched and axis == 0):
        shape[axis] = 0
    else:
        assume(case.spec.transposed or which != 1)  # more filters are no fault of the weight's
        shape[channels] += case.spec.groups
    for device in ("cpu", "meta"):
        tensors = [None if s is None else torch.ones(s, device=device) for s in shapes]
        with pytest.raises(ArgumentError) as caught:
            case.function(*tensors)
        message = str(caught.value)
        assert str(tuple(shape)) in message or (which == 0 and f"= {shape[channels]}" in message)


@budget(200)
@given(cases().filter(lambda c: not c.same), st.data())
def test_images_too_small_for_the_kernel_or_padding(case: Case, data: st.DataObject) -> None:
    """One pixel short of the smallest that gives an output, along one axis."""
    spec = case.spec
    axis = data.draw(st.integers(0, len(spec.input_size) - 1))
    x, *rest = case.tensors()
    if spec.transposed:
        before, _ = spec.padding[axis]
        span = spec.dilation[axis] * (spec.kernel_size[axis] - 1) + 1 + spec.output_padding[axis]
        assume(span <= 2 * before)  # otherwise a single pixel is enough
        size = max(1, (2 * before - span) // spec.stride[axis] + 1)
    else:
        span = spec.dilation[axis] * (spec.kernel_size[axis] - 1) + 1
        size = span - sum(spec.padding[axis]) - 1
        assume(size >= 1)
    x = x.narrow(axis - len(spec.input_size), 0, size)
    for device in ("cpu", "meta"):
        with pytest.raises(ArgumentError, match=f"along spatial axis {axis} "):
            case.function(x.to(device), *[t if t is None else t.to(device) for t in rest])
