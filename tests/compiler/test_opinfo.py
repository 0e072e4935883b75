"""Every operator that the compiler knows on the samples that PyTorch keeps for its own tests."""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from compiler.eager import agree, cuts
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import SampleInput
from torch.utils import _pytree as pytree

from groupconv.compiler.compiled import Compiled

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
    pytest.mark.filterwarnings("ignore:`nn.functional.upsample_:UserWarning"),
]
# What PyTorch may run, and why; an operator runs on native code on at least one sample, but where
# its name ends with a star.
_SINGLE = "a single number"
_MOVES = "moves numbers between pixels"
_SPATIAL = "not over rows and columns"
_AXES = "axes, not 4"
_USED = "other results are used"
OPERATORS: dict[str, str] = {
    "nn.functional.conv1d": "", "nn.functional.conv2d": "",
    "nn.functional.conv3d *": "3 spatial axes|more than rows and columns",
    "nn.functional.conv_transpose1d": "no tap of the kernel",
    "nn.functional.conv_transpose2d": "no tap of the kernel",
    "nn.functional.linear": "",
    "add": _SINGLE, "sub": _SINGLE, "rsub": _SINGLE, "mul": _SINGLE,
    "div": f"{_SINGLE}|rounding_mode=",
    "maximum": _SINGLE, "minimum": _SINGLE,
    "clamp *": "its bounds are tensors|other numbers than float32",
    "pow *": f"{_SINGLE}|exponent is a tensor",
    "cat": "along axis 0", "stack": _MOVES, "split": _MOVES, "split_with_sizes": _MOVES,
    "chunk": _MOVES, "narrow": _MOVES, "flatten": _MOVES,
    "nn.functional.pixel_shuffle": _MOVES, "nn.functional.pixel_unshuffle": _MOVES,
    "nn.functional.channel_shuffle": "",
    "nn.functional.relu": _SINGLE, "nn.functional.relu6": _SINGLE, "nn.functional.silu": _SINGLE,
    "nn.functional.hardswish": "", "nn.functional.hardsigmoid": _SINGLE,
    "nn.functional.hardtanh": _SINGLE, "nn.functional.leaky_relu": "", "sigmoid": _SINGLE,
    "nn.functional.gelu": "", "nn.functional.prelu": _SINGLE, "nn.functional.elu": _SINGLE,
    "nn.functional.celu": _SINGLE, "nn.functional.selu": _SINGLE, "nn.functional.mish": _SINGLE,
    "nn.functional.softplus *": f"{_SINGLE}|beta=3", "tanh": "", "exp": _SINGLE,
    "log": _SINGLE, "sqrt": "", "rsqrt": _SINGLE, "abs": "", "neg": "",
    "erf": "", "reciprocal": _SINGLE, "square": _SINGLE,
    "nn.functional.layer_norm": r"over \d axes",
    "nn.functional.batch_norm": "statistics of the batch",
    "nn.functional.max_pool2d": f"{_USED}|{_AXES}",
    "nn.functional.avg_pool2d": "", "nn.functional.adaptive_avg_pool2d": _AXES,
    "nn.functional.adaptive_max_pool2d": f"{_USED}|{_AXES}",
    "mean *": f"{_SINGLE}|{_SPATIAL}", "amax *": f"{_SINGLE}|{_SPATIAL}",
    "sum *": f"{_SINGLE}|{_SPATIAL}",
    "nn.functional.interpolate": "nearest1d|nearest3d|exact|linear1d|cubic|trilinear|pool3d",
    "nn.functional.upsample_nearest": "nearest1d|nearest3d", "nn.functional.upsample_bilinear": "",
    "nn.functional.pad": "more than rows and columns|reflection|replication|an empty tensor",
    "softmax": f"{_SINGLE}|can't lie innermost|float32|_to_copy",
    "matmul": f"{_MOVES}|dot|mv|matrices differ", "mm": "", "bmm *": "matrices differ",
    "addmm *": f"it is scaled|{_SINGLE}", "baddbmm *": f"baddbmm|{_SINGLE}",
    "nn.functional.group_norm *": "not native", "nn.functional.grid_sample *": "not native",
    "cumsum *": f"not native|{_SINGLE}",
}  # fmt: skip


class Sample(nn.Module):
    """An operator with a sample's arguments; its first tensor, or all, are the network's inputs."""

    def __init__(self, call: Callable[..., Any], sample: SampleInput, every: bool) -> None:
        super().__init__()
        arguments = (sample.input, sample.args, sample.kwargs)
        self.leaves, self.structure = pytree.tree_flatten(arguments)
        tensors = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        self.places = tensors if every else tensors[:1]
        self.inputs = [self.leaves[i].detach() for i in self.places]
        self.call = call
        self.eval()

    def forward(self, *inputs: Tensor) -> Any:
        leaves = list(self.leaves)
        for place, x in zip(self.places, inputs, strict=True):
            leaves[place] = x
        first, args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        return self.call(first, *args, **kwargs)


@cache
def _samples(name: str) -> list[tuple[Callable[..., Any], SampleInput]]:
    torch.manual_seed(0)
    found = [
        (op.op, sample)
        for op in op_db
        if op.name == name.removesuffix(" *")
        for sample in op.sample_inputs("cpu", torch.float32, requires_grad=False)
    ]
    return [(call, sample) for call, sample in found if _usable(call, sample)]


def _usable(call: Callable[..., Any], sample: SampleInput) -> bool:
    """Whether nothing is empty, and no tensor is changed."""
    tensors = [x for x in pytree.tree_leaves((sample.input, sample.args)) if isinstance(x, Tensor)]
    refused = sample.kwargs.get("inplace") or sample.kwargs.get("mode") == "circular"
    if not all(x.numel() for x in tensors) or refused or "circular" in sample.args:
        return False
    statistics = isinstance(sample.args[0], Tensor) if sample.args else False
    return not (sample.kwargs.get("training") and statistics)


def _check(name: str, number: int, every: bool = False, allowed: str = "") -> Compiled:
    call, sample = _samples(name)[number]
    module = Sample(call, sample, every)
    compiled = agree(module, *module.inputs)
    reasons = "|".join(filter(None, [OPERATORS[name], allowed]))
    for operator, reason in cuts(compiled).items():
        text = f"{operator}: {reason}"
        assert reasons, text
        assert re.search(reasons, text), text
    return compiled


@pytest.mark.parametrize("name", OPERATORS)
def test_samples(name: str) -> None:
    """The first, the last, and some between."""
    count = len(_samples(name))
    assert count
    for number in sorted({round(i * (count - 1) / 5) for i in range(6)}):
        _check(name, number)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_all_samples(name: str) -> None:
    found = [cuts(_check(name, number)) for number in range(len(_samples(name)))]
    assert name.endswith("*") or {} in found
    seen = [f"{operator}: {reason}" for cut in found for operator, reason in cut.items()]
    for reason in filter(None, OPERATORS[name].split("|")):
        assert any(re.search(reason, text) for text in seen), f"{reason}: never seen"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["add", "mul", "div", "maximum", "cat", "stack", "matmul"])
def test_every_tensor_is_an_input(name: str) -> None:
    for number in range(len(_samples(name))):
        allowed = "computed by the network" if name == "matmul" else r"and \[.*\] give"
        _check(name, number, every=True, allowed=allowed)
