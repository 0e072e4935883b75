"""Which implementation runs, what is left to PyTorch, and that nobody can tell by the result."""

import copy
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from compare import assert_close
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from groupconv import nn as our_nn
from groupconv.errors import ArgumentError
from groupconv.kernels import cache, dispatch, fingerprint, jit, tuning, weights
from groupconv.nn import functional


@pytest.fixture(autouse=True)
def _native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GROUPCONV_NATIVE", "1")
    torch.manual_seed(0)
    dispatch._choices.clear()
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)
    dispatch._choices.clear()


def forget() -> None:
    """Make this process ask the cache again."""
    dispatch._choices.clear()
    tuning._known.clear()
    weights._entries.clear()
    fingerprint.fingerprint.cache_clear()


Told = list[tuple[str, dict[str, str]]]


def told(function: Callable[[], Any]) -> tuple[Any, str, dict[str, str]]:
    """The result of a function that calls one convolution, what ran it, and what did not."""
    calls: Told = []
    with dispatch.listening(lambda name, refused: calls.append((name, refused))):
        result = function()
    ((name, refused),) = calls
    return result, name, refused


def pair(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 8, 9, 9).to(dtype), torch.randn(8, 4, 3, 3).to(dtype)


def ours(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.group_conv2d(x, weight, bias, padding=1, groups=2)


def theirs(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1, groups=2)


def same_strides(actual: Tensor, expected: Tensor) -> bool:
    """Alike in memory, as far as strides mean anything."""
    axes = zip(actual.shape, actual.stride(), expected.stride(), strict=True)
    return actual.shape == expected.shape and all(a == b for n, a, b in axes if n > 1)


# The table.


def test_order_of_the_table() -> None:
    assert [way.name for way in dispatch.TABLE] == ["native", "native in float32", "aten"]


def test_last_row_takes_everything() -> None:
    for dtype in (torch.float64, torch.complex64, torch.int64):
        x, weight = (t.to(dtype) for t in pair())
        actual, name, refused = told(lambda x=x, w=weight: ours(x, w))
        assert name == "aten"
        assert torch.equal(actual, theirs(x, weight))
        takes = {"native": "float32", "native in float32": "bfloat16 or torch.float16"}
        for name, dtypes in takes.items():
            assert refused.pop(name) == f"the input is {dtype}, this takes torch.{dtypes}"
        assert not refused


def test_three_axes_are_refused() -> None:
    x, weight = torch.randn(1, 4, 5, 5, 5), torch.randn(4, 2, 3, 3, 3)
    actual, name, refused = told(lambda: functional.group_conv3d(x, weight, groups=2))
    assert (name, refused["native"]) == (
        "aten",
        "kernels have 1 or 2 spatial axes, the input has 3",
    )
    assert_close(actual, F.conv3d(x, weight, groups=2), rtol=1e-5, atol=1e-5)


def test_empty_batch_is_refused() -> None:
    for transposed in (False, True):
        f = functional.group_conv_transpose2d if transposed else functional.group_conv2d
        weight = torch.randn(8, 4, 3, 3, requires_grad=True)
        actual, name, refused = told(lambda f=f, w=weight: f(torch.randn(0, 8, 9, 9), w, groups=2))
        assert (name, refused["native"]) == ("aten", "a tensor is empty, or has no memory")
        assert actual.shape == ((0, 8, 11, 11) if transposed else (0, 8, 7, 7))
        actual.sum().backward()
        assert not weight.grad.any()


def test_setting_forbids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUPCONV_NATIVE", "0")
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = pair(dtype)
        actual, name, refused = told(lambda x=x, w=weight: ours(x, w))
        assert name == "aten"
        assert set(refused.values()) == {"GROUPCONV_NATIVE=0"}
        assert torch.equal(actual, theirs(x, weight))


def test_unknown_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "runnable", lambda: ())
    x, weight = pair()
    actual, name, refused = told(lambda: ours(x, weight))
    assert name == "aten"
    assert refused["native"] == "no code can be generated for this processor"
    assert torch.equal(actual, theirs(x, weight))


def test_first_legal_row_without_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUPCONV_TUNE", "0")
    monkeypatch.delenv("GROUPCONV_NATIVE")
    for dtype, expected in ((torch.float32, "native"), (torch.float16, "native in float32")):
        x, weight = pair(dtype)
        _, name, refused = told(lambda x=x, w=weight: ours(x, w))
        assert name == expected
        assert refused["aten"] == f"{name} comes first"
        assert refused.keys() | {name} == {"native", "native in float32", "aten"}


@pytest.mark.parametrize(("native", "aten"), [(2e-3, 1e-3), (1e-3, 2e-3)])
def test_measured_slower(native: float, aten: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUPCONV_TUNE", "1")
    monkeypatch.delenv("GROUPCONV_NATIVE")
    monkeypatch.setattr(dispatch, "_compare", lambda *_: {"native": native, "aten": aten})
    x, weight = pair()
    for _ in range(2):
        actual, name, refused = told(lambda: ours(x, weight))
        assert name == ("native" if native < aten else "aten")
        slower = "aten" if native < aten else "native"
        assert refused[slower] == f"2000 us, {name} 1000 us"
        assert_close(actual, theirs(x, weight), rtol=1e-5, atol=1e-5)
    # Forced all the same.
    monkeypatch.setenv("GROUPCONV_NATIVE", "1")
    dispatch._choices.clear()
    assert told(lambda: ours(x, weight))[1] == "native"


def test_measured_in_earnest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GROUPCONV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GROUPCONV_TUNE", "1")
    monkeypatch.delenv("GROUPCONV_NATIVE")
    forget()
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = pair(dtype)
        actual, name, refused = told(lambda x=x, w=weight: ours(x, w))
        assert_close(actual, theirs(x, weight), rtol=1e-2, atol=1e-2)
        measured = [reason for reason in refused.values() if " us, " in reason]
        assert len(measured) == 1
        assert f"{name} " in measured[0]
    forget()


def test_listeners_leave() -> None:
    with pytest.raises(ZeroDivisionError), dispatch.listening(lambda *_: 1 / 0):
        ours(*pair())
    assert not dispatch._listeners
    ours(*pair())


# What watches or rewrites operators sees one convolution of PyTorch.

MODE = "a mode that watches PyTorch's operators is active"
TRACING = "torch.compile or torch.export is tracing"
CASES: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "1-d": (lambda g: our_nn.GroupConv1d(4, 8, 3, padding=1, groups=g), (2, 4, 7)),
    "2-d": (lambda g: our_nn.GroupConv2d(4, 8, 3, stride=2, padding=1, groups=g), (2, 4, 7, 6)),
    "unbatched": (lambda g: our_nn.GroupConv2d(4, 8, 3, groups=g), (4, 7, 6)),
    "same": (lambda g: our_nn.GroupConv2d(4, 8, 3, padding="same", groups=g), (2, 4, 7, 6)),
    "transposed": (lambda g: our_nn.GroupConvTranspose2d(4, 8, 3, 2, groups=g), (2, 4, 5, 4)),
    "transposed 1-d": (lambda g: our_nn.GroupConvTranspose1d(4, 8, 3, 2, groups=g), (2, 4, 5)),
}
every_case = pytest.mark.parametrize("case", CASES)


def example(case: str, groups: int = 2) -> tuple[nn.Module, nn.Module, Tensor]:
    """A layer of ours, torch's with equal weights, and an input."""
    make, shape = CASES[case]
    layer = make(groups).eval()
    return layer, torch_layer(layer), torch.randn(shape)


def torch_layer(layer: nn.Module) -> nn.Module:
    """PyTorch's layer with equal parameters of its own."""
    other = copy.deepcopy(layer)
    other.__class__ = getattr(nn, type(layer).__name__.removeprefix("Group"))
    return other


def convolutions(graph: torch.fx.Graph) -> list[str]:
    return [str(n.target) for n in graph.nodes if "conv" in str(n.target).lower()]


@every_case
def test_compiled_graph_has_one_convolution(case: str) -> None:
    layer, other, x = example(case)
    layer(x)
    graphs: list[torch.fx.GraphModule] = []

    def backend(module: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    actual, name, refused = told(lambda: compiled(x))
    torch._dynamo.reset()
    assert (name, refused["native"]) == ("aten", TRACING)
    assert torch.equal(actual, other(x))
    (module,) = graphs
    assert len(convolutions(module.graph)) == 1


@every_case
def test_exported_graph_has_one_convolution(case: str) -> None:
    layer, other, x = example(case)
    layer(x)
    program = torch.export.export(layer, (x,))
    (target,) = (str(n.target) for n in program.graph.nodes if n.op == "call_function")
    assert target.startswith("aten.conv")
    assert torch.equal(program.module()(x), other(x))
    lowered = program.run_decompositions()
    assert convolutions(lowered.graph) == ["aten.convolution.default"]


@every_case
def test_traced_operators_have_one_convolution(case: str) -> None:
    layer, other, x = example(case)
    layer(x)
    module, name, refused = told(lambda: make_fx(layer)(x))
    assert (name, refused["native"]) == ("aten", MODE)
    assert convolutions(module.graph) == ["aten.convolution.default"]
    assert torch.equal(module(x), other(x))


class _Operators(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    """Notes the functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


@every_case
@pytest.mark.parametrize("gradients", [False, True])
def test_modes_see_the_convolution(case: str, gradients: bool) -> None:
    layer, other, x = example(case)
    x.requires_grad_(gradients)
    layer(x)
    for mode, expected in ((_Operators(), "aten.convolution.default"), (_Functions(), None)):
        with mode:
            actual, name, refused = told(lambda: layer(x))
        assert (name, refused["native"]) == ("aten", MODE)
        assert torch.equal(actual, other(x))
        if expected is None:
            kind = "conv_transpose" if layer.transposed else "conv"
            functions = [getattr(f, "__name__", "") for f in mode.seen]
            assert sum(f.startswith(kind) for f in functions) == 1
        else:
            assert [op for op in mode.seen if "conv" in op] == [expected]
    # And afterwards a kernel again.
    assert told(lambda: layer(x))[1] == "native"


def test_operations_are_counted() -> None:
    layer, other, x = example("2-d")
    counts = []
    for module in (layer, other):
        with FlopCounterMode(display=False) as counter:
            module(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@every_case
def test_fake_and_meta_tensors(case: str) -> None:
    layer, other, x = example(case)
    layer(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        actual = layer(mode.from_tensor(x))
    assert actual.shape == other(x).shape
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    actual, name, refused = told(lambda: layer(mode.from_tensor(x)))
    assert (name, refused["native"]) == ("aten", "FakeTensor is a subclass of Tensor")
    assert same_strides(actual, other(x))
    actual, name, refused = told(lambda: layer.to("meta")(x.to("meta")))
    assert name == "aten"
    assert refused["native"] == "a tensor is on meta, kernels run on the CPU"
    assert actual.device.type == "meta"
    assert actual.shape == other(x).shape


@every_case
@pytest.mark.parametrize("groups", [1, 4])
def test_vmap(case: str, groups: int) -> None:
    layer, other, x = example(case, groups)
    layer(x)
    many = torch.randn(3, *x.shape)
    expected = torch.stack([other(each) for each in many])
    actual, name, refused = told(lambda: torch.vmap(layer)(many))
    assert (name, refused["native"]) == ("aten", "a torch.func transform such as vmap is active")
    assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    # Over the weights: an ensemble of layers.
    state = {name: torch.randn(3, *p.shape) for name, p in layer.named_parameters()}
    actual = torch.vmap(lambda s: torch.func.functional_call(layer, s, (x,)))(state)
    for i in range(3):
        each = {name: p[i] for name, p in state.items()}
        assert_close(actual[i], torch.func.functional_call(other, each, (x,)), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@every_case
def test_forward_mode(case: str) -> None:
    layer, other, x = example(case)
    layer(x)
    direction = torch.randn_like(x)
    expected = other(direction) - other(torch.zeros_like(x))
    (_, tangent), _, refused = told(lambda: torch.func.jvp(layer, (x,), (direction,)))
    assert refused["native"] == "a torch.func transform such as vmap is active"
    assert_close(tangent, expected, rtol=1e-4, atol=1e-5)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, direction)
        actual, name, refused = told(lambda: layer(dual))
        assert (name, refused["native"]) == ("aten", "forward-mode differentiation is active")
        assert_close(forward_ad.unpack_dual(actual).tangent, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_jacobians() -> None:
    layer, other, _ = example("2-d")
    x = torch.randn(1, 4, 4, 4)
    expected = torch.autograd.functional.jacobian(other, x)
    for vectorize in (False, True):
        actual = torch.autograd.functional.jacobian(layer, x, vectorize=vectorize)
        assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        assert_close(jacobian(layer)(x), expected, rtol=1e-5, atol=1e-5)
    actual = torch.func.functionalize(layer)(x)
    assert_close(actual, other(x), rtol=1e-5, atol=1e-5)


@every_case
def test_autocast(case: str) -> None:
    layer, other, x = example(case)
    layer(x)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            actual, name, refused = told(lambda: layer(x))
            expected = other(x)
        assert (name, refused["native"]) == ("aten", "autocast chooses the dtype")
        assert actual.dtype == expected.dtype == dtype
        assert torch.equal(actual, expected)
        with torch.autocast("cpu", enabled=False):
            assert told(lambda: layer(x))[1] == "native"


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@every_case
def test_jit_trace(case: str) -> None:
    layer, other, x = example(case)
    layer(x)
    traced = torch.jit.trace(layer, x)
    assert str(traced.inlined_graph).count("aten::_convolution") == 1
    assert_close(traced(x), other(x), rtol=1e-5, atol=1e-5)


class _Sub(Tensor):
    """Any subclass may have ideas of its own."""


def test_subclasses() -> None:
    x, weight = pair()
    ours(x, weight)
    for a, b in ((x.as_subclass(_Sub), weight), (x, weight.as_subclass(_Sub))):
        actual, name, refused = told(lambda a=a, b=b: ours(a, b))
        assert (name, refused["native"]) == ("aten", "_Sub is a subclass of Tensor")
        assert type(actual) is _Sub
        assert torch.equal(actual, theirs(a, b))
    bias = torch.randn(8).as_subclass(_Sub)
    assert told(lambda: ours(x, weight, bias))[1] == "aten"
    # These are not: their numbers are their own.
    for p in (nn.Parameter(weight), nn.Buffer(weight), weight.detach()):
        assert told(lambda p=p: ours(x, p))[1] == "native"


def test_tensors_that_do_not_hold_their_numbers() -> None:
    x, weight = pair()
    ours(x, weight)
    reason = "a tensor does not hold its numbers as they are"
    negative = torch.view_as_complex(torch.randn(2, 8, 9, 9, 2)).conj().imag
    assert negative.is_neg()
    for other in (negative, x.to_mkldnn()):
        actual, name, refused = told(lambda other=other: ours(other, weight))
        assert (name, refused["native"]) == ("aten", reason)
        expected = theirs(other, weight)
        assert actual.layout == expected.layout
        assert_close(actual.to_dense(), expected.to_dense(), rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="sparse"):
        ours(x.to_sparse(), weight)


def test_inference_tensors() -> None:
    with torch.inference_mode():
        x, weight = pair()
        inside, name, _ = told(lambda: ours(x, weight))
        assert name == "native"
        assert inside.is_inference()
    outside, name, _ = told(lambda: ours(x, weight))
    assert name == "native"
    assert not outside.requires_grad
    assert torch.equal(inside, outside)
    layer, _, x = example("2-d")
    with torch.inference_mode():
        layer(x)
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None


GONE = """
import json, os, signal
import torch
from groupconv.nn import functional
torch.set_num_threads(1)
x, weight, bias = torch.randn(1, 8, 9, 9), torch.randn(8, 4, 3, 3), torch.randn(8)
functional.group_conv2d(x, weight, bias, groups=2)

def zero(tensor):
    return torch._efficientzerotensor(tensor.shape)

def freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor

found = {}
for how in (zero, freed):
    for place in range(3):
        tensors = [x, weight, bias]
        read, write = os.pipe()
        if os.fork() == 0:
            signal.alarm(30)
            tensors[place] = how(tensors[place])
            try:
                results = [f(*tensors, groups=2) for f in
                           (torch.nn.functional.conv2d, functional.group_conv2d)]
                text = str((results[0] - results[1]).abs().max().item() < 1e-4)
            except RuntimeError:
                text = "RuntimeError"
            os.write(write, text.encode())
            os._exit(0)
        os.close(write)
        with open(read) as file:
            text = file.read()
        found[f"{how.__name__} {place}"] = text or f"signal {os.wait()[1]}"
print(json.dumps(found))
"""


def run(text: str, *arguments: str) -> str:
    """Standard output of a Python program."""
    done = subprocess.run(
        [sys.executable, "-c", text, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_tensors_without_memory() -> None:
    """Zeros that take no memory, and memory that was given back, as sharded training does."""
    found = json.loads(run(GONE))
    assert {place: found.pop(f"zero {place}") for place in range(3)} == dict.fromkeys(
        range(3), "True"
    )
    assert set(found.values()) == {"RuntimeError"}


# Remembered choices.

LEGAL: dict[str, Any] = {"stride": 1, "padding": 1, "dilation": 1, "groups": 1}
ILLEGAL: list[tuple[str, Any]] = [
    ("groups", True),
    ("groups", 1.0),
    ("groups", np.float32(1)),
    ("groups", torch.tensor(1)),
    ("groups", "1"),
    ("groups", (1,)),
    ("stride", 1.0),
    ("stride", True),
    ("stride", (1, True)),
    ("stride", (1.0, 1)),
    ("stride", [1, 1.0]),
    ("padding", 1.0),
    ("padding", True),
    ("padding", (True, 1)),
    ("padding", "1"),
    ("dilation", True),
    ("dilation", (1, 1.0)),
]


@pytest.mark.parametrize(("argument", "value"), ILLEGAL, ids=str)
def test_what_only_equals_a_legal_argument(argument: str, value: Any) -> None:
    x, weight = torch.randn(1, 8, 9, 9), torch.randn(8, 8, 3, 3)
    for transposed in (False, True):
        f = functional.group_conv_transpose2d if transposed else functional.group_conv2d
        for kwargs in (LEGAL, LEGAL | {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}):
            f(x, weight, **kwargs)
        with pytest.raises(ArgumentError, match=argument):
            f(x, weight, **LEGAL | {argument: value})
        # A wrong call spoils nothing.
        expected = (F.conv_transpose2d if transposed else F.conv2d)(x, weight, **LEGAL)
        assert_close(f(x, weight, **LEGAL), expected, rtol=1e-5, atol=1e-5)


SPELLINGS: list[tuple[str, Any]] = [
    ("stride", [1, 1]),
    ("stride", [1]),
    ("dilation", torch.Size([1, 1])),
    ("padding", "same"),
    *((name, value) for name in ("stride", "padding", "dilation")
      for value in (np.int64(1), np.int8(1), (np.int32(1), 1))),
    ("groups", np.int64(8)),
    ("groups", np.int8(8)),
]  # fmt: skip


@pytest.mark.parametrize(
    "case", range(len(SPELLINGS)), ids=[f"{name}={value!r}" for name, value in SPELLINGS]
)
def test_other_spellings_of_legal_arguments(
    case: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GROUPCONV_CACHE", str(tmp_path / "cache"))
    forget()
    argument, value = SPELLINGS[case]
    # A size of its own: records of plain integers that equal this one are not known yet.
    plain = LEGAL | {"groups": int(value) if argument == "groups" else 1}
    x, weight = torch.randn(1, 32, 56, 40 + case), torch.randn(32, 32 // plain["groups"], 3, 3)
    expected = F.conv2d(x, weight, **plain)
    for _ in range(3):
        actual, name, _ = told(
            lambda: functional.group_conv2d(x, weight, **plain | {argument: value})
        )
        assert name == "native"
        assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    # Equal records of another kind do not stay behind.
    assert_close(functional.group_conv2d(x, weight, **plain), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [torch.zeros(7), torch.zeros(9), torch.zeros(2, 8)], ids=str)
def test_shapes_are_checked_before_the_first_call(bias: Tensor) -> None:
    with pytest.raises(ArgumentError, match="bias"):
        ours(*pair(), bias)


@pytest.mark.parametrize("shape", [(1,), (7,), (9,), (2, 8), (8, 1), ()], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_shape_of_the_bias_is_checked_after_a_legal_call(
    shape: tuple[int, ...], transposed: bool
) -> None:
    x, weight = pair()
    f = functional.group_conv_transpose2d if transposed else functional.group_conv2d
    f(x, weight, torch.zeros(8), groups=2)
    with pytest.raises(ArgumentError, match="bias"):
        f(x, weight, torch.zeros(shape), groups=2)


def test_other_arguments_make_other_choices() -> None:
    x, weight = pair()
    legal = {"stride": 1, "padding": 1, "dilation": 1, "groups": 2}
    changes = ({}, {"stride": 2}, {"padding": 2}, {"dilation": 2}, {"padding": "valid"},
               {"padding": (1, 2)}, {"stride": (1, 2)}, {"stride": (2, 1)})  # fmt: skip
    for _, change in itertools.product(range(2), changes):
        kwargs = legal | change
        actual = functional.group_conv2d(x, weight, **kwargs)
        assert_close(actual, F.conv2d(x, weight, **kwargs), rtol=1e-5, atol=1e-5)
        kwargs |= {"output_padding": 0}
        if "valid" not in kwargs.values():
            actual = functional.group_conv_transpose2d(x, weight, **kwargs)
            assert_close(actual, F.conv_transpose2d(x, weight, **kwargs), rtol=1e-5, atol=1e-5)
    for wrong in (torch.randn(2, 6, 9, 9), torch.randn(2, 8, 9), torch.randn(2, 8, 9, 0)):
        with pytest.raises(ArgumentError):
            ours(wrong, weight)


SHORT, LONG = torch.bfloat16, torch.float64


@pytest.mark.parametrize(
    "dtypes",
    [(None, LONG, None), (None, SHORT, None), (None, None, LONG), (None, None, SHORT),
     (None, None, torch.int32), (SHORT, None, None), (SHORT, SHORT, None), (SHORT, None, SHORT)],
    ids=str,
)  # fmt: skip
def test_mixed_dtypes_are_errors_as_in_torch(dtypes: tuple[torch.dtype | None, ...]) -> None:
    """Of input, weight and bias; also where the right ones were called before."""
    tensors = (*pair(), torch.ones(8))
    ours(*tensors)
    mixed = [t if dtype is None else t.to(dtype) for t, dtype in zip(tensors, dtypes, strict=True)]
    for f in (theirs, ours, ours):
        with pytest.raises(RuntimeError, match="type"):
            f(*mixed)


def test_choices_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_MOST_CHOICES", 3)
    weight = torch.randn(8, 4, 3, 3)
    for size in (3, 4, 5, 6, 7, 3, 4):
        x = torch.randn(1, 8, size, size)
        assert_close(ours(x, weight), theirs(x, weight), rtol=1e-5, atol=1e-5)
        assert 1 <= len(dispatch._choices) <= 3


OTHER_PROCESS = """
import sys
sys.path[:0] = sys.argv[1:]
import torch
import test_dispatch
torch.set_num_threads(1)
print(test_dispatch.chosen())
"""


def chosen() -> str:
    """What runs a few calls, and the tiles of the kernels, as JSON."""
    x = torch.randn(1, 16, 14, 14)
    cases = [(x, torch.randn(16, 16 // g, 3, 3), g) for g in (1, 4, 16)]
    cases.append((x.bfloat16(), cases[1][1].bfloat16(), 4))
    calls: Told = []
    with dispatch.listening(lambda name, refused: calls.append((name, refused))):
        for x, weight, groups in cases:
            functional.group_conv2d(x, weight, groups=groups)
    return json.dumps([calls, [str(kernel.tile) for kernel in tuning._known.values()]])


def test_choices_of_another_process_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By names that do not depend on the process, nor on Python's seed for hashes."""
    settings = {"GROUPCONV_CACHE": str(tmp_path / "cache"), "GROUPCONV_TUNE": "1"}
    for name, value in {**settings, "GROUPCONV_NATIVE": ""}.items():
        monkeypatch.setenv(name, value)
    here = Path(__file__).parent
    expected = run(OTHER_PROCESS, str(here), str(here.parent))
    # Three kernels, one of them for two dtypes; four choices; the fingerprint.
    assert cache.usage().entries == 3 + 4 + 1

    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured or compiled again")

    monkeypatch.setattr(dispatch, "interleave", never)
    monkeypatch.setattr(tuning, "interleave", never)
    monkeypatch.setattr(jit, "compile_object", never)
    forget()
    assert chosen() == expected.strip()
    forget()
    assert cache.usage().entries == 3 + 4 + 1


# Memory layouts.


def layouts(*shape: int) -> Iterator[tuple[str, Tensor]]:
    """Inputs of a shape (N, C, H, W) in every order of memory, dense or not."""
    n, c, h, w = shape
    last = {"memory_format": torch.channels_last}
    yield "contiguous", torch.randn(shape)
    yield "channels last", torch.randn(shape).contiguous(**last)
    yield "columns of a larger image", torch.randn(n, c, h, w + 3)[..., 1 : w + 1]
    yield "the same, channels last", torch.randn(n, c, h, w + 3).contiguous(**last)[..., 1 : w + 1]
    yield "rows of a larger image", torch.randn(n, c, h + 2, w)[:, :, 2:]
    yield "some channels", torch.randn(n, c + 2, h, w)[:, 1 : c + 1]
    yield "the same, channels last", torch.randn(n, c + 2, h, w).contiguous(**last)[:, 1 : c + 1]
    yield "every second column", torch.randn(n, c, h, 2 * w)[..., ::2]
    yield "every second image", torch.randn(2 * n, c, h, w)[::2]
    yield "transposed", torch.randn(n, c, w, h).mT
    yield "transposed, channels last", torch.randn(n, c, w, h).contiguous(**last).mT
    yield "one image many times", torch.randn(1, c, h, w).expand(shape)
    yield "one pixel many times", torch.randn(n, c, 1, 1).expand(shape)
    yield "one channel many times", torch.randn(n, 1, h, w).expand(shape)
    yield "images innermost", torch.randn(h, w, n, c).permute(2, 3, 0, 1)
    yield "channels outermost", torch.randn(c, n, h, w).transpose(0, 1)
    yield "flipped", torch.randn(shape).flip(-1)


# Channels, groups, kernel, stride, padding, transposed.
KINDS_2D = [
    (8, 1, 3, 1, 1, False),
    (8, 4, 3, 2, 1, False),
    (8, 2, 1, 1, 0, False),
    (1, 1, 3, 1, 1, False),
    (8, 4, 3, 1, 1, True),
    (8, 1, 2, 2, 0, True),
]
SHAPES_2D = [
    (2, 4, 5, 6),
    (2, 1, 5, 6),
    (2, 4, 1, 1),
    (1, 1, 1, 1),
    pytest.param((1, 4, 4, 5), marks=pytest.mark.slow),
    pytest.param((1, 8, 1, 7), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("kind", KINDS_2D, ids=str)
@pytest.mark.parametrize("shape", SHAPES_2D, ids=str)
def test_layout_of_the_output_is_torchs(
    shape: tuple[int, ...], kind: tuple[int, int, int, int, int, bool]
) -> None:
    outputs, groups, k, stride, padding, transposed = kind
    inputs = shape[1]
    if inputs % groups or (k == 3 and padding == 0):
        pytest.skip("no such layer")
    f, truth = functional.group_conv2d, F.conv2d
    size = (outputs, inputs // groups, k, k)
    if transposed:
        f, truth = functional.group_conv_transpose2d, F.conv_transpose2d
        size = (inputs, outputs // groups, k, k)
    kwargs = {"stride": stride, "padding": padding, "groups": groups}
    if transposed and min(shape[2:]) == 1 and padding:
        kwargs |= {"stride": 2, "output_padding": 1}
    weight = torch.randn(size)
    for w in (weight, weight.contiguous(memory_format=torch.channels_last)):
        for (name, x), gradients in itertools.product(layouts(*shape), (False, True)):
            w = w.detach().requires_grad_(gradients)
            expected, (actual, way, _) = (
                truth(x, w, **kwargs),
                told(lambda x=x, w=w: f(x, w, **kwargs)),
            )
            assert way == "native"
            assert same_strides(actual, expected), (name, actual.stride(), expected.stride())
            assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def sequences(*shape: int) -> Iterator[tuple[str, Tensor]]:
    """Inputs of a shape (N, C, L) in every order of memory."""
    n, c, length = shape
    yield "contiguous", torch.randn(shape)
    yield "channels last", torch.randn(n, length, c).mT
    yield "part of a longer one", torch.randn(n, c, length + 3)[..., 1 : length + 1]
    yield "the same, channels last", torch.randn(n, length + 3, c).mT[..., 1 : length + 1]
    yield "every second value", torch.randn(n, c, 2 * length)[..., ::2]
    yield "some channels, channels last", torch.randn(n, length, c + 2).mT[:, 1 : c + 1]
    yield "one many times", torch.randn(1, c, length).expand(shape)
    yield "one channel many times", torch.randn(n, 1, length).expand(shape)
    yield "time outermost", torch.randn(length, n, c).permute(1, 2, 0)
    yield "channels outermost", torch.randn(c, n, length).transpose(0, 1)


def check_sequences(shape: tuple[int, ...], kind: tuple[int, int, int, int, int, bool]) -> None:
    """Strides of the output, of a batch and of one sequence, whatever those of the input."""
    outputs, groups, k, stride, padding, transposed = kind
    inputs = shape[1]
    f, truth = functional.group_conv1d, F.conv1d
    size = (outputs, inputs // groups, k)
    if transposed:
        f, truth = functional.group_conv_transpose1d, F.conv_transpose1d
        size = (inputs, outputs // groups, k)
    kwargs = {"stride": stride, "padding": padding, "groups": groups}
    if transposed and shape[2] == 1 and padding:
        kwargs |= {"stride": 2, "output_padding": 1}
    weight = torch.randn(size)
    for w in (weight, weight.mT.contiguous().mT):
        for name, x in sequences(*shape):
            for each in (x, x[0]):
                expected = truth(each, w, **kwargs)
                actual, way, _ = told(lambda x=each, w=w: f(x, w, **kwargs))
                assert way == "native"
                assert_close(actual, expected, rtol=1e-4, atol=1e-5)
                assert same_strides(actual, expected), (name, actual.stride(), expected.stride())


@pytest.mark.parametrize("kind", KINDS_2D, ids=str)
def test_layout_of_sequences_is_torchs(kind: tuple[int, int, int, int, int, bool]) -> None:
    for shape in ((2, 4, 9), (1, 4, 9), (3, 8, 2)):
        if shape[1] % kind[1] == 0:
            check_sequences(shape, kind)


@pytest.mark.parametrize("shape", [(2, 1, 6), (2, 4, 1), (1, 1, 1)], ids=str)
def test_layout_of_sequences_of_one_is_torchs(shape: tuple[int, ...]) -> None:
    """One channel, or one value."""
    for kind in KINDS_2D:
        if shape[1] % kind[1] == 0:
            check_sequences(shape, kind)


def test_layout_of_one_image_is_torchs() -> None:
    weight = torch.randn(8, 2, 3, 3)
    for name, x in layouts(1, 4, 6, 7):
        for each in (x[0], x[0].unsqueeze(0)[0]):
            expected = F.conv2d(each, weight, padding=1, groups=2)
            actual = functional.group_conv2d(each, weight, padding=1, groups=2)
            assert same_strides(actual, expected), name
            assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layout_of_short_numbers_is_torchs(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 2, 3, 3, dtype=dtype)
    for name, x in layouts(2, 4, 6, 7):
        x = x.to(dtype)
        expected = F.conv2d(x, weight, padding=1, groups=2)
        actual = functional.group_conv2d(x, weight, padding=1, groups=2)
        assert actual.dtype == dtype
        assert same_strides(actual, expected), name
        assert_close(actual, expected, rtol=2e-2, atol=2e-2)


def test_bias_in_any_layout() -> None:
    x, weight = pair()
    for bias in (torch.randn(16)[::2], torch.randn(1).expand(8), torch.randn(8).flip(0),
                 torch.randn(8, 2)[:, 1], torch.randn(9)[1:]):  # fmt: skip
        for b in (bias, bias.requires_grad_()):
            assert_close(ours(x, weight, b), theirs(x, weight, b), rtol=1e-5, atol=1e-5)


def test_result_shares_no_memory() -> None:
    """Nor is it written to later."""
    x, weight = pair()
    first = ours(x, weight)
    kept = first.clone()
    second = ours(2 * x, weight)
    second.fill_(7)
    assert torch.equal(first, kept)
    assert torch.equal(ours(x, weight), kept)


# Sums of short numbers.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@every_case
def test_short_numbers_are_rounded_once(case: str, bias: bool, dtype: torch.dtype) -> None:
    layer, _, x = example(case)
    if not bias:
        layer.bias = None
    x, layer = x.to(dtype), layer.to(dtype)
    actual, name, _ = told(lambda: layer(x))
    assert name == "native in float32"
    assert actual.dtype == dtype
    truth = torch_layer(layer).float()(x.float())
    # Half a unit of the last place, and what float32 loses by cancellation.
    half = torch.finfo(dtype).eps / 2
    assert_close(actual, truth, rtol=1.001 * half, atol=1e-5)
    large = truth.abs() > 1e-2
    steps = (actual.view(torch.int16).int() - truth.to(dtype).view(torch.int16).int()).abs()
    assert steps[large].max() <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_that_need_float32(dtype: torch.dtype) -> None:
    """1 + 1 + ... stays at 256 where bfloat16 is summed in bfloat16."""
    x, weight = torch.ones(1, 1000, 2, 2, dtype=dtype), torch.ones(1, 1000, 1, 1, dtype=dtype)
    assert functional.group_conv2d(x, weight).unique().tolist() == [1000.0]
    # Whole numbers: exact in float32, so the result is the rounded truth.
    x = torch.randint(-8, 9, (2, 64, 9, 9)).to(dtype)
    weight = torch.randint(-8, 9, (16, 32, 3, 3)).to(dtype)
    truth = F.conv2d(x.double(), weight.double(), groups=2).to(dtype)
    assert torch.equal(functional.group_conv2d(x, weight, groups=2), truth)


def test_short_numbers_overflow_as_torchs() -> None:
    x = torch.full((1, 2, 1, 3), 300.0, dtype=torch.float16)
    weight = torch.tensor([300.0, -300.0, 1.0, torch.nan]).half().reshape(2, 2, 1, 1)
    actual, expected = functional.group_conv2d(x, weight), F.conv2d(x, weight)
    assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    x = torch.full((1, 1, 1, 1), 300.0, dtype=torch.float16)
    assert functional.group_conv2d(x, x).item() == torch.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_case
def test_gradients_of_short_numbers(case: str, dtype: torch.dtype) -> None:
    layer, _, x = example(case)
    layer = layer.to(dtype)
    other = torch_layer(layer).float()
    a, b = x.to(dtype).requires_grad_(), x.to(dtype).float().requires_grad_()
    layer(a).square().sum().backward()
    other(b).square().sum().backward()
    pairs = [(a, b), *zip(layer.parameters(), other.parameters(), strict=True)]
    for mine, truth in pairs:
        assert mine.grad.dtype == dtype
        scale = truth.grad.abs().max().item()
        assert_close(mine.grad, truth.grad, rtol=0.02, atol=0.02 * scale)


# Gradients in float32.

DIFFERENTIABLE = {
    **CASES,
    "same, even": (
        lambda g: our_nn.GroupConv2d(4, 8, (2, 4), padding="same", groups=g),
        (2, 4, 7, 6),
    ),
    "dilated": (lambda g: our_nn.GroupConv2d(4, 8, 3, dilation=2, groups=g), (2, 4, 7, 8)),
    "circular": (
        lambda g: our_nn.GroupConv2d(4, 8, 3, padding=1, padding_mode="circular", groups=g),
        (2, 4, 7, 6),
    ),
    "transposed, sparse": (
        lambda g: our_nn.GroupConvTranspose2d(4, 8, 2, 3, output_padding=1, groups=g),
        (2, 4, 5, 4),
    ),
}
every_differentiable = pytest.mark.parametrize("case", DIFFERENTIABLE)


def twins(case: str, groups: int = 2) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A layer of ours and torch's with equal weights, and equal inputs."""
    make, shape = DIFFERENTIABLE[case]
    layer = make(groups)
    x = torch.randn(shape)
    return layer, torch_layer(layer), x.clone().requires_grad_(), x.clone().requires_grad_()


def assert_same_gradients(layer: nn.Module, other: nn.Module, a: Tensor, b: Tensor) -> None:
    for mine, truth in [(a, b), *zip(layer.parameters(), other.parameters(), strict=True)]:
        assert (mine.grad is None) == (truth.grad is None)
        if truth.grad is not None:
            scale = truth.grad.abs().max().item()
            assert_close(mine.grad, truth.grad, rtol=1e-5, atol=1e-5 * scale)
            assert same_strides(mine.grad, truth.grad)


def weighted(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 2, y.numel()).reshape(y.shape)).sum()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("groups", [1, 2, 4])
@every_differentiable
def test_gradients(case: str, groups: int) -> None:
    layer, other, a, b = twins(case, groups)
    y, z = layer(a), other(b)
    assert y.requires_grad
    assert y.grad_fn is not None
    assert_close(y, z, rtol=1e-5, atol=1e-5)
    weighted(y).backward()
    weighted(z).backward()
    assert_same_gradients(layer, other, a, b)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("case", ["2-d", "1-d", "transposed"])
def test_gradients_of_some(case: str, wanted: tuple[bool, bool, bool]) -> None:
    layer, other, a, b = twins(case)
    for tensors in ((a, layer.weight, layer.bias), (b, other.weight, other.bias)):
        for tensor, wants in zip(tensors, wanted, strict=True):
            tensor.requires_grad_(wants)
    y, z = layer(a), other(b)
    assert y.requires_grad == z.requires_grad == any(wanted)
    if any(wanted):
        weighted(y).backward()
        weighted(z).backward()
    assert_same_gradients(layer, other, a, b)


@pytest.mark.parametrize("layout", [name for name, _ in layouts(1, 1, 1, 1)][:12:2])
def test_gradients_of_any_layout(layout: str) -> None:
    layer, other, _, _ = twins("2-d")
    x = dict(layouts(2, 4, 7, 6))[layout]
    a, b = (x.detach().requires_grad_() for _ in range(2))
    upstream = torch.randn_like(other(b).detach())
    for g in (upstream, upstream.contiguous(memory_format=torch.channels_last), upstream[:1]):
        layer(a).backward(g.expand_as(upstream))
        other(b).backward(g.expand_as(upstream))
    assert_same_gradients(layer, other, a, b)


@every_differentiable
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_second_gradients(case: str) -> None:
    """A penalty on the gradient of the input trains the weights."""
    layer, other, a, b = twins(case)
    for module, x in ((layer, a), (other, b)):
        (slope,) = torch.autograd.grad(module(x).pow(3).sum(), x, create_graph=True)
        slope.square().sum().backward()
    assert_same_gradients(layer, other, a, b)


@pytest.mark.parametrize("case", ["2-d", "transposed"])
def test_backward_twice(case: str) -> None:
    layer, other, a, b = twins(case)
    for module, x in ((layer, a), (other, b)):
        loss = weighted(module(x))
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    assert_same_gradients(layer, other, a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    layer, other, a, b = twins("2-d")
    weighted(checkpoint(layer, a, use_reentrant=reentrant)).backward()
    weighted(other(b)).backward()
    assert_same_gradients(layer, other, a, b)


def test_hooks() -> None:
    layer, other, a, b = twins("2-d")
    for module, x in ((layer, a), (other, b)):
        seen: list[str] = []
        module.register_forward_hook(lambda _, __, y: 2 * y)
        module.register_full_backward_hook(lambda *_, seen=seen: seen.append("module"))
        module.weight.register_hook(lambda g, seen=seen: seen.append("weight") or 3 * g)
        module.weight.register_post_accumulate_grad_hook(lambda _, s=seen: s.append("after"))
        x.register_hook(lambda g, seen=seen: seen.append("input") or -g)
        y = module(x)
        y.retain_grad()
        weighted(y).backward()
        assert y.grad is not None
        assert sorted(seen) == ["after", "input", "module", "weight"]
    assert_same_gradients(layer, other, a, b)


def test_saved_tensors_may_be_packed() -> None:
    layer, other, a, b = twins("2-d")
    with torch.autograd.graph.save_on_cpu():
        loss = weighted(layer(a))
    loss.backward()
    weighted(other(b)).backward()
    assert_same_gradients(layer, other, a, b)


def test_no_graph_where_none_is_wanted() -> None:
    layer, _, a, _ = twins("2-d")
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y, name, _ = told(lambda: layer(a))
        assert name == "native"
        assert not y.requires_grad
        assert y.grad_fn is None
        assert y.is_inference() == (context is torch.inference_mode)
    with torch.no_grad(), torch.enable_grad():
        assert layer(a).requires_grad
    assert not layer.requires_grad_(False)(a.detach()).requires_grad


def test_weights_changed_before_backward_are_an_error() -> None:
    """As in PyTorch, where the change has a version; the rest is the user's."""
    layer, _, a, _ = twins("2-d")
    loss = weighted(layer(a))
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_output_may_be_changed_in_place() -> None:
    layer, other, a, b = twins("2-d")
    for module, x in ((layer, a), (other, b)):
        weighted(F.relu(module(x).mul_(2).add_(1), inplace=True)).backward()
    assert_same_gradients(layer, other, a, b)


def test_shared_layer_and_accumulated_gradients() -> None:
    layer = our_nn.GroupConv2d(4, 4, 3, padding=1, groups=2)
    other = torch_layer(layer)
    x = torch.randn(2, 4, 6, 6)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    for _ in range(2):
        weighted(layer(layer(a).relu())).backward()
        weighted(other(other(b).relu())).backward()
    assert_same_gradients(layer, other, a, b)


def test_training_comes_to_the_same() -> None:
    layer, other, a, b = twins("2-d")
    for module, x in ((layer, a), (other, b)):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        for _ in range(20):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    for mine, truth in zip(layer.parameters(), other.parameters(), strict=True):
        assert_close(mine, truth, rtol=1e-4, atol=1e-5)


# Settings of the process.


@pytest.mark.parametrize("tune", ["0", "1"])
@pytest.mark.parametrize("native", ["1", ""])
def test_first_call_leaves_the_process_alone(
    tune: str, native: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Random numbers, default dtype, gradient mode and threads are the user's."""
    monkeypatch.setenv("GROUPCONV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GROUPCONV_TUNE", tune)
    monkeypatch.setenv("GROUPCONV_NATIVE", native)
    x, weight = pair()
    y, kernel = pair(torch.bfloat16)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(),  # noqa: NPY002
              torch.get_num_threads(), torch.is_grad_enabled())  # fmt: skip
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.set_rng_state(before[0])
    forget()
    default = torch.get_default_dtype()
    for wide in (torch.float64, torch.float16):
        torch.set_default_dtype(wide)
        try:
            actual, short = ours(x, weight), ours(y, kernel)
            transposed = functional.group_conv_transpose2d(x, weight, stride=4, groups=2)
        finally:
            torch.set_default_dtype(default)
        assert (actual.dtype, short.dtype) == (torch.float32, torch.bfloat16)
        assert_close(actual, theirs(x, weight), rtol=1e-5, atol=1e-5)
        assert_close(
            transposed, F.conv_transpose2d(x, weight, stride=4, groups=2), rtol=1e-5, atol=1e-5
        )
        forget()
    after = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(),  # noqa: NPY002
             torch.get_num_threads(), torch.is_grad_enabled())  # fmt: skip
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    torch.manual_seed(1)
    ours(torch.randn(1, 8, 5, 5, generator=torch.Generator()), weight)
    assert torch.equal(torch.rand(3), expected)
    assert cache.why_not() is None


@pytest.mark.parametrize("flush", [False, True])
def test_tiny_numbers(flush: bool) -> None:
    """What PyTorch does with numbers below 2**-126, unless told to drop them."""
    x, weight = torch.full((1, 1, 4, 4), 1e-20), torch.full((1, 1, 1, 1), 1e-20)
    assert torch.set_flush_denormal(flush) or not flush
    try:
        actual, expected = functional.group_conv2d(x, weight), F.conv2d(x, weight)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(actual, expected)


def test_infinities_and_nan() -> None:
    x, weight = pair()
    x[0, 0, 4, 4], x[1, 7, 0, 0], x[1, 3, 8, 8] = torch.inf, torch.nan, -torch.inf
    assert_close(ours(x, weight), theirs(x, weight), rtol=1e-5, atol=1e-5, equal_nan=True)


def test_deterministic_algorithms() -> None:
    x, weight = pair()
    expected = ours(x, weight)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(ours(x, weight), expected)
    finally:
        torch.use_deterministic_algorithms(False)
