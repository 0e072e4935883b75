"""Conversion on networks whose layers hold hidden blocks: permuting alone must change nothing."""

import copy

import numpy as np
import pytest
import torch
from compare import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from traced import capture

from groupconv.errors import DataError
from groupconv.kernels.spec import legal_groups
from groupconv.nn import ChannelPermutation
from groupconv.optimize.convert import Converted, convert
from groupconv.optimize.fit import fit
from groupconv.optimize.moments import layer_moments
from groupconv.optimize.partition import Partition
from groupconv.optimize.refit import refit
from groupconv.optimize.sampling import Sampling
from groupconv.optimize.schur import Regression
from groupconv.optimize.search import Search
from groupconv.optimize.structure import Grouped, Pair
from groupconv.optimize.trace import Addend, Trace, trace
from groupconv.store import Store


class Mixed(nn.Module):
    """Every tie: batch norm, depthwise, squeeze and excite, residual sum, concatenation, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.expand = nn.Conv2d(8, 12, 1, bias=False)
        self.expand_bn = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.down = nn.Conv2d(12, 4, 1)
        self.up = nn.Conv2d(4, 12, 1)
        self.project = nn.Conv2d(12, 8, 1, bias=False)
        self.project_bn = nn.BatchNorm2d(8)
        self.branch = nn.Conv2d(8, 4, (1, 3), bias=False)
        self.merge = nn.Conv2d(12, 8, 3, stride=2, padding="valid")
        self.last = nn.Conv2d(8, 8, 2, dilation=1)
        self.fc = nn.Linear(8, 5)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        out = self.depthwise(self.relu(self.expand_bn(self.expand(x))))
        gate = self.up(self.relu(self.down(out.mean((2, 3), keepdim=True)))).sigmoid()
        x = self.relu(self.project_bn(self.project(out * gate)) + x)
        x = self.merge(torch.cat([self.branch(x), x[..., 2:]], 1))
        return self.fc(self.last(x.relu()).mean((2, 3)))


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 4, 9, 9, generator=torch.Generator().manual_seed(1))


def network(seed: int) -> Mixed:
    """With random weights, and batch norms that have statistics of their own."""
    torch.manual_seed(seed)
    model = Mixed().eval()
    for norm in (model.expand_bn, model.project_bn):
        for tensor in (norm.weight, norm.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)
        for tensor in (norm.bias, norm.running_mean):
            nn.init.normal_(tensor, std=0.3)
    return model


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def every(x: Tensor) -> Sampling:
    """All positions of one batch of images."""
    return Sampling(lambda: [x], images=len(x), max_positions=10**6, seed=0)


@torch.no_grad()
def plant(conv: nn.Conv2d, partition: Partition) -> None:
    """Set to zero the weights that the partition cuts."""
    keep = torch.zeros(conv.out_channels, conv.in_channels, 1, 1)
    rows = np.split(np.array(partition.out_order), partition.groups)
    columns = np.split(np.array(partition.in_order), partition.groups)
    for r, c in zip(rows, columns, strict=True):
        keep[np.ix_(r, c)] = 1
    conv.weight.mul_(keep)


def random_partition(conv: nn.Conv2d, rng: np.random.Generator) -> Partition:
    groups = rng.choice(legal_groups(conv.in_channels, conv.out_channels)[1:])
    orders = (tuple(rng.permutation(n).tolist()) for n in (conv.in_channels, conv.out_channels))
    return Partition(int(groups), *orders)


def permutations_in(converted: Converted) -> int:
    return sum(isinstance(m, ChannelPermutation) for m in converted.model.modules())


def random_plan(seed: int) -> tuple[Mixed, Trace, dict[str, Partition]]:
    """A network, and random partitions for some of its layers in a random order."""
    rng = np.random.default_rng(seed)
    model = network(seed)
    mapped = trace(model, (images(),))
    dense = [conv.name for conv in mapped.convs if conv.spec.groups == 1 and not conv.spec.linear]
    names = rng.permutation(dense)[: rng.integers(1, len(dense) + 1)].tolist()
    return model, mapped, {n: random_partition(model.get_submodule(n), rng) for n in names}


@settings(max_examples=20, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_permuting_changes_nothing(seed: int) -> None:
    model, mapped, partitions = random_plan(seed)
    assert len(mapped.convs) == 10
    for name, partition in partitions.items():
        plant(model.get_submodule(name), partition)
    x, before = images(), copy.deepcopy(model.state_dict())
    expected = outputs(model, x)
    converted = convert(model, mapped, partitions)
    assert_close(outputs(converted.model, x), expected, rtol=1e-5, atol=1e-5)

    assert [p.conv for p in converted.convs] == list(mapped.convs)
    assert {p.conv.name for p in converted.placed} == set(converted.edits) == set(partitions)
    for placed in converted.placed:
        conv = converted.model.get_submodule(placed.module)
        structure = converted.edits[placed.conv.name].structure
        assert structure == Grouped(partitions[placed.conv.name].groups)
        assert conv.groups == partitions[placed.conv.name].groups
        assert conv.weight.shape[1] == conv.in_channels // conv.groups
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} of the original was changed"

    # The weights are the answer already and the ridge pulls towards them: what is left is float32.
    losses = refit(model, converted, every(x), Store(None, ""), {})
    assert losses == pytest.approx(dict.fromkeys(partitions, 0), abs=5e-6)
    assert_close(outputs(converted.model, x), expected, rtol=1e-4, atol=1e-4)


def test_cutting_nonzero_weights_changes_outputs() -> None:
    """What the test above would see."""
    for seed in range(3):
        model, mapped, partitions = random_plan(seed)
        cut = outputs(convert(model, mapped, partitions).model, images())
        assert (cut - outputs(model, images())).abs().max() > 1e-3


FORWARD = tuple(range(8))
MIXED = (5, 0, 3, 6, 1, 7, 2, 4)


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)))


@pytest.mark.parametrize(
    ("partitions", "explicit"),
    [
        ({"1": Partition(2, MIXED, MIXED[::-1])}, 0),
        ({"0": Partition(2, FORWARD, MIXED), "1": Partition(4, MIXED, FORWARD)}, 0),
        ({"0": Partition(2, FORWARD, MIXED), "1": Partition(2, FORWARD, MIXED)}, 1),
        ({"0": Partition(2, MIXED, MIXED)}, 1),
        ({"2": Partition(2, MIXED, MIXED)}, 1),
        ({name: Partition(4, MIXED, MIXED) for name in "012"}, 2),
        ({"0": Partition(2, MIXED, MIXED), "1": Partition(2, FORWARD, MIXED)}, 2),
        # The same channels in every group, in another order: nothing to permute.
        ({"0": Partition(2, (3, 1, 0, 2, 7, 6, 5, 4), MIXED)}, 0),
    ],
)
def test_permutations_are_absorbed_where_possible(
    partitions: dict[str, Partition], explicit: int
) -> None:
    model = chain()
    for name, partition in partitions.items():
        plant(model.get_submodule(name), partition)
    x = torch.randn(2, 8, 5, 5)
    converted = convert(model, trace(model, (x,)), partitions)
    assert permutations_in(converted) == explicit
    assert_close(outputs(converted.model, x), outputs(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("out_order", [MIXED, FORWARD])
def test_both_ends_of_a_residual_sum_share_one_order(out_order: tuple[int, ...]) -> None:
    model = network(0)
    plan = {
        "expand": Partition(4, MIXED, tuple(range(12))),
        "project": Partition(2, tuple(range(12)), out_order),
    }
    for name, partition in plan.items():
        plant(model.get_submodule(name), partition)
    converted = convert(model, trace(model, (images(),)), plan)
    # The first layer gives the sum its order, through the concatenation too.
    assert permutations_in(converted) == (out_order == FORWARD)
    expected = outputs(model, images())
    assert_close(outputs(converted.model, images()), expected, rtol=1e-5, atol=1e-5)


def test_planted_layer_alone() -> None:
    """Blocks behind hidden permutations of both sides, found again from the weights' energy."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1)).eval()
    hidden = Partition(4, *(tuple(rng.permutation(16).tolist()) for _ in range(2)))
    plant(model[0], hidden)
    x = torch.randn(4, 16, 8, 8)
    mapped = trace(model, (x,))
    layers = [(mapped.convs[0], "0")]
    (moments,) = layer_moments(model, layers, every(x))
    found = Search(Regression.of(moments, model[0].weight), seed=0).find(4).partition
    assert fit(moments, model[0].weight, found).loss == pytest.approx(0, abs=1e-9)
    converted = convert(model, mapped, {"0": found})
    assert permutations_in(converted) == 2
    assert converted.placed[0].module == "0.conv"
    refit(model, converted, every(x), Store(None, ""), {})
    assert_close(outputs(converted.model, x), outputs(model, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_means_survive_the_refit(seed: int) -> None:
    """With weights that are truly cut, every layer's mean output is the original's, or that of its
    sum with what is added to it.

    Where a batch norm follows a layer without bias it takes the mean, else the layer has a bias.
    """
    model, mapped, partitions = random_plan(seed)
    x = images(32)
    converted = convert(model, mapped, partitions)
    losses = refit(model, converted, every(x), Store(None, ""), {})
    assert max(losses.values()) > 1e-3
    for placed in converted.placed:
        conv = placed.conv
        read = conv.batch_norm or conv.name
        had_bias = model.get_submodule(conv.name).bias is not None
        assert converted.edits[conv.name].bias == (had_bias or conv.batch_norm is None)
        old, new = (mean_written(net, read, conv.added, x) for net in (model, converted.model))
        assert_close(new, old[list(placed.channels_after)], rtol=1e-4, atol=1e-4)


def mean_written(model: nn.Module, name: str, added: Addend | None, x: Tensor) -> Tensor:
    """Of what a module writes, and of what is added to that."""
    names = [name] if added is None else [name, added.module]
    found = capture(model, names, x)
    written = found[name][1]
    if added is not None:
        written = written + found[added.module][added.output]
    return written.mean((0, 2, 3))


def test_names_that_cannot_be_converted() -> None:
    model = network(0)
    mapped = trace(model, (images(),))
    for name, reason in (
        ("nowhere", "'nowhere' can't be converted: no such layer"),
        ("fc", "fc: groups=2 can't stand in place of a linear layer"),
        ("depthwise", "'depthwise' is depthwise already, groups=12"),
    ):
        with pytest.raises(DataError, match=reason):
            convert(model, mapped, {name: Partition.identity(2, 12, 12)})
    reflecting = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))
    mapped = trace(reflecting, (images(),))
    with pytest.raises(DataError, match=r"'0' can't be converted: .*'reflect'"):
        convert(reflecting, mapped, {"0": Partition.identity(2, 4, 4)})


def test_partitions_that_do_not_fit() -> None:
    model = network(0)
    mapped = trace(model, (images(),))
    with pytest.raises(DataError, match=r"plan: expand: .*nearest legal groups: 2, 4"):
        convert(model, mapped, {"expand": Partition.identity(3, 9, 12)})
    with pytest.raises(DataError, match="expand: groups=0 must be a positive integer"):
        convert(model, mapped, {"expand": Partition(0, FORWARD, tuple(range(12)))})
    with pytest.raises(
        DataError, match="8 input and 8 output channels listed; the layer has 8 and"
    ):
        convert(model, mapped, {"expand": Partition.identity(2, 8, 8)})


def test_every_illegal_layer_is_named_at_once() -> None:
    model = network(0)
    before = copy.deepcopy(model.state_dict())
    wrong = {
        "expand": Grouped(3),
        "stem": Partition.identity(2, 4, 8),
        "nowhere": Grouped(2),
        "project": Pair(9, 2, 1, False),
        "depthwise": Pair(12, 12, 1, False),
        "merge": Partition.identity(2, 8, 8),
    }
    with pytest.raises(DataError) as raised:
        convert(model, trace(model, (images(),)), wrong)
    faults = str(raised.value).removeprefix("plan: ").split("; ")
    told = "; ".join(faults)
    for fault in (
        "expand: in_channels=8 not divisible by groups=3",
        "layer 'nowhere' can't be converted: no such layer",
        "project: first of the pair: ",
        "layer 'depthwise' is depthwise already, groups=12",
        "merge: 8 input and 8 output channels listed; the layer has 12 and 8",
    ):
        assert fault in told
    assert "stem" not in told
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_a_user_set_on_a_layer_stays() -> None:
    model = chain().to(memory_format=torch.channels_last)
    seen: list[torch.Size] = []
    model[1].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    model[1].weight.requires_grad_(False)
    model[0].eval()
    x = torch.randn(2, 8, 5, 5)
    converted = convert(model, trace(model, (x,)), {"1": Partition(2, MIXED, MIXED)})
    seen.clear()
    layer = converted.model[1]
    assert type(layer) is nn.Conv2d
    assert (layer.groups, layer.weight.shape) == (2, (8, 4, 3, 3))
    assert not layer.weight.requires_grad
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert [m.training for m in converted.model] == [m.training for m in model]
    assert converted.model.state_dict().keys() == model.state_dict().keys()
    outputs(converted.model, x)
    assert seen == [(2, 8, 5, 5)]


def test_hooks_see_the_channels_as_before() -> None:
    model, seen = chain(), list[Tensor]()
    partition = Partition(2, MIXED, MIXED)
    plant(model[0], partition)
    plant(model[1], partition)
    model[1].register_forward_hook(lambda module, args, out: seen.append(out))
    x = torch.randn(2, 8, 5, 5)
    plan = {"0": Partition(2, FORWARD, FORWARD), "1": partition}
    plant(model[0], plan["0"])
    converted = convert(model, trace(model, (x,)), plan)
    assert converted.permutations == ("1.order_in",)
    seen.clear()
    outputs(model, x)
    outputs(converted.model, x)
    order = list(converted.placed[1].channels_out)
    assert_close(seen[1], seen[0][:, order], rtol=1e-5, atol=1e-5)


def test_groups_in_another_order_cost_nothing() -> None:
    """The second layer names its groups the other way round: its outputs follow."""
    model = chain()
    plan = {"0": Partition(2, FORWARD, MIXED), "1": Partition(2, MIXED[4:] + MIXED[:4], FORWARD)}
    for name, partition in plan.items():
        plant(model.get_submodule(name), partition)
    x = torch.randn(2, 8, 5, 5)
    converted = convert(model, trace(model, (x,)), plan)
    assert converted.permutations == ()
    assert_close(outputs(converted.model, x), outputs(model, x), rtol=1e-5, atol=1e-5)
