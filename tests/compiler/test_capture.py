"""What people write with PyTorch, recorded as a graph and compiled."""

from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiler.eager import Function, agree, captured, cuts, numbers, runs
from networks import residual
from torch import Tensor, nn

import groupconv
from groupconv import GroupConvError
from groupconv.compiler.graph import Convolution, Map, Relayout

IMAGE = numbers(2, 6, 5, 7)


def conv(into: int = 6, out: int = 6, kernel: int = 3, **more: Any) -> nn.Conv2d:
    torch.manual_seed(into + out)
    return nn.Conv2d(into, out, kernel, padding=kernel // 2, **more)


def native(module: nn.Module, *inputs: Tensor) -> groupconv.compiler.compiled.Compiled:
    """Equal to eager, and all of it native."""
    compiled = agree(module, *inputs)
    assert cuts(compiled) == {}
    return compiled


def test_a_residual_network() -> None:
    native(residual(), numbers(2, 3, 12, 12))


def test_nodes_have_the_names_of_modules() -> None:
    graph, _ = captured(residual(), numbers(1, 3, 12, 12))
    names = [node.name for node in graph.nodes if isinstance(node.operator, Convolution)]
    assert names == ["stem.0", "conv1", "conv2", "fc"]


def test_several_inputs() -> None:
    module = Function(lambda c, x, y, z: c(x) * y + z, conv())
    native(module, IMAGE, numbers(2, 6, 5, 7, seed=1), numbers(1, 6, 1, 1, seed=2))


def test_the_same_tensor_twice() -> None:
    native(Function(lambda c, x, y: c(x) + y, conv()), IMAGE, IMAGE)


def test_unused_inputs() -> None:
    native(Function(lambda c, x, y, z: c(z), conv()), numbers(3), numbers(2, 2), IMAGE)


Pair = namedtuple("Pair", ["first", "second"])


@pytest.mark.parametrize(
    "made",
    [
        lambda a, b: (a, b),
        lambda a, b: [a, [b, (a,)]],
        lambda a, b: {"out": a, "aux": {"deep": b}},
        lambda a, b: OrderedDict(out=a, aux=b),
        lambda a, b: Pair(b, a),
        lambda a, b: (a,),
        lambda a, b: (),
    ],
    ids=["tuple", "lists", "dicts", "ordered", "named", "one", "none"],
)
def test_structured_outputs(made: Any) -> None:
    def forward(c: nn.Module, x: Tensor) -> Any:
        y = c(x)
        return made(y, y.mean((2, 3)))

    native(Function(forward, conv()), IMAGE)


def test_an_output_that_is_an_input() -> None:
    module = Function(lambda c, x, y: (x, c(x), y), conv())
    compiled = native(module, IMAGE, numbers(3))
    x, y = IMAGE.clone(), numbers(3)
    same, _, other = compiled(x, y)
    assert same.data_ptr() == x.data_ptr()
    assert other.data_ptr() == y.data_ptr()


def test_a_view_of_an_input_as_output() -> None:
    native(Function(lambda x: (x.flatten(1), x[:, 2:4], x.permute(0, 2, 3, 1))), IMAGE)


def test_an_output_twice() -> None:
    def forward(c: nn.Module, x: Tensor) -> Any:
        y = c(x)
        return y, y, y.view_as(y), y.flatten(1), y.relu(), y

    native(Function(forward, conv()), IMAGE)


def test_outputs_that_others_are_made_of() -> None:
    """None may be overwritten by what follows it, nor by the next call."""

    def forward(c: nn.Module, x: Tensor) -> Any:
        a = c(x)
        b = a + 1
        d = torch.cat([a, b], 1)
        return a, b, d, d[:, 3:9].relu(), c(b.relu())

    compiled = native(Function(forward, conv()), IMAGE)
    first = compiled(IMAGE)
    copies = [y.clone() for y in first]
    compiled(2 * IMAGE)
    assert all(map(torch.equal, first, copies))


def test_integer_inputs() -> None:
    embedding = nn.Embedding(10, 6)
    module = Function(lambda e, i, x: e(i) + x, embedding)
    compiled = agree(module, torch.tensor([[1, 2, 9], [0, 0, 3]]), numbers(2, 3, 6))
    assert list(cuts(compiled)) == ["aten.embedding.default"]
    compiled = agree(Function(lambda i: (i, i + 1, i.flatten())), torch.arange(6).view(2, 3))
    assert "other numbers than float32" in cuts(compiled)["aten.add.Tensor"]


def test_a_mask() -> None:
    module = Function(lambda c, x, m: c(x).masked_fill(m, 0.0).relu(), conv())
    mask = numbers(2, 6, 5, 7, seed=3) > 0
    assert list(cuts(agree(module, IMAGE, mask))) == ["aten.masked_fill.Scalar"]


class Buffers(nn.Module):
    """A table of positions, constants made on the way, and some of them returned."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()
        self.register_buffer("table", numbers(1, 6, 5, 7, seed=4))
        self.register_buffer("count", torch.tensor(3))
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.shift = nn.Parameter(numbers(6, 1, 1, seed=5))
        self.plain = numbers(6, 1, 1, seed=6)
        self.eval()

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x + self.table.sigmoid()) * self.scale + self.shift
        y = y * self.plain + torch.ones(1, 6, 1, 1) - torch.arange(6.0)[:, None, None]
        return y, self.table, self.scale, self.count, self.shift.exp(), torch.zeros(2, 3)


def test_buffers_and_constants() -> None:
    native(Buffers(), IMAGE)


def test_returned_constants_are_copies() -> None:
    module = Buffers()
    compiled = groupconv.compile(module, IMAGE)
    compiled(IMAGE)[1].zero_()
    runs(compiled, module, IMAGE)


def test_a_network_of_constants_alone() -> None:
    native(Function(lambda x: (torch.ones(2, 3), x.new_zeros(4))), IMAGE)


def test_single_numbers() -> None:
    """Tensors without axes."""
    module = Function(lambda x, s: (x.mean(), x * s, s, s + 1, x.sum() * s))
    agree(module, IMAGE, torch.tensor(2.5))


def test_shared_modules() -> None:
    shared = nn.Sequential(conv(), nn.BatchNorm2d(6))
    native(Function(lambda s, x: s(s(x).relu()) + s(x), shared), IMAGE)


def test_in_place_operators() -> None:
    def forward(c: nn.Module, x: Tensor) -> Tensor:
        y = c(x)
        y += x
        F.relu_(y)
        y.mul_(2).clamp_(max=1.5)
        y[:, 1:3] += 1
        y[:, 0] = x[:, 1]
        y.view(2, 3, 2, 35)[:, 1].neg_()
        return y.add_(x, alpha=0.5)

    agree(Function(forward, conv()), IMAGE)


def test_in_place_on_an_input() -> None:
    with pytest.raises(GroupConvError, match="changes an input while it runs"):
        groupconv.compile(Function(lambda x: x.relu_() + 1), IMAGE)


def test_views_of_views() -> None:
    def forward(c: nn.Module, x: Tensor) -> Tensor:
        y = c(x).view(2, 2, 3, 35).transpose(1, 2)[:, 1:].reshape(2, 4, 5, 7)
        a, b = y.chunk(2, 1)
        return torch.stack([b, a], 2).flatten(1, 2).contiguous()[:, ::2]

    native(Function(forward, conv()), IMAGE)


class Attributes(nn.Module):
    """Python that runs once: attributes, loops, lists of modules, numbers kept aside."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(conv(6 + 2 * i, 8 + 2 * i, 1) for i in range(3))
        self.extra = nn.ModuleDict({"side": conv(12, 4, 1)})
        self.depth, self.options = 3, {"slope": 0.3}
        self.seen: tuple[int, ...] = ()
        self.eval()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.seen = tuple(x.shape)
        features = []
        for stage in self.stages[: self.depth]:
            x = F.leaky_relu(stage(x), self.options["slope"])
            features.append(x)
        if x.shape[-1] > 3:
            x = F.max_pool2d(x, 2)
        n, c, *_ = x.size()
        features.append(self.extra["side"](x).reshape(n, c // 3, -1).mean(-1))
        return {str(i): y for i, y in enumerate(features)}


def test_attributes_loops_and_control_flow_on_shapes() -> None:
    module = Attributes()
    compiled = agree(module, IMAGE)
    narrow = numbers(1, 6, 4, 3)
    runs(compiled, module, narrow)
    assert len(compiled.programs) == 2


def test_dropout_and_others_that_do_nothing() -> None:
    parts = nn.Sequential(
        conv(), nn.Dropout(0.5), nn.Dropout2d(0.5), nn.AlphaDropout(0.5), nn.Identity(),
        nn.FeatureAlphaDropout(0.5), nn.RReLU(), nn.Softmax2d(),
    ).eval()  # fmt: skip
    native(Function(lambda p, x: F.dropout(p(x), 0.5, training=False), parts), IMAGE)


def test_module_without_parameters() -> None:
    native(nn.ReLU().eval(), IMAGE)
    native(nn.Identity().eval(), IMAGE)


def test_exported_programs() -> None:
    module = nn.Sequential(conv(), nn.ReLU()).eval()
    exported = torch.export.export(module, (IMAGE,)).module(check_guards=False)
    graph, _ = captured(exported, IMAGE)
    assert [type(node.operator) for node in graph.nodes] == [Convolution, Map, Relayout]


def test_weight_normalisation() -> None:
    """Weights that are computed from parameters alone are constants."""
    normed = nn.utils.parametrizations.weight_norm(conv())
    spectral = nn.utils.parametrizations.spectral_norm(conv()).eval()
    native(nn.Sequential(normed, spectral).eval(), IMAGE)


def test_channels_last_inputs() -> None:
    module = Function(lambda c, x: (c(x), c(x).flatten(1), x, x[:, 1]), conv())
    last = IMAGE.to(memory_format=torch.channels_last)
    compiled = native(module, last)
    assert compiled(last)[0].is_contiguous(memory_format=torch.channels_last)
    runs(compiled, module, IMAGE)
    assert compiled(IMAGE)[0].is_contiguous()


def test_inputs_that_are_not_dense() -> None:
    module = Function(lambda c, x: c(x), conv())
    wide = numbers(2, 6, 5, 14)[..., ::2]
    compiled = native(module, wide)
    runs(compiled, module, numbers(1, 6, 1, 1).expand(2, 6, 5, 7))


def test_empty_parts() -> None:
    """A network with a number of channels that happens to be none."""

    def forward(c: nn.Module, x: Tensor) -> Any:
        nothing = x[:, 6:]
        rows = nothing.flatten(1) @ torch.ones(0, 3)
        return torch.cat([c(x), nothing.relu(), c(x)], 1), nothing + 1, rows

    agree(Function(forward, conv()), IMAGE)


def test_other_dtypes() -> None:
    double = conv().double()
    assert "float32" in cuts(agree(double.eval(), IMAGE.double()))["aten.convolution.default"]
    module = Function(lambda x: x.half().float().relu())
    agree(module, IMAGE)


@pytest.mark.parametrize(
    ("forward", "says"),
    [
        (lambda x: x if x.sum() > 0 else -x, "can't be recorded"),
        (lambda x: x[: int(x.abs().max())], "can't be recorded"),
        (lambda x: x[x > 0], "can't be recorded"),
        (lambda x: x.view(7, 7), "can't be recorded"),
        (lambda x: (x, 3), "returns 3; it must return tensors only"),
        (lambda x: {"loss": None, "x": x}, "returns None; it must return tensors only"),
        (lambda x: x.tolist(), "can't be recorded"),
    ],
    ids=["branch", "number", "mask", "wrong", "integer", "none", "list"],
)
def test_what_depends_on_numbers_is_refused(forward: Any, says: str) -> None:
    with pytest.raises(GroupConvError, match=says):
        groupconv.compile(Function(forward), IMAGE)


def test_a_failed_capture_leaves_the_module_as_it_was() -> None:
    module = residual()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(GroupConvError):
        groupconv.compile(module, numbers(1, 4, 12, 12))
    groupconv.compile(module, numbers(1, 3, 12, 12))
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
