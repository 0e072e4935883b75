"""explain(): every convolution of a module, in order, with what ran it and why nothing else did."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import groupconv
from groupconv import nn as our_nn
from groupconv.errors import ArgumentError
from groupconv.kernels import dispatch
from groupconv.nn import functional
from groupconv.nn.explain import Explained, Explanation, explain

TORCHS = "the layer is a Conv2d of torch; groupconv.nn has layers that use it"


@pytest.fixture(autouse=True)
def _native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GROUPCONV_NATIVE", "1")
    torch.manual_seed(0)
    dispatch._choices.clear()
    yield
    dispatch._choices.clear()
    assert not dispatch._listeners


def hooks(module: nn.Module) -> int:
    """Hooks of a module and all below it."""
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_hooks_always_called)
        for m in module.modules()
    )


class Mixed(nn.Module):
    """Layers of ours and of torch, and a functional call."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.body = nn.Sequential(our_nn.GroupConv2d(8, 8, 3, groups=2), nn.ReLU())
        self.up = our_nn.GroupConvTranspose2d(8, 4, 2, stride=2, groups=4)
        self.weight = nn.Parameter(torch.randn(4, 1, 3, 3))
        self.wide = our_nn.GroupConv2d(4, 4, 1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.body(self.stem(x)))
        x = functional.group_conv2d(x, self.weight, groups=4)
        return self.wide(x.double())


IMAGE = torch.randn(1, 3, 9, 9)


def test_a_network_of_everything() -> None:
    model = Mixed()
    found = explain(model, IMAGE)
    assert isinstance(found, Explanation)
    assert [(call.layer, call.chosen) for call in found.calls] == [
        ("stem", "aten"),
        ("body.0", "native"),
        ("up", "native"),
        ("", "native"),
        ("wide", "aten"),
    ]
    stem, body, _, call, wide = found.calls
    assert stem.refused == {"native": TORCHS}
    assert stem.description == str(model.stem)
    assert body.description == str(model.body[0])
    assert body.refused["aten"] == "native comes first"
    assert set(body.refused) == {"native in float32", "aten"}
    assert call.description == str(model)
    assert wide.refused["native"] == "the input is torch.float64, this takes torch.float32"
    assert hooks(model) == 0


def test_every_call_has_a_reason_for_every_other_implementation() -> None:
    names = {way.name for way in dispatch.TABLE}
    for call in explain(Mixed(), IMAGE).calls:
        if call.layer != "stem":
            assert call.refused.keys() == names - {call.chosen}
            assert all(call.refused.values())


def test_text() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), our_nn.GroupConv2d(8, 8, 1, groups=2))
    assert str(explain(model, IMAGE)) == (
        "0: Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))\n"
        "  runs on aten\n"
        f"  not on native: {TORCHS}\n"
        "1: GroupConv2d(8, 8, kernel_size=(1, 1), stride=(1, 1), groups=2)\n"
        "  runs on native\n"
        "  not on native in float32: the input is torch.float32, this takes torch.bfloat16 or "
        "torch.float16\n"
        "  not on aten: native comes first"
    )


def test_a_layer_alone() -> None:
    layer = our_nn.GroupConv1d(4, 4, 3, groups=2)
    found = explain(layer, torch.randn(2, 4, 8))
    assert [(call.layer, call.chosen) for call in found.calls] == [("", "native")]
    assert str(found).startswith("(the module): GroupConv1d(4, 4, ")
    found = explain(nn.Conv2d(3, 4, 3), IMAGE)
    assert found.calls == (
        Explained("", "Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))", "aten",
                  {"native": TORCHS}),
    )  # fmt: skip


def test_without_convolutions() -> None:
    found = explain(nn.Linear(3, 3), torch.randn(1, 3))
    assert found.calls == ()
    assert str(found) == "no convolution was called"
    assert found.to_dict() == {"calls": []}


def test_a_layer_that_is_not_called() -> None:
    model = Mixed()
    model.spare = our_nn.GroupConv2d(8, 8, 3)
    assert "spare" not in [call.layer for call in explain(model, IMAGE).calls]


def test_plain_values() -> None:
    found = explain(Mixed(), IMAGE)
    values = found.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["calls"][1]["layer"] == "body.0"
    assert values["calls"][1].keys() == {"layer", "description", "chosen", "refused"}


def test_several_arguments() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = our_nn.GroupConv2d(3, 3, 1, groups=3)

        def forward(self, x: Tensor, scale: float, y: Tensor | None = None) -> Tensor:
            return self.conv(x) * scale + (0 if y is None else y)

    for inputs in ((IMAGE, 2.0), (IMAGE, 2.0, IMAGE)):
        assert [call.layer for call in explain(Two(), inputs).calls] == ["conv"]


def test_shared_layers_are_told_at_each_call() -> None:
    layer = our_nn.GroupConv2d(3, 3, 3, padding=1, groups=3)
    model = nn.Sequential(layer, nn.Sequential(layer, nn.ReLU()), nn.Conv2d(3, 3, 1), layer)
    found = explain(model, IMAGE)
    assert [call.layer for call in found.calls] == ["0", "0", "2", "0"]
    assert hooks(model) == 0


def test_reasons_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = our_nn.GroupConv2d(3, 3, 3, groups=3)
    with torch.autocast("cpu"):
        (call,) = explain(layer, IMAGE).calls
    assert (call.chosen, call.refused["native"]) == ("aten", "autocast chooses the dtype")
    (call,) = explain(layer, IMAGE).calls
    assert call.chosen == "native"
    (call,) = explain(layer.bfloat16(), IMAGE.bfloat16()).calls
    assert call.chosen == "native in float32"
    monkeypatch.setenv("GROUPCONV_NATIVE", "0")
    dispatch._choices.clear()
    (call,) = explain(layer.float(), IMAGE).calls
    assert (call.chosen, call.refused["native"]) == ("aten", "GROUPCONV_NATIVE=0")
    (call,) = explain(layer.to("meta"), IMAGE.to("meta")).calls
    assert "on meta" in call.refused["native"]


def test_unbatched_and_padded_layers_are_one_call() -> None:
    layer = our_nn.GroupConv2d(3, 3, 3, padding=1, padding_mode="circular", groups=3)
    for x in (IMAGE, IMAGE[0]):
        assert len(explain(layer, x).calls) == 1
    assert len(explain(our_nn.GroupConv3d(3, 3, 1), torch.randn(3, 4, 4, 4)).calls) == 1


class Failing(nn.Module):
    """Fails between two convolutions, in a module of its own."""

    class Middle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("in forward")

    def __init__(self, caught: bool) -> None:
        super().__init__()
        self.caught = caught
        self.first = our_nn.GroupConv2d(3, 3, 1, groups=3)
        self.inner = nn.Sequential(our_nn.GroupConv2d(3, 3, 1, groups=3), self.Middle())
        self.last = our_nn.GroupConv2d(3, 3, 1, groups=3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        try:
            x = self.inner(x)
        except KeyError:
            if not self.caught:
                raise
        x = functional.group_conv2d(x, torch.randn(3, 1, 1, 1), groups=3)
        return self.last(x)


def test_errors_leave_no_hooks() -> None:
    model = Failing(caught=False)
    with pytest.raises(KeyError, match="in forward"):
        explain(model, IMAGE)
    assert hooks(model) == 0
    assert not dispatch._listeners
    with pytest.raises(ArgumentError):
        explain(our_nn.GroupConv2d(4, 4, 3), IMAGE)
    assert not dispatch._listeners


def test_names_are_right_after_a_caught_error() -> None:
    found = explain(Failing(caught=True), IMAGE)
    assert [call.layer for call in found.calls] == ["first", "inner.0", "", "last"]


def test_hooks_of_the_user_stay() -> None:
    model = Mixed()
    seen: list[str] = []
    handles = [
        model.stem.register_forward_hook(lambda *_: seen.append("after")),
        model.stem.register_forward_pre_hook(lambda *_: seen.append("before")),
        model.register_forward_hook(lambda *_: seen.append("model"), always_call=True),
    ]
    before = hooks(model)
    assert len(explain(model, IMAGE).calls) == 5
    assert seen == ["before", "after", "model"]
    assert hooks(model) == before
    for handle in handles:
        handle.remove()


def test_errors_of_a_users_hook() -> None:
    """Raised before the module is entered, and caught by what called it."""

    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Module()
            self.body.forward = lambda x: x
            self.conv = our_nn.GroupConv2d(3, 3, 1, groups=3)

        def forward(self, x: Tensor) -> Tensor:
            try:
                self.body(x)
            except KeyError:
                x = functional.group_conv2d(x, torch.randn(3, 1, 1, 1), groups=3)
            return self.conv(x)

    def refuse(*_: object) -> None:
        raise KeyError

    model = nn.Sequential(Careful())
    model[0].body.register_forward_pre_hook(refuse)
    found = explain(model, IMAGE)
    assert [call.layer for call in found.calls] == ["0", "0.conv"]


@pytest.mark.parametrize("module", [None, 3, torch.relu, our_nn.GroupConv2d, [nn.ReLU()]])
def test_what_is_no_module(module: Any) -> None:
    with pytest.raises(ArgumentError, match=r"explain: module=.* must be a torch\.nn\.Module"):
        explain(module, IMAGE)


def test_it_is_public() -> None:
    assert groupconv.explain is explain
    assert groupconv.Explanation is Explanation


def test_nothing_is_left_of_the_run() -> None:
    model = Mixed().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = IMAGE.clone().requires_grad_()
    explain(model, x)
    assert x.grad is None
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_statistics_of_batch_norms_stay() -> None:
    model = nn.Sequential(our_nn.GroupConv2d(3, 3, 3, groups=3), nn.BatchNorm2d(3))
    before = model[1].running_mean.clone()
    explain(model, IMAGE)
    assert torch.equal(model[1].running_mean, before)


def test_explain_inside_explain() -> None:
    class Curious(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = our_nn.GroupConv2d(3, 3, 1, groups=3)
            self.found: Explanation | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.found = explain(self.inner, x)
            return x

    model = Curious()
    found = explain(model, IMAGE)
    assert [call.layer for call in model.found.calls] == [""]
    assert [call.layer for call in found.calls] == ["inner"]
    assert hooks(model) == 0


def test_calls_of_other_threads_are_not_told() -> None:
    entered, done = threading.Event(), threading.Event()

    class Waiting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            entered.set()
            assert done.wait(30)
            return x

    def other() -> None:
        assert entered.wait(30)
        functional.group_conv2d(IMAGE, torch.randn(3, 1, 1, 1), groups=3)
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    found = explain(Waiting(), IMAGE)
    thread.join()
    assert found.calls == ()


def test_a_compiled_module() -> None:
    model = nn.Sequential(our_nn.GroupConv2d(3, 3, 3, groups=3), nn.ReLU())
    try:
        (call,) = explain(torch.compile(model, backend="eager"), IMAGE).calls
    except ArgumentError:
        return
    finally:
        assert hooks(model) == 0
    assert call.refused["native"] == "torch.compile or torch.export is tracing"
