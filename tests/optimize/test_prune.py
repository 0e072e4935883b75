"""Pruning: channels that nothing reads leave no trace, and what is left fits the original again."""

import copy
import re
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import images, residual
from random_networks import LayerNorm2d, RandomNetwork, randomize
from torch import Tensor, nn
from torchvision.models import get_model
from traced import Net, capture, conv, found

from groupconv.errors import ArgumentError
from groupconv.optimize import fit as fit_module
from groupconv.optimize.convert import convert
from groupconv.optimize.cost import count_macs
from groupconv.optimize.kept import kept_by_layers
from groupconv.optimize.prune import importance, prunable, prune, strongest
from groupconv.optimize.refit import refit
from groupconv.optimize.sampling import Sampling
from groupconv.optimize.structure import channels
from groupconv.optimize.trace import Trace, trace
from groupconv.store import Store

X = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
DEAD = (1, 4)


def network(forward: Callable[..., Tensor], **modules: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    net = Net(forward, **{"a": conv(4, 6), "b": conv(6, 5), "end": nn.Linear(5, 3), **modules})
    return randomize(net)


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor = X) -> Tensor:
    return model(x)


def error(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    expected = outputs(model, x)
    return float((outputs(other, x) - expected).norm() / expected.norm())


def space_of(mapped: Trace, name: str = "a") -> int:
    """The space of a convolution's outputs."""
    space = found(mapped, name).outputs.space
    assert space is not None
    return space


def without(mapped: Trace, dead: Sequence[int], name: str = "a") -> dict[int, list[int]]:
    """All strands but those of some output channels."""
    space = space_of(mapped, name)
    channels = found(mapped, name).outputs.parts[space][:, 0].tolist()
    return {space: [s for s, channel in enumerate(channels) if channel not in dead]}


def assert_sizes(net: nn.Module) -> None:
    """Every module has the tensors that a new one of its sizes would have."""
    for module in net.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            sizes = (module.in_channels, module.out_channels, module.kernel_size)
            new: nn.Module = type(module)(*sizes, groups=module.groups)  # type: ignore[arg-type]
        elif isinstance(module, nn.BatchNorm2d):
            new = nn.BatchNorm2d(module.num_features)
        elif isinstance(module, nn.Linear):
            new = nn.Linear(module.in_features, module.out_features)
        elif isinstance(module, nn.PReLU):
            new = nn.PReLU(module.num_parameters)
        else:
            continue
        own = module.state_dict()
        for name, tensor in new.state_dict().items():
            assert name not in own or own[name].shape == tensor.shape


def head(net: nn.Module, x: Tensor) -> Tensor:
    return net.end(net.b(x).relu().mean((2, 3)))


def zero(tensor: Tensor, axis: int, index: Sequence[int]) -> None:
    tensor.data.index_fill_(axis, torch.tensor(index), 0)


def sum_of_two(m: nn.Module, x: Tensor) -> Tensor:
    x = m.a(x)
    return head(m, m.act(x + m.d(m.c(x).relu())))


def doubled(m: nn.Module, x: Tensor) -> Tensor:
    x = m.a(x)
    return head(m, torch.cat([x, x.relu()], 1))


def depthwise(m: nn.Module, x: Tensor) -> Tensor:
    return head(m, m.t(m.c(m.a(x).relu()).relu()))


def excited(m: nn.Module, x: Tensor) -> Tensor:
    x = m.a(x)
    gate = m.up(m.down(x.mean((2, 3))).relu()).sigmoid()
    return head(m, x * gate[:, :, None, None])


def one_weight(m: nn.Module, x: Tensor) -> Tensor:
    x = m.a(x)
    return head(m, m.c(x) + m.d(x).relu())


# A forward, its modules, and for each layer that reads channels 1 and 4 their places there.
# fmt: off
CASES: dict[str, tuple[Callable[..., Tensor], dict[str, nn.Module], dict[str, list[int]]]] = {
    "chain": (
        lambda m, x: head(m, m.bn(m.a(x)).relu()), {"bn": nn.BatchNorm2d(6)}, {"b": [1, 4]},
    ),
    "sum": (
        sum_of_two, {"c": conv(6, 7, 3), "d": conv(7, 6, 3), "act": nn.PReLU(6)},
        {"b": [1, 4], "c": [1, 4]},
    ),
    "concatenation": (
        lambda m, x: head(m, torch.cat([m.c(x), m.a(x)], 1)), {"c": conv(4, 3), "b": conv(9, 5)},
        {"b": [4, 7]},
    ),
    "doubled": (doubled, {"b": conv(12, 5)}, {"b": [1, 4, 7, 10]}),
    "depthwise": (
        depthwise,
        {
            "c": conv(6, 12, 3, groups=6), "t": nn.ConvTranspose2d(12, 12, 3, groups=12),
            "b": conv(12, 5),
        },
        {"b": [2, 3, 8, 9]},
    ),
    "flattened": (
        lambda m, x: m.end(m.a(x).relu().flatten(1)), {"end": nn.Linear(384, 3)},
        {"end": [*range(64, 128), *range(256, 320)]},
    ),
    "flattened, channels last": (
        lambda m, x: m.end(m.a(x).permute(0, 2, 3, 1).flatten(1)), {"end": nn.Linear(384, 3)},
        {"end": [*range(1, 384, 6), *range(4, 384, 6)]},
    ),
    "excited": (
        excited, {"down": nn.Linear(6, 2), "up": nn.Linear(2, 6)}, {"b": [1, 4], "down": [1, 4]},
    ),
    "transposed": (
        lambda m, x: head(m, m.c(m.a(x))), {"c": nn.ConvTranspose2d(6, 6, 2, stride=2)},
        {"c": [1, 4]},
    ),
    "one weight": (one_weight, {"c": conv(6, 6), "d": conv(6, 6)}, {"c": [1, 4]}),
}
# fmt: on


def dead(case: str) -> nn.Module:
    """A network that ignores channels 1 and 4."""
    forward, modules, readers = CASES[case]
    net = network(forward, **copy.deepcopy(modules))
    for name, places in readers.items():
        layer = net.get_submodule(name)
        zero(layer.weight, 0 if isinstance(layer, nn.ConvTranspose2d) else 1, places)
    if case == "one weight":
        net.d.weight = net.c.weight
    return net


@pytest.mark.parametrize("case", CASES)
def test_dead_channels_leave_no_trace(case: str) -> None:
    net = dead(case)
    mapped, before = trace(net, (X,)), copy.deepcopy(net.state_dict())
    assert space_of(mapped) in prunable(net, mapped, (X,))[0]
    smaller = prune(net, mapped, without(mapped, DEAD))
    assert (net.a.out_channels, smaller.a.out_channels) == (6, 4)
    assert_sizes(smaller)
    assert_close(outputs(smaller), outputs(net), rtol=1e-5, atol=1e-5)
    assert count_macs(smaller, (X,)) < count_macs(net, (X,))
    # The channels that are read are not the dead ones.
    other = prune(net, mapped, without(mapped, (0, 4)))
    assert (outputs(other) - outputs(net)).abs().max() > 1e-3
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def is_read(net: nn.Module, name: str, axis: int) -> bool:
    """Whether a weight of a random network mixes what comes in along an axis."""
    module = net.get_submodule(name)
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1:
        return False
    return axis == (0 if isinstance(module, nn.ConvTranspose2d) else 1)


@pytest.mark.parametrize("seed", range(6))
def test_random_networks(seed: int) -> None:
    """Half of every space at once, on a network whose readers ignore those channels."""
    net, x = RandomNetwork(seed), torch.randn(2, 3, 8, 8)
    mapped = trace(net, (x,))
    spaces, reasons = prunable(net, mapped, (x,))
    assert sorted([*spaces, *reasons]) == list(range(len(mapped.spaces)))
    kept = {space: range(mapped.spaces[space].channels // 2) for space in spaces}
    for member in mapped.members:
        if is_read(net, member.module, member.axis):
            for space in kept.keys() & member.runs.parts.keys():
                gone = member.runs.parts[space][len(kept[space]) :].ravel()
                weight = net.get_submodule(member.module).weight
                zero(weight, member.axis, gone.tolist())
    smaller = prune(net, mapped, kept)
    assert_sizes(smaller)
    assert_close(outputs(smaller, x), outputs(net, x), rtol=1e-4, atol=1e-4)


def halves(m: nn.Module, x: Tensor) -> Tensor:
    left, right = m.a(x).chunk(2, 1)
    return head(m, torch.cat([left.relu(), right.sigmoid()], 1))


@pytest.mark.parametrize(
    ("forward", "modules", "reason"),
    [
        (lambda m, x: head(m, m.a(x).view(-1, 6, 8, 8)), {}, "does not run with half of it"),
        (lambda m, x: head(m, m.c(m.a(x))), {"c": conv(6, 6, groups=2)}, "c .* has groups=2"),
        (lambda m, x: head(m, m.n(m.a(x))), {"n": nn.GroupNorm(2, 6)}, "n .GroupNorm. is not"),
        (lambda m, x: head(m, m.n(m.a(x))), {"n": LayerNorm2d(6)}, "n .LayerNorm2d. is not"),
        # It runs, and the first half takes what belongs to the second.
        (halves, {}, "computes something else with half of it"),
        (lambda m, x: m.a(x), {}, "output of the network"),
        (lambda m, x: head(m, m.a(x)), {"a": conv(4, 1), "b": conv(1, 5)}, "a single channel"),
        (lambda m, x: m.a(x).amax(1), {}, "no dense layer reads it"),
    ],
)
def test_spaces_that_are_left_whole(
    forward: Callable[..., Tensor], modules: dict[str, nn.Module], reason: str
) -> None:
    net = network(forward, **modules)
    mapped = trace(net, (X,))
    spaces, reasons = prunable(net, mapped, (X,))
    first = found(mapped, "a").outputs.spaces[0]
    assert first not in spaces
    assert re.search(reason, reasons[first])


def test_hidden_units_of_linear_layers_are_channels_too() -> None:
    net = network(lambda m, x: m.more(head(m, m.a(x))), more=nn.Linear(3, 2))
    mapped = trace(net, (X,))
    spaces, _ = prunable(net, mapped, (X,))
    (hidden,) = next(m for m in mapped.members if (m.module, m.axis) == ("more", 1)).runs.parts
    assert hidden in spaces
    smaller = prune(net, mapped, {hidden: [0, 2]})
    assert_close(smaller.more.weight, net.more.weight[:, [0, 2]], rtol=0, atol=0)
    assert smaller(X).shape == net(X).shape


def test_strands_that_cannot_be_kept() -> None:
    net = network(lambda m, x: m.c(m.n(m.a(x))), n=nn.BatchNorm2d(6), c=conv(6, 2))
    mapped = trace(net, (X,))
    space, fixed = space_of(mapped), space_of(mapped, "c")
    for strands in ([], [0, 0], [0, 6], [-1]):
        with pytest.raises(ArgumentError, match=r"must keep one or more of its strands 0 to 5"):
            prune(net, mapped, {space: strands})
    with pytest.raises(ArgumentError, match=r"can't be pruned: output of the network"):
        prune(net, mapped, {fixed: [0]})
    with pytest.raises(ArgumentError, match=r"space 99 is not one of the"):
        prune(net, mapped, {99: [0]})


def test_what_a_user_set_on_a_layer_stays() -> None:
    net = dead("chain").to(memory_format=torch.channels_last)
    seen: list[torch.Size] = []
    net.a.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    net.a.weight.requires_grad_(False)
    mapped = trace(net, (X,))
    net.b.weight.grad = torch.ones_like(net.b.weight)
    smaller = prune(net, mapped, without(mapped, DEAD))
    assert not smaller.a.weight.requires_grad
    assert smaller.b.weight.requires_grad
    assert smaller.a.weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(module.training for module in smaller.modules())
    assert smaller.state_dict().keys() == net.state_dict().keys()
    seen.clear()
    outputs(smaller)
    assert seen == [(3, 4, 8, 8)]


def test_importance_is_the_share_of_what_readers_vary_by() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.a(x).relu()
        return head(m, x) + m.flat(F.avg_pool2d(x, 4).flatten(1))

    net = network(forward, b=conv(6, 5, 3), flat=nn.Linear(24, 3))
    mapped = trace(net, (X,))
    u = outputs(net.a).relu()
    seen = u.movedim(1, 0).flatten(1).double().var(1, correction=0)
    pooled = F.avg_pool2d(u, 4).flatten(1).double().var(0, correction=0)
    by_b = net.b.weight.detach().double().square().sum((0, 2, 3)) * seen
    by_flat = (net.flat.weight.detach().double().square().sum(0) * pooled).reshape(6, 4).sum(1)
    expected = by_b / by_b.sum() + by_flat / by_flat.sum()
    values = importance(net, mapped, X.split([2, 1]))
    assert_close(values[space_of(mapped)], expected, rtol=1e-5, atol=0)
    assert not net.b._forward_pre_hooks


def test_importance_by_a_weight_whose_module_is_not_called() -> None:
    net = network(lambda m, x: head(m, F.conv2d(m.a(x), m.c.weight)), c=conv(6, 6))
    mapped = trace(net, (X,))
    weights = net.c.weight.detach().double().square().sum((0, 2, 3))
    values = importance(net, mapped, [X])
    assert_close(values[space_of(mapped)], weights / weights.sum(), rtol=1e-6, atol=0)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=6),
    fraction=st.floats(0, 1),
    more=st.floats(0, 1),
)
def test_same_fraction_of_every_space(sizes: list[int], fraction: float, more: float) -> None:
    torch.manual_seed(0)
    values = {10 + i: torch.rand(size) for i, size in enumerate(sizes)}
    kept = strongest(values, fraction)
    above = strongest(values, max(fraction, more))
    for space, value in values.items():
        count, step = len(value), 8 if len(value) >= 16 else 1
        stay = kept.get(space, range(count))
        assert len(stay) == count or (space in kept and len(stay) % step == 0 < len(stay))
        assert fraction * count - step < len(stay) < max(fraction * count, 1) + step
        assert set(stay) <= set(above.get(space, range(count)))
        gone = [s for s in range(count) if s not in stay]
        assert not gone or value[list(stay)].min() >= value[gone].max()
    assert strongest(values, 1.0) == {}


def refit_pruned(
    net: nn.Module, mapped: Trace, kept: dict[int, tuple[int, ...]], sampling: Sampling
) -> tuple[nn.Module, dict[str, float]]:
    converted = convert(net, mapped, kept_by_layers(mapped, kept))
    losses = refit(net, converted, sampling, Store(None, ""), {})
    return converted.model, losses


COMBINATIONS = [
    # A bias, a batch norm that takes its place, and neither.
    ({"b": conv(6, 5)}, lambda m, x: m.b(x)),
    ({"b": conv(6, 5, bias=False), "n": nn.BatchNorm2d(5)}, lambda m, x: m.n(m.b(x))),
    ({"b": conv(6, 5, bias=False)}, lambda m, x: m.b(x)),
]


@pytest.mark.parametrize(("modules", "rest"), COMBINATIONS)
def test_combinations_of_kept_channels_are_refitted_exactly(
    modules: dict[str, nn.Module], rest: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = network(lambda m, x: m.end(rest(m, m.a(x)).relu().mean((2, 3))), **modules)
    with torch.no_grad():
        mix = torch.randn(2, 4)
        net.a.weight[[1, 4]] = (mix @ net.a.weight[[0, 2, 3, 5]].flatten(1)).view(2, 4, 1, 1)
    mapped = trace(net, (X,))
    kept = without(mapped, DEAD)
    smaller = prune(net, mapped, kept)
    assert error(net, smaller, X) > 0.01
    monkeypatch.setattr(fit_module, "RIDGE", 1e-13)  # too few images to hold any out
    sampling = Sampling(lambda: X.split(2), images=3, max_positions=10**6, seed=0)
    smaller, losses = refit_pruned(net, mapped, kept, sampling)
    assert losses == dict.fromkeys("ab", pytest.approx(0, abs=1e-6))
    assert_close(outputs(smaller), outputs(net), rtol=1e-4, atol=1e-4)
    assert (smaller.b.bias is None) == (net.b.bias is None and "n" in modules)


@pytest.mark.parametrize("channels", [16, 24])
def test_layers_come_closer_to_the_original(channels: int) -> None:
    net, x = residual(channels=channels).requires_grad_(False), images()
    mapped = trace(net, (x,))
    spaces, _ = prunable(net, mapped, (x,))
    values = importance(net, mapped, [x])
    kept = strongest({space: values[space] for space in spaces}, 0.5)
    smaller = prune(net, mapped, kept)
    names = ["bn1", "bn2"]
    cut = capture(smaller, names, x)
    sampling = Sampling(lambda: [x], images=len(x), max_positions=10**6, seed=0)
    smaller, losses = refit_pruned(net, mapped, kept, sampling)
    assert list(losses) == ["stem.0", "conv1", "conv2", "fc"]
    refitted, whole = capture(smaller, names, x), capture(net, names, x)
    for name, layer in zip(names, ("conv1", "conv2"), strict=True):
        target = whole[name][1][:, list(kept[space_of(mapped, layer)])]
        results = [float((run[name][1] - target).norm()) for run in (cut, refitted)]
        assert results[1] < 0.9 * results[0]
        # The batch norm took the mean of what was lost.
        means = [y.mean((0, 2, 3)) for y in (refitted[name][1], target)]
        assert_close(means[0], means[1], rtol=1e-4, atol=1e-4)
    assert min(losses[name] for name in ("conv1", "conv2", "fc")) > 1e-3


def with_statistics(name: str) -> nn.Module:
    """A network of torchvision whose norms have seen images."""
    torch.manual_seed(0)
    model = get_model(name, num_classes=10)
    if name == "vgg11_bn":
        model.classifier = nn.Linear(512 * 49, 10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 64, 64))
    return model.eval()


@pytest.mark.parametrize("name", ["vgg11_bn", "resnet18", "squeezenet1_1", "mobilenet_v2"])
def test_families(name: str) -> None:
    net, x = with_statistics(name), torch.randn(8, 3, 64, 64)
    mapped = trace(net, (x[:2],))
    spaces, reasons = prunable(net, mapped, (x[:1],))
    assert set(reasons.values()) == {"input of the network", "output of the network"}
    values = importance(net, mapped, [x])
    kept = strongest({space: values[space] for space in spaces}, 0.5)
    smaller = prune(net, mapped, kept)
    assert_sizes(smaller)
    for layer in mapped.convs:
        before, after = (channels(m.get_submodule(layer.name))[1] for m in (net, smaller))
        if layer.outputs.spaces[0] in reasons:
            assert after == before
        else:
            step = 8 if before >= 16 else 1
            assert abs(after - before / 2) < step
            assert after % step == 0
    assert count_macs(smaller, (x[:1],)) < 0.4 * count_macs(net, (x[:1],))
    cut = error(net, smaller, x)
    if name in ("squeezenet1_1", "mobilenet_v2"):
        sampling = Sampling(lambda: [x], images=8, max_positions=1_000, seed=0)
        smaller, _ = refit_pruned(net, mapped, kept, sampling)
        assert error(net, smaller, x) < 0.9 * cut
