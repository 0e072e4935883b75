"""profile() against published numbers, torchvision's metadata and values worked out by hand."""

import copy
import json

import pytest
import torch
from compare import assert_close
from torch import Tensor, nn
from torchvision import models
from torchvision.models.regnet import BlockParams

from groupconv.errors import ArgumentError
from groupconv.models import shufflenet_v1
from groupconv.nn import SeparableConv2d
from groupconv.optimize.cost import Profile, count_macs, profile

# The others are made of attention, which is no convolution.
TORCHVISION = [
    name
    for name in models.list_models(module=models)
    if not name.startswith(("vit", "swin", "maxvit"))
]


def counted(model: nn.Module, *shape: int, **kwargs: bool) -> Profile:
    return profile(model, torch.ones(shape), latency=False, **kwargs)


def macs_of(result: Profile) -> dict[str, int]:
    return {layer.name: layer.macs for layer in result.layers}


class Residual(nn.Module):
    """Convolutions of several kinds, activations in place, a sum and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.skip = nn.Conv2d(8, 8, 1, stride=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.stem(x)))
        out = self.relu(self.grouped(x))
        out = self.relu(self.depthwise(out))
        out = out + self.skip(x)
        return self.fc(self.pool(self.relu(self.up(out))).flatten(1))


@pytest.mark.parametrize(
    ("groups", "published"), [(1, 142.5), (2, 140.0), (3, 136.5), (4, 133.3), (8, 136.8)]
)
def test_shufflenet_v1(groups: int, published: float) -> None:
    with torch.device("meta"):
        model = shufflenet_v1(groups).eval()
    result = profile(model, torch.empty(1, 3, 224, 224, device="meta"), latency=False)
    convs = result.macs - macs_of(result)["fc"]  # the published count is of convolutions
    assert round(convs / 1e6, 1) == published


def test_dense_and_depthwise_separable() -> None:
    dense = counted(nn.Conv2d(512, 512, 3, padding=1), 1, 512, 14, 14).macs
    separable = counted(SeparableConv2d(512, 512, 3, padding=1).eval(), 1, 512, 14, 14).macs
    assert dense == 512 * 512 * 9 * 14 * 14
    assert round(dense / 1e6) == 462
    assert separable == 512 * (9 + 512) * 14 * 14
    assert round(separable / 1e6, 1) == 52.3


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_metadata(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = BlockParams.from_init_params

    def on_cpu(*args: object, **kwargs: object) -> BlockParams:
        with torch.device("cpu"):
            return original(*args, **kwargs)

    # RegNet works out its widths with tensors, whose values the meta device doesn't hold.
    monkeypatch.setattr(BlockParams, "from_init_params", on_cpu)
    options = {
        # The metadata leave the auxiliary heads out.
        "googlenet": {"aux_logits": False, "init_weights": False},
        "inception_v3": {"init_weights": False},
    }
    with torch.device("meta"):
        model = models.get_model(name, weights=None, **options.get(name, {})).eval()
    for weights in models.get_model_weights(name):
        (size,) = weights.transforms().crop_size
        x = torch.empty(1, 3, size, size, device="meta")
        result = profile(model, x, latency=False)
        assert result.params == weights.meta["num_params"]
        assert result.macs / 1e9 == pytest.approx(weights.meta["_ops"], abs=0.0005001)


def test_transposed() -> None:
    halves = nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1, groups=4)
    assert counted(halves, 2, 4, 8, 8).macs == 4608
    assert counted(nn.ConvTranspose2d(6, 6, 2, stride=2, groups=3), 2, 6, 8, 8).macs == 6144


def test_transposed_of_one_pixel() -> None:
    assert counted(nn.ConvTranspose2d(32, 1, 3), 1, 32, 1, 1).macs == 288


@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_backward_of_a_grouped_layer(bias: bool) -> None:
    layer = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=bias)
    x = torch.ones(1, 8, 10, 10, requires_grad=True)
    forward = profile(layer, x, latency=False)
    both = profile(layer, x, latency=False, backward=True)
    assert (2 * forward.macs, 2 * both.macs) == (28_800, 86_400)
    assert "MACs: forward, one multiply-add each, bias not counted." in str(forward)
    assert "MACs: forward and backward, one multiply-add each, bias not counted." in str(both)
    assert (forward.backward, both.backward) == (False, True)
    assert x.grad is None


@pytest.mark.parametrize("training", [True, False])
def test_backward_by_layer(training: bool) -> None:
    model = Residual().train(training)
    forward = macs_of(counted(model, 2, 3, 8, 8))
    assert forward == {
        "stem": 2 * 64 * 8 * 3 * 9,
        "bn": 0,
        "grouped": 2 * 64 * 8 * 2 * 9,
        "depthwise": 2 * 16 * 8 * 9,
        "skip": 2 * 16 * 8 * 8,
        "up": 2 * 16 * 8 * 2 * 4,
        "fc": 2 * 4 * 5,
    }
    x = torch.ones(2, 3, 8, 8, requires_grad=True)
    both = macs_of(profile(model, x, latency=False, backward=True))
    assert both == {name: 3 * macs for name, macs in forward.items()}
    no_input_gradient = macs_of(counted(model, 2, 3, 8, 8, backward=True))
    assert no_input_gradient == {**both, "stem": 2 * forward["stem"]}
    model.grouped.requires_grad_(False)
    frozen = macs_of(profile(model, x, latency=False, backward=True))
    assert frozen == {**both, "grouped": 2 * forward["grouped"]}


def test_one_layer_called_twice_and_one_parameter_in_two_layers() -> None:
    first, second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    second.weight = first.weight
    result = counted(nn.Sequential(first, first, second), 1, 4, 5, 5)
    rows = {layer.name: layer for layer in result.layers}
    assert [(n, r.calls, r.macs, r.params) for n, r in rows.items()] == [
        ("0", 2, 2 * 400, 20),
        ("2", 1, 400, 20),
    ]
    assert rows["0"].activation_bytes == 2 * 4 * 25 * 4
    assert (result.params, result.macs, result.activation_bytes) == (24, 1200, 1200)


def test_columns_and_what_is_not_counted() -> None:
    model = Residual().eval()
    result = counted(model, 1, 3, 8, 8)
    kinds = {layer.name: (layer.kind, layer.groups, layer.width) for layer in result.layers}
    assert kinds == {
        "stem": ("Conv2d", 1, 3),
        "bn": ("BatchNorm2d", None, None),
        "grouped": ("Conv2d", 4, 2),
        "depthwise": ("Conv2d", 8, 1),
        "skip": ("Conv2d", 1, 8),
        "up": ("ConvTranspose2d", 2, 4),
        "fc": ("Linear", None, None),
    }
    assert result.not_counted["relu_"] == 4
    assert result.not_counted["add"] == 1
    assert result.not_counted["mean"] == 1
    assert sum("batch_norm" in name for name in result.not_counted) == 1
    assert not any("conv" in name or "mm" in name for name in result.not_counted)
    assert "Not counted: add x1" in str(result)
    assert result.macs == count_macs(model, (torch.ones(1, 3, 8, 8),))
    header, *rows = str(result).splitlines()
    columns = ("layer", "kind", "calls", "groups", "width", "params", "MACs", "act.", "KiB", "ms")
    assert tuple(header.split()) == columns
    assert rows[0].split() == ["stem", "Conv2d", "1", "1", "3", "216", "13,824", "2", "-"]


def test_the_model_is_left_as_it_was() -> None:
    model = Residual().train()
    model.fc.eval()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    state = copy.deepcopy(model.state_dict())
    grads = [(p.grad, p.grad.clone()) for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    x = torch.randn(2, 3, 8, 8)
    pixels = x.clone()
    profile(model, x, backward=True, seconds=0.01)
    for name, value in model.state_dict().items():
        assert_close(value, state[name], rtol=0, atol=0)
    for p, (grad, value) in zip(model.parameters(), grads, strict=True):
        assert p.grad is grad
        assert_close(p.grad, value, rtol=0, atol=0)
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert_close(x, pixels, rtol=0, atol=0)


def test_the_model_is_left_as_it_was_by_a_failure() -> None:
    model = Residual().train()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="channels"):
        counted(model, 2, 4, 8, 8)
    with pytest.raises(RuntimeError, match="shapes"):
        counted(nn.Sequential(model, nn.Linear(4, 2)), 2, 3, 8, 8)
    for name, value in model.state_dict().items():
        assert_close(value, state[name], rtol=0, atol=0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_latency_and_the_total_without_hooks() -> None:
    hooked: list[bool] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            hooked.append(bool(self.conv._forward_hooks or self._forward_hooks))
            return self.conv(self.conv(x)).relu()

    result = profile(Watched().eval(), torch.ones(1, 4, 16, 16), seconds=0.02)
    assert result.latency is not None
    (row,) = result.layers
    assert row.latency is not None
    for timing in (result.latency, row.latency):
        assert 0 < timing.q1 <= timing.median <= timing.q3
        assert timing.runs > 1
    # Two calls of each kind are warm-up; the hooked one before them counts MACs.
    assert hooked.count(False) == result.latency.runs + 2
    assert hooked.count(True) == row.latency.runs + 3
    assert (result.target, result.machine["torch"]) == ("eager", torch.__version__)
    assert f"{result.latency.median * 1e3:.3f}" in str(result)


def test_to_dict_is_json() -> None:
    result = profile(Residual().eval(), torch.ones(1, 3, 8, 8), seconds=0.01)
    read = json.loads(json.dumps(result.to_dict()))
    assert read["macs"] == result.macs
    assert read["layers"][0]["name"] == "stem"
    assert read["layers"][0]["latency"]["runs"] == result.layers[0].latency.runs


@pytest.mark.parametrize("inputs", [(), [1, 2], (torch.ones(1), "x")])
def test_wrong_inputs(inputs: object) -> None:
    with pytest.raises(ArgumentError, match=r"example_inputs=.* must be a tensor or a tuple"):
        profile(nn.ReLU(), inputs)


def test_wrong_target() -> None:
    with pytest.raises(ArgumentError, match="target='abacus' must be one of eager"):
        profile(nn.ReLU(), torch.ones(1), target="abacus")


def test_macs_use_the_filters_own_depth() -> None:
    x = torch.randn(1, 128, 28, 28)
    layer = nn.Conv2d(128, 128, 3, padding=1, groups=8)
    assert tuple(layer.weight.shape) == (128, 16, 3, 3)
    assert profile(layer, x, latency=False).macs == 28 * 28 * 128 * 16 * 9


def test_time_has_a_median_and_a_spread() -> None:
    for groups in (1, 32):
        result = profile(
            nn.Conv2d(32, 32, 3, padding=1, groups=groups), torch.randn(2, 32, 64, 64), seconds=0.1
        )
        for timing in (result.latency, result.layers[0].latency):
            assert timing is not None
            assert timing.runs >= 5
            assert 0 < timing.q1 <= timing.median <= timing.q3
