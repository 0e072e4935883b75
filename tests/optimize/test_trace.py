"""Spaces and ties on small networks written by hand."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d
from traced import Net, X, after, before, conv, found, members, only, traced

from groupconv.errors import GroupConvError
from groupconv.nn import ChannelPermutation
from groupconv.optimize.spaces import Space
from groupconv.optimize.trace import trace


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
    assert a.outputs == b.inputs
    assert before(result, "a").fixed == "input of the network"
    assert after(result, "b").fixed == "output of the network"
    between = after(result, "a")
    assert (between.fixed, between.channels) == (None, 6)
    norm = [("bn", name, 0) for name in ("weight", "bias", "running_mean", "running_var")]
    assert members(result, between) == {("a", "weight", 0), *norm, ("b", "weight", 1)}
    assert members(result, after(result, "b")) == {("b", "weight", 0), ("b", "bias", 0)}


def test_addition_joins() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.d(F.relu(x + net.c(F.relu(net.b(x)))))

    result = traced(forward, b=conv(6, 3), c=conv(3, 6), d=conv(6, 2))
    joined = after(result, "a")
    assert after(result, "c") is joined
    assert before(result, "d") is joined
    assert before(result, "b") is joined
    assert after(result, "b") is not joined
    assert joined.fixed is None
    weights = {(module, axis) for module, name, axis in members(result, joined) if name == "weight"}
    assert weights == {("a", 0), ("b", 1), ("c", 0), ("d", 1)}


def test_addition_of_the_input_fixes() -> None:
    for add in (lambda net, x: net.b(x + net.a(x)), lambda net, x: net.b(net.a(x) + x)):
        result = traced(add, a=conv(4, 4), b=conv(4, 4))
        assert before(result, "a") is after(result, "a")
        assert after(result, "a").fixed == "input of the network"


def test_depthwise_keeps_the_space() -> None:
    result = traced(lambda net, x: net.c(net.b(net.a(x))), b=conv(6, 6, 3, groups=6), c=conv(6, 2))
    assert [c.name for c in result.convs] == ["a", "b", "c"]
    assert after(result, "a") is after(result, "b")
    assert after(result, "a").fixed is None
    assert {("b", "weight", 0), ("b", "bias", 0)} < members(result, after(result, "a"))


def test_grouped_layer_lets_channels_move_within_its_groups() -> None:
    result = traced(lambda net, x: net.c(net.b(net.a(x))), b=conv(6, 6, groups=2), c=conv(6, 2))
    for axis in (found(result, "a").outputs, found(result, "b").outputs):
        assert axis.space is None
        assert axis.spaces[:3] == axis.spaces[:1] * 3 != axis.spaces[3:] == axis.spaces[3:4] * 3
        assert all(result.spaces[s] == Space(3, None) for s in axis.spaces)
    assert found(result, "a").outputs == found(result, "b").inputs


@pytest.mark.parametrize("layer", [conv(6, 1), conv(1, 1, groups=1)])
def test_one_channel_is_not_depthwise(layer: nn.Conv2d) -> None:
    """A layer with a single output or input reads its input as any dense layer does."""
    result = traced(
        lambda net, x: net.c(net.b(net.a(x)[:, : net.b.in_channels])), b=layer, c=conv(1, 4)
    )
    assert only(result, found(result, "b").outputs) is not only(result, found(result, "b").inputs)


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
        ("read by cumsum", lambda net, x: net.b(net.a(x).cumsum(1))),
        ("read by matmul", lambda net, x: net.last(net.a(x).permute(0, 2, 3, 1) @ net.square[0])),
        ("read by argmax", lambda net, x: net.a(x).argmax(1).float()),
        ("output of the network", lambda net, x: net.a(x)),
        ("output of the network", lambda net, x: net.a(x)[:, ::2]),
    ],
)
def test_what_fixes_its_input(reason: str, forward: Callable[..., Tensor]) -> None:
    result = traced(forward, last=nn.Linear(6, 2), square=nn.ParameterList([torch.ones(6, 6)]))
    outputs = found(result, "a").outputs
    assert {result.spaces[s].fixed for s in outputs.spaces} <= {reason, None}
    assert result.spaces[outputs.spaces[0]].fixed == reason


@pytest.mark.parametrize("weights", [torch.arange(6.0).view(1, 6, 1, 1), torch.arange(6.0)])
def test_a_constant_fixes_what_meets_it(weights: Tensor) -> None:
    result = traced(lambda net, x: net.b(net.a(x) * weights.view(1, 6, 1, 1)))
    assert after(result, "a").fixed in ("a constant of the forward pass", "written by view")


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d(6), nn.GroupNorm(1, 6), nn.PReLU(6)])
def test_what_has_a_weight_for_each_channel(norm: nn.Module) -> None:
    result = traced(lambda net, x: net.b(net.norm(net.a(x))), norm=norm)
    assert after(result, "a") == Space(6, None)
    names = [name for name, tensor in norm.state_dict().items() if tensor.shape == (6,)]
    assert {("norm", name, 0) for name in names} <= members(result, after(result, "a"))


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
    assert members(result, space) == writers | {("fc", "weight", 1)}


def test_module_called_twice_is_one_set_of_weights() -> None:
    result = traced(
        lambda net, x: net.c(net.b(F.relu(net.b(net.a(x))))), b=conv(6, 6), c=conv(6, 2)
    )
    assert [c.name for c in result.convs] == ["a", "c"]
    assert result.skipped == {"b": "called 2 times in one pass"}
    assert after(result, "a") is before(result, "c")
    assert after(result, "a") == Space(6, None)


def test_weight_that_is_no_modules() -> None:
    result = traced(
        lambda net, x: net.b(F.conv2d(net.a(x), net.kernels[0])),
        kernels=nn.ParameterList([torch.ones(5, 6, 1, 1)]),
        b=conv(5, 2),
    )
    assert result.skipped == {"conv2d_1": "its weight is not that of a convolution module"}
    assert after(result, "a") == Space(6, None)
    assert before(result, "b") == Space(5, None)


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


def test_modules_with_one_weight_are_tied() -> None:
    net = Net(lambda net, x: net.d(net.c(net.b(net.a(x)))), a=conv(4, 6), d=conv(6, 2))
    net.b, net.c = conv(6, 6), conv(6, 6)
    net.c.weight = net.b.weight
    result = trace(net, (X,))
    assert [c.name for c in result.convs] == ["a", "d"]
    assert after(result, "a") is before(result, "d")
    assert after(result, "a") == Space(6, None)


def test_shared_batch_norm() -> None:
    result = traced(
        lambda net, x: net.c(net.bn(net.b(F.relu(net.bn(net.a(x)))))),
        a=conv(4, 6, bias=False),
        b=conv(6, 6, bias=False),
        c=conv(6, 2),
        bn=nn.BatchNorm2d(6),
    )
    assert after(result, "a") is after(result, "b")
    assert after(result, "a") == Space(6, None)
    # Its mean can't take the bias of either.
    assert [c.batch_norm for c in result.convs] == [None, None, None]


def test_batch_norm_beside_another_reader() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.b(net.bn(x) + x)

    result = traced(forward, bn=nn.BatchNorm2d(6))
    assert found(result, "a").batch_norm is None
    assert after(result, "a").fixed is None


def test_functional_batch_norm() -> None:
    result = traced(
        lambda net, x: net.b(F.batch_norm(net.a(x), *net.stats)),
        stats=nn.ParameterList([torch.zeros(6), torch.ones(6)]).requires_grad_(False),
    )
    assert found(result, "a").batch_norm is None
    assert after(result, "a") == Space(6, None)


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
    assert after(result, "a") is before(result, "b")
    assert found(result, "b").inputs.strands == order


def test_what_follows() -> None:
    result = traced(
        lambda net, x: net.b(F.relu(net.bn(net.a(x))).sigmoid() + x[:, :1]), bn=nn.BatchNorm2d(6)
    )
    assert found(result, "a").then == ("batch_norm", "relu", "sigmoid")
    assert found(result, "b").then == ()


def test_padding_of_a_subclass_belongs_to_the_layer() -> None:
    class Same(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            padded = F.pad(x, (0, 1, 1, 0))
            return F.conv2d(padded, self.weight, self.bias, self.stride, 0, 1, self.groups)

    result = traced(lambda net, x: net.c(net.a(x)), c=Same(6, 6, 2, stride=2))
    assert found(result, "c").spec.padding == ((1, 0), (0, 1))
    assert found(result, "c").spec.input_size == (8, 8)


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


def test_the_parts_of_a_model_that_cannot_be_exported() -> None:
    model = Net(
        lambda net, x: net.block(x) if x.sum() > 0 else net.last(x),
        block=nn.Sequential(conv(4, 6), nn.ReLU(), conv(6, 2)),
        last=conv(4, 4),
    ).train()
    result = trace(model, (X,))
    assert [c.name for c in result.convs] == ["block.0", "block.2"]
    assert "Net can't be traced by torch.export" in result.skipped["Net"]
    assert result.skipped["last"] == "not called"
    assert after(result, "block.0") == Space(6, None)
    assert before(result, "block.0").fixed == "input of block"
    assert after(result, "block.2").fixed == "output of block"
    assert model.training


def test_a_model_of_which_nothing_can_be_exported() -> None:
    model = Net(lambda net, x: F.relu(x) if x.sum() > 0 else x).train()
    with pytest.raises(GroupConvError, match=r"Net can't be traced by torch\.export"):
        trace(model, (X,))
    assert model.training
