"""Spaces and ties on small networks written by hand."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupconv.errors import GroupConvError
from groupconv.nn import ChannelPermutation
from groupconv.optimize.trace import Space, Trace, TracedConv, trace

X = torch.ones(2, 4, 8, 8)


class Net(nn.Module):
    """Named modules and a forward pass given as a function."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def conv(in_channels: int, out_channels: int, kernel: int = 1, **kwargs: object) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, **kwargs)


def traced(forward: Callable[..., Tensor], **modules: nn.Module) -> Trace:
    return trace(Net(forward, **{"a": conv(4, 6), "b": conv(6, 2), **modules}), (X,))


def found(result: Trace, name: str) -> TracedConv:
    return next(c for c in result.convs if c.name == name)


def after(result: Trace, name: str) -> Space:
    return result.spaces[found(result, name).output_space]


def members(space: Space) -> set[tuple[str, str, int]]:
    return {(m.module, m.parameter, m.axis) for m in space.members}


def test_chain_with_batch_norm() -> None:
    result = traced(
        lambda net, x: net.b(F.max_pool2d(net.relu(net.bn(net.a(x))), 2)),
        a=conv(4, 6, 3, bias=False),
        bn=nn.BatchNorm2d(6),
        relu=nn.ReLU(inplace=True),
        b=conv(6, 5),
    )
    a, b = result.convs
    assert [(c.name, c.batch_norm) for c in result.convs] == [("a", "bn"), ("b", None)]
    assert result.skipped == {}
    assert (a.spec.in_channels, a.spec.out_channels, a.spec.kernel_size) == (4, 6, (3, 3))
    assert (a.spec.batch, a.spec.input_size, b.spec.input_size) == (2, (8, 8), (4, 4))
    assert a.spec.padding == ((1, 1), (1, 1))
    assert a.output_space == b.input_space
    assert result.spaces[a.input_space].fixed == "input of the network"
    assert result.spaces[b.output_space].fixed == "output of the network"
    between = after(result, "a")
    assert (between.fixed, between.channels) == (None, 6)
    norm = [("bn", name, 0) for name in ("weight", "bias", "running_mean", "running_var")]
    assert members(between) == {("a", "weight", 0), *norm, ("b", "weight", 1)}
    assert members(result.spaces[b.output_space]) == {("b", "weight", 0), ("b", "bias", 0)}


def test_addition_joins() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.d(F.relu(x + net.c(F.relu(net.b(x)))))

    result = traced(forward, b=conv(6, 3), c=conv(3, 6), d=conv(6, 2))
    joined = after(result, "a")
    assert after(result, "c") is joined
    assert result.spaces[found(result, "d").input_space] is joined
    assert result.spaces[found(result, "b").input_space] is joined
    assert after(result, "b") is not joined
    assert joined.fixed is None
    weights = {(module, axis) for module, name, axis in members(joined) if name == "weight"}
    assert weights == {("a", 0), ("b", 1), ("c", 0), ("d", 1)}


def test_addition_of_the_input_fixes() -> None:
    for add in (lambda net, x: net.b(x + net.a(x)), lambda net, x: net.b(net.a(x) + x)):
        result = traced(add, a=conv(4, 4), b=conv(4, 4))
        assert found(result, "a").input_space == found(result, "a").output_space
        assert after(result, "a").fixed == "input of the network"


def test_depthwise_keeps_the_space() -> None:
    result = traced(lambda net, x: net.c(net.b(net.a(x))), b=conv(6, 6, 3, groups=6), c=conv(6, 2))
    assert [c.name for c in result.convs] == ["a", "b", "c"]
    assert after(result, "a") is after(result, "b")
    assert after(result, "a").fixed is None
    assert {("b", "weight", 0), ("b", "bias", 0)} < members(after(result, "a"))


def test_grouped_layer_fixes_both_sides() -> None:
    result = traced(lambda net, x: net.c(net.b(net.a(x))), b=conv(6, 6, groups=2), c=conv(6, 2))
    assert after(result, "a").fixed == "read by b, already in 2 groups"
    assert after(result, "b").fixed == "written by b, already in 2 groups"


def test_squeeze_and_excite() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = net.a(x)
        gate = torch.sigmoid(net.up(F.relu(net.down(F.adaptive_avg_pool2d(x, 1)))))
        return net.b(x * gate)

    result = traced(forward, down=conv(6, 3), up=conv(3, 6))
    assert after(result, "up") is after(result, "a")
    assert after(result, "a").fixed is None
    assert after(result, "down").fixed is None
    assert after(result, "down") is not after(result, "a")


@pytest.mark.parametrize(
    ("reason", "forward"),
    [
        ("read by mul", lambda net, x: net.b(net.a(x) * net.one(x))),
        ("read by cat", lambda net, x: net.c(torch.cat([net.a(x), net.a2(x)], 1))),
        ("read by flatten", lambda net, x: net.fc(net.a(x).flatten(1))),
        ("read by linear", lambda net, x: F.linear(net.a(x).mean((2, 3)), net.head[0])),
        ("read by permute", lambda net, x: net.last(net.a(x).permute(0, 2, 3, 1))),
        ("read by mean", lambda net, x: net.a(x).mean((1, 2, 3)).sigmoid()),
        ("read by select", lambda net, x: F.max_pool2d(net.a(x)[:, 0], 2)),
    ],
)
def test_what_fixes_its_input(reason: str, forward: Callable[..., Tensor]) -> None:
    result = traced(
        forward,
        a2=conv(4, 3),
        one=conv(4, 1),
        c=conv(9, 2),
        fc=nn.Linear(384, 2),
        head=nn.ParameterList([torch.ones(2, 6)]),
        last=nn.Linear(6, 2),
    )
    assert after(result, "a").fixed == reason
    # Nor can what it writes be reordered.
    assert all(space.fixed is not None for space in result.spaces)


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
        lambda x: F.adaptive_avg_pool2d(x, 1).view(2, 6),
        lambda x: x.mean((2, 3)),
        lambda x: x.mean((-2, -1), keepdim=True).flatten(1),
    ],
)
def test_global_pool_and_linear_are_free(pool: Callable[[Tensor], Tensor]) -> None:
    result = traced(
        lambda net, x: net.fc(net.drop(pool(net.a(x)))), drop=nn.Dropout(), fc=nn.Linear(6, 2)
    )
    space, writers = after(result, "a"), {("a", "weight", 0), ("a", "bias", 0)}
    assert space.fixed is None
    assert members(space) == writers | {("fc", "weight", 1)}


def test_module_called_twice_is_skipped() -> None:
    result = traced(
        lambda net, x: net.c(net.b(F.relu(net.b(net.a(x))))), b=conv(6, 6), c=conv(6, 2)
    )
    assert [c.name for c in result.convs] == ["a", "c"]
    assert result.skipped == {"b": "called 2 times in one pass"}
    assert after(result, "a").fixed == "b is used in several places"
    assert result.spaces[found(result, "c").input_space].fixed == "b is called 2 times in one pass"


def test_weight_that_is_no_modules() -> None:
    result = traced(
        lambda net, x: net.b(F.conv2d(net.a(x), net.kernels[0])),
        kernels=nn.ParameterList([torch.ones(5, 6, 1, 1)]),
        b=conv(5, 2),
    )
    assert result.skipped == {"conv2d_1": "weight is not the parameter of a convolution module"}
    assert after(result, "a").fixed == "read by conv2d_1"
    assert result.spaces[found(result, "b").input_space].fixed == "written by conv2d_1"


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.b(F.conv2d(net.a(x), net.c.weight, stride=2)),
        lambda net, x: net.b(net.c(net.a(x)) + F.conv2d(x[:, :1], net.c.weight[:, :1])),
        lambda net, x: net.b(net.c(net.a(x)) * net.c.weight.sum()),
    ],
)
def test_weight_read_outside_its_module_is_skipped(forward: Callable[..., Tensor]) -> None:
    result = traced(forward, c=conv(6, 6))
    assert [c.name for c in result.convs] == ["a", "b"]
    assert "its weight is read by" in result.skipped["c"]
    assert after(result, "a").fixed is not None
    assert result.spaces[found(result, "b").input_space].fixed is not None


def test_modules_with_one_weight_are_skipped() -> None:
    net = Net(lambda net, x: net.c(net.b(net.a(x))), a=conv(4, 4), b=conv(4, 4), c=conv(4, 4))
    net.b.weight = net.a.weight
    result = trace(net, (X,))
    assert [c.name for c in result.convs] == ["c"]
    assert all(space.fixed is not None for space in result.spaces)


def test_shared_batch_norm() -> None:
    result = traced(
        lambda net, x: net.c(net.bn(net.b(F.relu(net.bn(net.a(x)))))),
        a=conv(4, 6, bias=False),
        b=conv(6, 6, bias=False),
        c=conv(6, 2),
        bn=nn.BatchNorm2d(6),
    )
    assert after(result, "a").fixed == after(result, "b").fixed == "bn is used in several places"
    # Its mean can't take the bias of either.
    assert [c.batch_norm for c in result.convs] == [None, None, None]


def test_batch_norm_beside_another_reader() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.b(net.bn(x) + x)

    result = traced(forward, bn=nn.BatchNorm2d(6))
    assert found(result, "a").batch_norm is None
    assert after(result, "a").fixed is None


def test_functional_batch_norm_fixes() -> None:
    result = traced(
        lambda net, x: net.b(F.batch_norm(net.a(x), *net.stats)),
        stats=nn.ParameterList([torch.zeros(6), torch.ones(6)]).requires_grad_(False),
    )
    assert found(result, "a").batch_norm is None
    assert after(result, "a").fixed == "batch norm without a module"


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("calls", [1, 2])
def test_other_padding_modes_are_skipped(mode: str, calls: int) -> None:
    result = traced(
        lambda net, x: net.a(net.a(x) if calls == 2 else x), a=conv(4, 4, 3, padding_mode=mode)
    )
    assert result.convs == ()
    assert f"padding_mode='{mode}'" in result.skipped["a"]


def test_learned_input_of_a_grouped_layer() -> None:
    result = traced(
        lambda net, x: net.a(net.latent[0]) + x,
        latent=nn.ParameterList([torch.ones(1, 4, 8, 8)]),
        a=conv(4, 4, groups=2),
    )
    assert [c.name for c in result.convs] == ["a"]


def test_explicit_permutation() -> None:
    order = (2, 0, 1, 3, 5, 4)
    result = traced(lambda net, x: net.b(net.p(net.a(x))), p=ChannelPermutation(order))
    (moved,) = result.permutations
    assert (moved.name, moved.order) == ("p", order)
    assert (moved.free_in, moved.free_out) == (True, True)
    assert result.spaces[moved.input_space] is after(result, "a")
    assert moved.output_space == found(result, "b").input_space


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv3d])
def test_other_dimensions(layer: type[nn.Module]) -> None:
    dims = 1 if layer is nn.Conv1d else 3
    model = nn.Sequential(layer(4, 6, 2, padding="same"), nn.ReLU(), layer(6, 2, 1))
    result = trace(model, (torch.ones(2, 4, *[5] * dims),))
    assert [c.name for c in result.convs] == ["0", "2"]
    assert found(result, "0").spec.padding == ((0, 1),) * dims
    assert after(result, "0").fixed is None


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(conv(4, 4), nn.BatchNorm2d(4), nn.Dropout()).train()
    model[1].eval()
    trace(model, (X,))
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert int(model[1].num_batches_tracked) == 0


def test_a_model_that_cannot_be_exported() -> None:
    model = Net(lambda net, x: net.a(x) if x.sum() > 0 else x, a=conv(4, 4)).train()
    with pytest.raises(GroupConvError, match=r"Net can't be traced by torch\.export"):
        trace(model, (X,))
    assert model.training
