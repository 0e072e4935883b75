"""Several threads and processes at once: results are right, and nothing waits for ever."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from groupconv import nn as our_nn
from groupconv.kernels import dispatch, fingerprint, tuning, weights
from groupconv.nn import functional


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty cache and a process that knows no kernels; its threads are given back."""
    monkeypatch.setenv("GROUPCONV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GROUPCONV_NATIVE", "1")
    torch.manual_seed(0)
    count = torch.get_num_threads()
    forget()
    yield
    torch.set_num_threads(count)
    forget()


def forget() -> None:
    """Make this process ask the cache again."""
    dispatch._choices.clear()
    tuning._known.clear()
    weights._entries.clear()
    fingerprint.fingerprint.cache_clear()


def together(count: int, work: Callable[[int], None]) -> None:
    """Run ``work(i)`` in ``count`` threads that begin at the same time."""
    begin = threading.Barrier(count, timeout=60)
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            begin.wait()
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("tune", ["0", "1"])
def test_one_layer_in_many_threads(tune: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them make the first call, and one object file comes into the process."""
    monkeypatch.setenv("GROUPCONV_TUNE", tune)
    torch.set_num_threads(count)
    layer = our_nn.GroupConv2d(16, 16, 3, padding=1, groups=4).requires_grad_(False)
    inputs = torch.randn(6, 1, 16, 14, 14)
    expected = [F.conv2d(x, layer.weight, layer.bias, padding=1, groups=4) for x in inputs]

    def work(i: int) -> None:
        for j in range(20):
            k = (i + j) % 6
            assert_close(layer(inputs[k]), expected[k], rtol=1e-5, atol=1e-5)

    together(6, work)
    assert len(tuning._known) == 1
    assert len(dispatch._choices) == 1


def test_other_layers_in_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """With staging memory, gradients and transposed layers among them."""
    monkeypatch.setenv("GROUPCONV_TUNE", "1")
    torch.set_num_threads(2)
    layers: list[nn.Module] = [
        our_nn.GroupConv2d(8, 8, 3, stride=2, padding=1, groups=8),
        our_nn.GroupConv2d(6, 12, 3, padding=1, groups=3),
        our_nn.GroupConvTranspose2d(8, 8, 3, stride=2, groups=2),
        our_nn.GroupConv1d(8, 16, 3, groups=2),
    ]

    def work(i: int) -> None:
        layer = layers[i % len(layers)]
        random = torch.Generator().manual_seed(i)
        shape = (2, layer.in_channels, *[10 + i // 4] * (layer.weight.ndim - 2))
        kind = getattr(F, "conv_transpose2d" if layer.transposed else f"conv{len(shape) - 2}d")
        kwargs = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
        for _ in range(5):
            a = torch.randn(shape, generator=random, requires_grad=True)
            b = a.detach().clone().requires_grad_()
            y, z = layer(a), kind(b, layer.weight, layer.bias, **kwargs)
            assert_close(y, z, rtol=1e-5, atol=1e-5)
            # For the input only: gradients of shared weights are a race in PyTorch too.
            assert_close(
                torch.autograd.grad(y.square().sum(), a)[0],
                torch.autograd.grad(z.square().sum(), b)[0],
                rtol=1e-4,
                atol=1e-4,
            )

    together(8, work)


def test_many_threads_on_a_warm_cache() -> None:
    """Object files of the cache are loaded by several threads."""
    cases = [(torch.randn(1, 8, n, n), torch.randn(8, 4, 3, 3)) for n in (5, 6, 7, 8)]
    for x, weight in cases:
        functional.group_conv2d(x, weight, groups=2)
    forget()

    def work(i: int) -> None:
        for j in range(4):
            x, weight = cases[(i + j) % 4]
            actual = functional.group_conv2d(x, weight, groups=2)
            assert_close(actual, F.conv2d(x, weight, groups=2), rtol=1e-5, atol=1e-5)

    together(8, work)


LARGE = [
    # Channels, groups, kernel, stride, size: rows in the order of memory, and staged ones.
    (64, 4, 3, 1, 32),
    (64, 64, 3, 2, 33),
    (48, 3, 1, 1, 32),
    (6, 2, 5, 1, 64),
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_threads_change_between_calls(case: tuple[int, ...]) -> None:
    channels, groups, k, stride, size = case
    x = torch.randn(3, channels, size, size)
    weight = torch.randn(channels, channels // groups, k, k)
    torch.set_num_threads(1)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=memory_format)
        expected = F.conv2d(x, weight, None, stride, k // 2, 1, groups)
        first = None
        for count in (1, 2, 1, 3, 4, 2):
            torch.set_num_threads(count)
            actual = functional.group_conv2d(x, weight, None, stride, k // 2, 1, groups)
            assert_close(actual, expected, rtol=1e-4, atol=1e-4)
            # The order of a sum does not depend on who computes it.
            assert first is None or torch.equal(actual, first)
            first = actual
        torch.set_num_threads(1)


def test_threads_of_python_with_threads_of_the_pool() -> None:
    torch.set_num_threads(2)
    x, weight = torch.randn(4, 64, 28, 28), torch.randn(64, 16, 3, 3)
    expected = F.conv2d(x, weight, padding=1, groups=4)

    def work(i: int) -> None:
        for _ in range(5):
            actual = functional.group_conv2d(x, weight, padding=1, groups=4)
            assert_close(actual, expected, rtol=1e-4, atol=1e-4)

    together(3, work)


class _Convolved(Dataset[Tensor]):
    """Images that come out of a layer."""

    def __init__(self, layer: nn.Module, images: Tensor) -> None:
        self.layer, self.images = layer, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        with torch.no_grad():
            return self.layer(self.images[i])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("used", [False, True])
def test_workers_of_a_data_loader(used: bool) -> None:
    """Forked after two threads were used; also before the first call of the layer."""
    torch.set_num_threads(2)
    layer = our_nn.GroupConv2d(16, 16, 3, padding=1, groups=4).requires_grad_(False)
    images = torch.randn(8, 16, 32, 32)
    expected = F.conv2d(images, layer.weight, layer.bias, padding=1, groups=4)
    if used:
        assert_close(layer(images), expected, rtol=1e-5, atol=1e-5)
        layer(images[0])
    loader = DataLoader(_Convolved(layer, images), batch_size=2, num_workers=2, timeout=60)
    assert_close(torch.cat(list(loader)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_spawned_workers_of_a_data_loader() -> None:
    layer = our_nn.GroupConv2d(16, 16, 3, padding=1, groups=4).requires_grad_(False)
    images = torch.randn(4, 16, 32, 32)
    loader = DataLoader(
        _Convolved(layer, images), num_workers=2, timeout=100, multiprocessing_context="spawn"
    )
    expected = F.conv2d(images, layer.weight, layer.bias, padding=1, groups=4)
    assert_close(torch.cat(list(loader)), expected, rtol=1e-5, atol=1e-5)


# Children compare with NumPy: after a fork PyTorch's own threads are gone, and what it would
# share among them waits for ever. Only torch.set_num_threads(1), which its own workers call too,
# makes the rest of it usable, the backward among it.
FORK = """
import json, os, signal, threading, time
import numpy as np
import torch
import torch.nn.functional as F
from groupconv.kernels import jit, openmp, tuning
from groupconv.nn import functional
torch.set_num_threads(2)
# Weights, too, large enough for PyTorch to share among its threads what it does with them.
x, weight = torch.randn(4, 128, 28, 28), torch.randn(128, 64, 3, 3)
expected = F.conv2d(x, weight, padding=1, groups=2).numpy()

def call(weight=weight, padding=1):
    actual = functional.group_conv2d(x, weight, padding=padding, groups=2)
    assert np.abs(actual.detach().numpy() - expected).max() < 1e-3
    return actual

def new():
    # A kernel that nobody has made yet.
    assert functional.group_conv2d(x[:, :, :20], weight, groups=2).shape == (4, 128, 18, 26)

def known():
    assert openmp.threads() == 1
    for _ in range(3):
        call()

def train():
    torch.set_num_threads(1)
    w = weight.clone().requires_grad_()
    call(w).sum().backward()
    assert np.isfinite(w.grad.numpy()).all()

def grandchild():
    assert child(known) == "right"

def in_thread():
    thread = threading.Thread(target=known, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()

def child(work, seconds=30):
    if (pid := os.fork()) == 0:
        signal.alarm(seconds)
        try:
            work()
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    return {0: "right", signal.SIGALRM: "hung"}.get(status, status)

def held(lock):
    # While another thread holds the lock, as it does during its own first call.
    taken, done = threading.Event(), threading.Event()
    def hold():
        with lock:
            taken.set()
            done.wait()
    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    threading.Timer(0.2, done.set).start()
    try:
        return child(new, 2)
    finally:
        done.set()
        thread.join()

found = {}
before = call().numpy()
call()
assert openmp.threads() == 2
for work in (known, grandchild, in_thread):
    found[work.__name__] = child(work)
found["new call"] = child(lambda: call(padding=(1, 1)))
found["new kernel"] = child(new)
copy = weight.clone()
found["new weights"] = child(lambda: call(copy))
found["training"] = child(train)
# The parent has its threads as before.
assert openmp.threads() == 2
call()
found["lock of tuning"] = held(tuning._lock)
found["lock of LLVM"] = held(jit._lock)
call()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What became of the children of a process that had used two threads."""
    folder = tmp_path_factory.mktemp("forked") / "cache"
    settings = {"GROUPCONV_CACHE": str(folder), "GROUPCONV_NATIVE": "1", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "case",
    [
        "known",
        "grandchild",
        "in_thread",
        "new call",
        "new kernel",
        "new weights",
        "training",
        "lock of tuning",
        "lock of LLVM",
    ],
)
def test_child_after_a_fork(case: str, forked: dict[str, str]) -> None:
    assert forked[case] == "right"


QUIET = """
import torch
from groupconv import nn
layer = nn.GroupConv2d(8, 8, 3, groups=2)
x = torch.randn(1, 8, 9, 9)
layer(x)
weights = [torch.randn(8, 4, 3, 3) for _ in range(3)]
for w in weights:
    nn.functional.group_conv2d(x, w, groups=2)
"""


def test_end_of_a_process_is_quiet() -> None:
    """While weights are alive."""
    done = subprocess.run(
        [sys.executable, "-c", QUIET], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
