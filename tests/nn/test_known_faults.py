"""Faults that people met elsewhere in grouped convolution, each with its right value.

Left out, because they need more than the layers and a CPU:

- a tensor of more than 2**31 elements on a GPU, the weight gradient of such a tensor on an AMD
  GPU, and the peak memory of bfloat16 conv3d on a GPU: no such device (the shape, the cost and a
  smaller tensor are checked here);
- the same two faults in ONNX files (channels of a ConvTranspose that don't divide, an activation
  fused into a grouped convolution) wait for the exporters; here they are tested on the layers;
- a depthwise layer on 64 channels of 4480 x 2976 pixels takes 7 GB or more: the image is smaller
  here, and the whole one is only checked for its shape.
"""

import pytest
import torch
from compare import assert_close
from torch import Tensor, nn

from groupconv.errors import ArgumentError
from groupconv.kernels.reference import group_conv_reference
from groupconv.kernels.spec import ConvSpec, legal_groups
from groupconv.nn import (
    GroupConv1d,
    GroupConv2d,
    GroupConv3d,
    GroupConvTranspose1d,
    GroupConvTranspose2d,
    GroupConvTranspose3d,
    functional,
)

CONVS = [
    (1, functional.group_conv1d, GroupConv1d),
    (2, functional.group_conv2d, GroupConv2d),
    (3, functional.group_conv3d, GroupConv3d),
]
TRANSPOSED = [
    (1, functional.group_conv_transpose1d, GroupConvTranspose1d),
    (2, functional.group_conv_transpose2d, GroupConvTranspose2d),
    (3, functional.group_conv_transpose3d, GroupConvTranspose3d),
]
every_call = pytest.mark.parametrize(
    ("dims", "function", "layer"), CONVS + TRANSPOSED, ids=lambda v: getattr(v, "__name__", None)
)


# Arguments, messages and padding.


@every_call
@pytest.mark.parametrize("groups", [0, -1, -(2**63)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_groups_is_an_error_not_a_signal(dims, function, layer, groups, device) -> None:
    """Dividing by them, or the least integer by -1, ends the process."""
    ones = torch.ones([1] * (dims + 2), device=device)
    for call in (
        lambda: function(ones, ones, groups=groups),
        lambda: layer(1, 1, 1, groups=groups, device=device),
    ):
        with pytest.raises(ArgumentError, match=f"groups={groups} must be a positive integer"):
            call()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_impossible_weight_is_refused_on_meta_too(device: str) -> None:
    x, weight = torch.ones(2, 12, 30, device=device), torch.ones(3, 2, 3, device=device)
    with pytest.raises(ArgumentError, match="out_channels=3 not divisible by groups=6"):
        functional.group_conv1d(x, weight, groups=6)


def test_function_and_layer_say_which_number_is_not_divisible() -> None:
    message = (
        r"group_?conv2d: out_channels=5 not divisible by groups=2 \(in_channels=4, "
        r"out_channels=5\); nearest legal groups: 1$"
    )
    with pytest.raises(ArgumentError, match=f"(?i){message}"):
        functional.group_conv2d(torch.ones(1, 4, 24, 24), torch.ones(5, 2, 3, 3), groups=2)
    with pytest.raises(ArgumentError, match=f"(?i){message}"):
        GroupConv2d(4, 5, 3, groups=2)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(("dims", "function", "layer"), TRANSPOSED)
def test_transposed_refuses_named_padding_at_once(dims, function, layer, padding) -> None:
    with pytest.raises(ArgumentError, match=f"padding='{padding}'"):
        layer(8, 8, 3, padding=padding, groups=4)
    x, weight = torch.ones(1, 8, *[5] * dims), torch.ones(8, 2, *[3] * dims)
    with pytest.raises(ArgumentError, match=f"padding='{padding}'"):
        function(x, weight, padding=padding, groups=4)


@pytest.mark.parametrize(("padding", "size"), [((0, 1), (18, 10)), ((1, 0), (20, 8))])
def test_circular_padding_on_one_axis_only(padding: tuple[int, int], size: tuple[int, int]) -> None:
    layer = GroupConv2d(6, 6, 3, padding=padding, padding_mode="circular", groups=2)
    x = torch.randn(1, 6, 20, 10)
    rows, columns = (list(range(-p, n + p)) for p, n in zip(padding, (20, 10), strict=True))
    wrapped = x[:, :, [i % 20 for i in rows]][:, :, :, [i % 10 for i in columns]]
    spec = ConvSpec(
        1, 6, 6, tuple(wrapped.shape[2:]), (3, 3), (1, 1), ((0, 0),) * 2, (1, 1), groups=2
    )
    expected = group_conv_reference(spec, wrapped, layer.weight, layer.bias)
    assert layer(x).shape == (1, 6, *size)
    assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_modes_take_one_image(mode: str) -> None:
    layer = GroupConv2d(8, 8, 3, padding=1, padding_mode=mode, groups=4)
    x = torch.randn(8, 6, 6)
    assert layer(x).shape == (8, 6, 6)
    assert_close(layer(x), layer(x[None])[0], rtol=1e-6, atol=1e-6)
    assert_close(layer(x), nn.Conv2d.forward(layer, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 1, 6), (2, 8, 6, 1)])
def test_reflection_states_its_limit(shape: tuple[int, ...]) -> None:
    layer = GroupConv2d(8, 8, 3, padding=1, padding_mode="reflect", groups=4)
    with pytest.raises(ArgumentError, match=r"reflect.*padding=1 needs at least 2 pixels"):
        layer(torch.ones(shape))


def test_arguments_in_the_wrong_slots_are_named() -> None:
    """A row of a configuration file, (in, out, kernel, stride, padding, dilation, groups)."""
    with pytest.raises(ArgumentError) as caught:
        GroupConv2d(69, 64, 3, 1, 1, 1, 4)
    assert str(caught.value) == (
        "GroupConv2d: in_channels=69 not divisible by groups=4 (in_channels=69, out_channels=64); "
        "nearest legal groups: 1"
    )
    assert legal_groups(69, 64) == [1]
    # groups=3 and stride=4 changed places.
    with pytest.raises(ArgumentError) as caught:
        GroupConv2d(69, 66, 3, 3, 1, 1, 4)
    for part in ("GroupConv2d", "in_channels=69", "out_channels=66", "groups=4", "groups: 3"):
        assert part in str(caught.value)
    # A transposed layer has output_padding and groups where a convolution has dilation.
    with pytest.raises(ArgumentError, match=r"output_padding=\(1, 1\) must be smaller than stride"):
        GroupConvTranspose2d(64, 64, 3, 1, 1, 1, 4)


@pytest.mark.parametrize(("groups", "dilation"), [(2, 1), (1, 2), (4, 3)])
@pytest.mark.parametrize(("dims", "function", "layer"), TRANSPOSED)
def test_groups_and_dilation_in_torchs_order(dims, function, layer, groups, dilation) -> None:
    theirs_cls = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    theirs = theirs_cls(4, 4, 3, 1, 0, 0, groups, True, dilation)
    ours = layer(4, 4, 3, 1, 0, 0, groups, True, dilation)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, *[5] * dims)
    assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    by_position = function(x, theirs.weight, theirs.bias, 1, 0, 0, groups, dilation)
    assert_close(by_position, theirs(x), rtol=1e-5, atol=1e-6)


def test_transposed_layer_does_not_ignore_groups() -> None:
    layer = GroupConvTranspose2d(512, 256, 4, stride=2, groups=256)
    assert layer.weight.numel() == 512 * 1 * 16
    assert layer.weight.shape == (512, 1, 4, 4)
    x = torch.zeros(1, 512, 2, 2)
    x[0, 7] = 1  # in the fourth pair, so only output channel 3 may differ from the bias
    changed = (layer(x) - layer(torch.zeros_like(x))).abs().amax((0, 2, 3)).nonzero()
    assert changed.tolist() == [[3]]


# Wrong numbers.


@pytest.mark.parametrize(("dims", "function", "layer"), CONVS + TRANSPOSED)
def test_impulse_reaches_its_own_group_only(dims, function, layer) -> None:
    """With weights of one, a one in channel c gives ones in the outputs of c's group."""
    transposed = issubclass(layer, nn.modules.conv._ConvTransposeNd)
    for inputs, outputs in ((4, 16), (6, 9), (8, 8)):
        for groups in legal_groups(inputs, outputs):
            shape = (inputs, outputs // groups) if transposed else (outputs, inputs // groups)
            weight = torch.ones(*shape, *[1] * dims)
            module = layer(inputs, outputs, 1, groups=groups, bias=False)
            nn.init.ones_(module.weight)
            for channel in range(inputs):
                x = torch.zeros(1, inputs, *[1] * dims)
                x[0, channel] = 1
                group = channel // (inputs // groups)
                expected = [o // (outputs // groups) == group for o in range(outputs)]
                for out in (function(x, weight, groups=groups), module(x)):
                    assert out.flatten().tolist() == expected, (inputs, outputs, groups, channel)


@pytest.mark.parametrize("channels", range(1, 41))
def test_depthwise_weight_gradient_at_every_width(channels: int) -> None:
    """Vector units leave a remainder at some counts; each tap counts the pixels it touches."""
    layer = GroupConv2d(channels, channels, 3, stride=2, padding=1, groups=channels, bias=False)
    nn.init.ones_(layer.weight)
    x = torch.ones(1, channels, 6, 6)
    layer(x).sum().backward()
    expected = torch.tensor([[4.0, 6, 6], [6, 9, 9], [6, 9, 9]]).expand(channels, 1, 3, 3)
    assert_close(layer.weight.grad, expected, rtol=0, atol=0)
    weight = torch.ones_like(layer.weight, requires_grad=True)
    functional.group_conv2d(x, weight, None, 2, 1, 1, channels).sum().backward()
    assert_close(weight.grad, expected, rtol=0, atol=0)


@pytest.mark.parametrize("channels", [1, 4])
def test_bfloat16_sum_of_four_ones(channels: int) -> None:
    x = torch.ones(1, channels, 2, 2, dtype=torch.bfloat16)
    weight = torch.ones(channels, 1, 2, 2, dtype=torch.bfloat16)
    out = functional.group_conv2d(x, weight, groups=channels)
    assert out.flatten().tolist() == [4] * channels
    layer = GroupConv2d(channels, channels, 2, groups=channels, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(layer.weight)
    assert layer(x).flatten().tolist() == [4] * channels


def test_gradients_per_sample_add_up_to_the_batchs() -> None:
    """vmap turns a convolution into one with more groups."""
    layer = GroupConv2d(6, 9, 3, padding=1, groups=3)
    x = torch.randn(5, 6, 7, 7)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    layer(x).square().sum().backward()
    for name, p in layer.named_parameters():
        assert each[name].shape == (5, *p.shape)
        assert_close(each[name].sum(0), p.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("groups", [1, 64, 128])
def test_compiled_depthwise_equals_eager(groups: int, backend: str) -> None:
    """In float32 on a CPU, where no TF32 is used."""
    layer = GroupConv2d(128, 128, 3, padding=1, groups=groups)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    x = torch.randn(2, 128, 9, 9)
    expected = layer(x)
    (slope,) = torch.autograd.grad(expected.square().mean(), layer.weight)
    actual = compiled(x)
    (compiled_slope,) = torch.autograd.grad(actual.square().mean(), layer.weight)
    torch._dynamo.reset()
    assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert_close(compiled_slope, slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_activation_reaches_every_group(
    activation: nn.Module, memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    layer = GroupConv2d(16, 16, 3, padding=1, groups=4)
    x = torch.randn(2, 16, 8, 8).to(memory_format=memory_format)
    plain = layer(x)
    fused = torch.compile(nn.Sequential(layer, activation), backend="aot_eager")(x)
    for before, after in zip(plain.chunk(4, 1), fused.chunk(4, 1), strict=True):
        assert (before < 0).any()
        assert_close(after, activation(before), rtol=1e-5, atol=1e-6)


def test_channels_of_a_transposed_layer_must_divide() -> None:
    for device in ("cpu", "meta"):
        x, w = torch.zeros(1, 32, 14, 14, device=device), torch.zeros(32, 64, 3, 3, device=device)
        with pytest.raises(ArgumentError, match="in_channels=32 not divisible by groups=3"):
            functional.group_conv_transpose2d(x, w, groups=3)
