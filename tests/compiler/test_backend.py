"""torch.compile(model, backend="groupconv"): the same as eager, whatever happens between calls."""

import copy
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from compare import assert_close
from compiler.test_compiled import CHANGES, change_data, images, norm
from torch import Tensor, nn

import groupconv
from groupconv.compiler import backend
from groupconv.compiler.compiled import Compiled
from groupconv.compiler.graph import Host


class Network(nn.Module):
    """Batch norms, a residual, a buffer that is no statistic, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), norm(8), nn.ReLU())
        self.conv = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False), norm(8))
        self.register_buffer("scale", torch.rand(8, 1, 1) + 0.5)
        self.head = nn.Linear(8, 5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.conv(x)) * self.scale
        return self.head(x.mean((2, 3)))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing that another test compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Compiled]:
    """Every network that the backend compiles."""
    found: list[Compiled] = []

    def record(*args: Any) -> Compiled:
        found.append(groupconv.compile(*args))
        return found[-1]

    monkeypatch.setattr(backend, "compile", record)
    return found


@pytest.fixture
def model() -> Network:
    return Network()


def check(compiled: Callable[..., Any], model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def sizes(made: list[Compiled]) -> list[tuple[int, ...]]:
    """Of the first input of each program."""
    return [
        program.graph.inputs[0].shape
        for compiled in made
        for program, _ in compiled.programs.values()
    ]


# How it is found.


_FRESH = """
import sys, torch
from torch import nn
model = nn.Sequential(nn.Conv2d(3, 8, 3, groups=1), nn.BatchNorm2d(8), nn.ReLU()).eval()
assert not any(name.startswith("groupconv") for name in sys.modules)
compiled = torch.compile(model, backend="groupconv")
x = torch.randn(2, 3, 9, 9)
with torch.no_grad():
    torch.testing.assert_close(compiled(x), model(x))
from groupconv.compiler import backend
assert "groupconv" in torch._dynamo.list_backends()
"""


def test_a_fresh_process_imports_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FRESH], check=False, capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# What it makes.


def test_batch_norms_are_folded(model: Network, made: list[Compiled]) -> None:
    x = images(2, 13, 17)
    check(torch.compile(model, backend="groupconv"), model, x)
    ours, direct = made[0].program(x), groupconv.compile(model, x).program(x)
    assert not any(isinstance(node.operator, Host) for node in ours.graph.nodes)
    kinds = [[type(node.operator) for node in p.graph.nodes] for p in (ours, direct)]
    assert kinds[0] == kinds[1]
    assert [step.kind for step in ours.steps] == [step.kind for step in direct.steps]


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_resnet18(dynamic: bool | None, made: list[Compiled]) -> None:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18().eval()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, std=0.1)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
    x = torch.randn(1, 3, 64, 64)
    check(torch.compile(model, backend="groupconv", dynamic=dynamic), model, x)
    nodes = made[0].program(x).graph.nodes
    assert not any(isinstance(node.operator, Host) for node in nodes)
    assert len(nodes) == len(groupconv.compile(model, x).program(x).graph.nodes)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(
    mode: Callable[[], Any], model: Network, made: list[Compiled], caplog: pytest.LogCaptureFixture
) -> None:
    compiled = torch.compile(model, backend="groupconv")
    for seed in range(3):
        with mode():
            x = images(2, 13, 17, seed=seed)
            assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(made) == 1
    assert not reasons(caplog)


# Sizes.


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_batches(dynamic: bool | None, model: Network, made: list[Compiled]) -> None:
    compiled = torch.compile(model, backend="groupconv", dynamic=dynamic)
    for n in (2, 3, 5, 1, 4, 3, 2):
        check(compiled, model, images(n, 13, 17, seed=n))
    assert set(sizes(made)) == {(n, 3, 13, 17) for n in (1, 2, 3, 4, 5)}
    programs = [program for compiled in made for program, _ in compiled.programs.values()]
    assert not any(isinstance(node.operator, Host) for p in programs for node in p.graph.nodes)


def test_marked_as_dynamic(model: Network, made: list[Compiled]) -> None:
    compiled = torch.compile(model, backend="groupconv")
    for n in (2, 4, 3, 2, 4):
        x = images(n, 13, 17, seed=n)
        torch._dynamo.mark_dynamic(x, 0)
        check(compiled, model, x)
    assert sorted(sizes(made)) == [(n, 3, 13, 17) for n in (2, 3, 4)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        check(compiled, model, images(6, 13, 17))


def test_many_sizes_are_bounded(model: Network, made: list[Compiled]) -> None:
    compiled = torch.compile(model, backend="groupconv", dynamic=True)
    found: list[backend._Network] = []
    create = backend._Network

    def record(graph: Any) -> backend._Network:
        found.append(create(graph))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "_Network", record)
        for n in range(2, 13):
            check(compiled, model, images(n, 9, 9, seed=n))
            check(compiled, model, images(2, 9, 9))
    assert len(found) == 1
    assert len(found[0]._networks) == 8


def test_layouts(model: Network) -> None:
    compiled = torch.compile(model, backend="groupconv")
    x = images(2, 13, 17)
    check(compiled, model, x.contiguous(memory_format=torch.channels_last))
    check(compiled, model, x.transpose(2, 3).contiguous().transpose(2, 3))
    check(compiled, model, x)


# Weights that change.


@pytest.mark.parametrize("change", CHANGES)
def test_changes_arrive(
    change: Callable[[Tensor], None], model: Network, made: list[Compiled]
) -> None:
    compiled = torch.compile(model, backend="groupconv")
    x = images(2, 13, 17)
    check(compiled, model, x)
    for tensor in (
        model.conv[0].weight, model.conv[1].running_mean, model.conv[1].running_var,
        model.stem[1].bias, model.scale, model.head.weight,
    ):  # fmt: skip
        before = model(x)
        with torch.no_grad():
            change(tensor)
        assert not torch.equal(model(x), before)
        check(compiled, model, x)
    count = len(made)
    check(compiled, model, x)
    assert len(made) == count


def test_an_optimizer_between_calls(model: Network) -> None:
    compiled = torch.compile(model, backend="groupconv")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = images(2, 13, 17)
    for _ in range(3):
        check(compiled, model, x)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_load_state_dict(model: Network) -> None:
    compiled = torch.compile(model, backend="groupconv")
    x = images(2, 13, 17)
    check(compiled, model, x)
    state = {
        name: tensor * 1.5 if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    for assign in (False, True):
        model.load_state_dict(state, assign=assign)
        check(compiled, model, x)
        change_data(model.head.weight)
        check(compiled, model, x)


def test_a_batch_norm_trained_between_calls(model: Network) -> None:
    compiled = torch.compile(model, backend="groupconv")
    x = images(4, 13, 17)
    for _ in range(3):
        check(compiled, model, x)
        model.train()
        model(x)
        model.eval()


def test_python_threads(model: Network) -> None:
    compiled = torch.compile(model, backend="groupconv", dynamic=True)
    check(compiled, model, images(2, 9, 9))

    def work(i: int) -> None:
        for n in (2, 3, 4):
            check(compiled, model, images(n, 9, 9, seed=i))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


# What is left to PyTorch.


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the backend logged."""
    ours = [record for record in caplog.records if record.name == "groupconv"]
    assert all(record.levelno == logging.WARNING for record in ours)
    return [record.getMessage() for record in ours]


def test_graph_breaks(model: Network, made: list[Compiled]) -> None:
    def broken(x: Tensor) -> Tensor:
        y = model.stem(x)
        torch._dynamo.graph_break()
        y = torch.relu(y + model.conv(y))
        # A number that decides what comes next.
        return y.mean((2, 3)) if y.sum().item() > 1e9 else y.amax((2, 3))

    compiled = torch.compile(broken, backend="groupconv")
    for n in (2, 3):
        check(compiled, broken, images(n, 13, 17))
    assert len(made) >= 3


def test_gradients_are_left_to_pytorch(
    model: Network, made: list[Compiled], caplog: pytest.LogCaptureFixture
) -> None:
    compiled, x = torch.compile(model, backend="groupconv"), images(2, 13, 17)
    compiled(x).sum().backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for a, b in zip(found, model.parameters(), strict=True):
        assert_close(a, b.grad, rtol=1e-4, atol=1e-5)
    assert not made
    (reason,) = reasons(caplog)
    assert reason.endswith("gradients are recorded; call the model under torch.no_grad()")
    check(compiled, model, x)
    assert len(made) == 1


def test_frozen_weights_need_no_mode(model: Network, made: list[Compiled]) -> None:
    compiled = torch.compile(model.requires_grad_(False), backend="groupconv")
    check(compiled, model, images(2, 13, 17))
    assert_close(compiled(images(2, 13, 17)), model(images(2, 13, 17)), rtol=1e-4, atol=1e-5)
    assert made


@pytest.mark.parametrize("dynamic", [None, True])
def test_training_mode(
    dynamic: bool | None, model: Network, caplog: pytest.LogCaptureFixture
) -> None:
    model.train()
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="groupconv", dynamic=dynamic)
    for seed in range(3):
        x = images(4, 13, 17, seed=seed)
        check(compiled, reference, x)
        for name, buffer in reference.named_buffers():
            assert_close(model.get_buffer(name), buffer, rtol=1e-5, atol=1e-6)
    (reason,) = reasons(caplog)
    assert "changes" in reason
    model.eval()
    reference.eval()
    check(compiled, reference, x)


def test_dropout_in_training() -> None:
    dropout = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Dropout(0.5)).train()
    compiled = torch.compile(dropout, backend="groupconv")
    with torch.no_grad():
        x = images(2, 40, 40)
        first, second, plain = compiled(x), compiled(x), dropout[0](x)
    assert not torch.equal(first, second)
    for y in (first, second):
        kept = y != 0
        assert 0.4 < kept.float().mean() < 0.6
        assert_close(y[kept], 2 * plain[kept], rtol=1e-4, atol=1e-5)


def test_changes_of_an_input(caplog: pytest.LogCaptureFixture) -> None:
    def change(x: Tensor) -> Tensor:
        return x.relu_() + 1

    x = images(2, 5, 5)
    y, z = x.clone(), x.clone()
    with torch.no_grad():
        assert torch.equal(torch.compile(change, backend="groupconv")(y), change(z))
    assert torch.equal(y, z)
    assert "changes an input" in reasons(caplog)[0]


def test_other_devices(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Conv2d(3, 8, 3).to("meta")
    with torch.no_grad():
        y = torch.compile(model, backend="groupconv")(images(2, 9, 9).to("meta"))
    assert y.shape == (2, 8, 7, 7)
    assert "is on meta" in reasons(caplog)[0]


def test_empty_batches(model: Network, caplog: pytest.LogCaptureFixture) -> None:
    compiled = torch.compile(model, backend="groupconv")
    with torch.no_grad():
        assert compiled(images(0, 13, 17)).shape == (0, 5)
    assert "must not be empty" in reasons(caplog)[0]


def test_an_unknown_processor(
    model: Network, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "runnable", lambda: ())
    check(torch.compile(model, backend="groupconv"), model, images(2, 13, 17))
    assert "no code can be generated" in reasons(caplog)[0]


def test_other_dtypes(model: Network) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        other = copy.deepcopy(model).to(dtype)
        with torch.no_grad():
            x = images(2, 13, 17).to(dtype)
            found = torch.compile(other, backend="groupconv")(x)
            assert found.dtype == dtype
            assert_close(found, other(x), rtol=1e-3, atol=1e-5)
