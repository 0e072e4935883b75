"""Compiled networks as users have them: calls, errors, threads, memory."""

import copy
import gc
import itertools
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_close
from torch import Tensor, nn

import groupconv
from groupconv.compiler import library
from groupconv.compiler.compiled import Compiled
from groupconv.compiler.program import Program
from groupconv.compiler.session import Session
from groupconv.compiler.task import Task
from groupconv.errors import ArgumentError, GroupConvError
from groupconv.nn import ChannelShuffle


class Network(nn.Module):
    """A small network of the usual parts, with two outputs, and a part that PyTorch runs."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), norm(16), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(16, 16, 1, groups=4), norm(16), nn.ReLU6(), ChannelShuffle(4),
            nn.Conv2d(16, 16, 3, padding=1, groups=16), norm(16), nn.Conv2d(16, 16, 1, groups=2),
        )  # fmt: skip
        self.head = nn.Linear(16, 5)
        self.eval()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.stem(x)
        y = torch.relu(y + self.block(y))
        total = y.cumsum(2).flip(3)
        return {"logits": self.head(y.mean((2, 3))), "map": y, "total": total}


def norm(channels: int) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(channels)
    with torch.no_grad():
        made.running_mean.normal_(0, 0.1)
        made.running_var.uniform_(0.5, 1.5)
        made.weight.uniform_(0.5, 1.5)
        made.bias.normal_(0, 0.1)
    return made


def images(*size: int, seed: int = 1) -> Tensor:
    """``(N, 3, H, W)``."""
    n, height, width = size
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def check(compiled: nn.Module, model: nn.Module, x: Tensor) -> None:
    """The network returns what eager PyTorch does."""
    with torch.no_grad():
        expected, found = model(x.clone()), compiled(x)
    assert found.keys() == expected.keys()
    for name, y in expected.items():
        assert found[name].shape == y.shape
        assert_close(found[name], y, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def model() -> Network:
    return Network()


@pytest.fixture(scope="module")
def compiled(model: Network) -> Compiled:
    return groupconv.compile(model, images(2, 13, 17))


# Calls.


def test_returns_what_eager_returns(model: Network, compiled: Compiled) -> None:
    for seed in range(3):
        check(compiled, model, images(2, 13, 17, seed=seed))


def test_outputs_of_one_call_outlive_the_next(compiled: Compiled) -> None:
    x = images(2, 13, 17)
    first = compiled(x)
    kept = {name: y.clone() for name, y in first.items()}
    compiled(-x)
    for name, y in first.items():
        assert torch.equal(y, kept[name])


def test_other_sizes_get_programs_of_their_own(model: Network) -> None:
    compiled = groupconv.compile(model, images(1, 8, 8))
    sizes = [(n, 5 + i, 9) for i, n in enumerate((1, 2, 3, 1, 4, 1, 1, 2, 1))]
    for size in sizes:
        check(compiled, model, images(*size))
        assert len(compiled.programs) <= 8
    assert len(compiled.programs) == 8
    # The first ones are forgotten, and made again.
    check(compiled, model, images(1, 8, 8))


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 1, 19), (1, 23, 1)])
def test_odd_sizes(size: tuple[int, int, int], model: Network) -> None:
    check(groupconv.compile(model, images(*size)), model, images(*size, seed=4))


def test_layouts_of_the_input(model: Network, compiled: Compiled) -> None:
    x = images(2, 13, 17)
    wide = torch.full((2, 6, 15, 20), torch.nan)
    part = wide[:, 1:4, 2:, 1:18]
    part.copy_(x)
    for y in (
        x.contiguous(memory_format=torch.channels_last),
        part,
        x.transpose(2, 3).contiguous().transpose(2, 3),
        x[:1].expand(2, -1, -1, -1),
        x.flip(0)[::1],
    ):
        check(compiled, model, y)


def test_channels_last_in_channels_last_out(compiled: Compiled) -> None:
    x = images(2, 13, 17).contiguous(memory_format=torch.channels_last)
    assert compiled(x)["map"].is_contiguous(memory_format=torch.channels_last)
    assert compiled(x.contiguous())["map"].is_contiguous()


def test_modes_of_autograd(model: Network) -> None:
    """A program made in one mode runs in the others."""
    modes = (torch.inference_mode, torch.no_grad, torch.enable_grad)
    for first, second in itertools.permutations(modes, 2):
        with first():
            compiled = groupconv.compile(model, images(1, 9, 7))
            compiled(images(1, 9, 7))
        with second():
            found = compiled(images(1, 9, 7))
        check(compiled, model, images(1, 9, 7))
        assert not any(y.requires_grad for y in found.values())


# Errors.


def test_training_mode(model: Network, compiled: Compiled) -> None:
    with pytest.raises(ArgumentError, match=r"train\(True\)"):
        compiled.train()
    assert compiled.eval() is compiled
    assert not compiled.training
    other = Network()
    other.block[1].train()
    with pytest.raises(ArgumentError, match=r"compile: block\.1 is in training mode"):
        groupconv.compile(other, images(1, 9, 9))
    with pytest.raises(ArgumentError, match="compile: model is in training mode"):
        groupconv.compile(Network().train(), images(1, 9, 9))


def test_other_devices(compiled: Compiled) -> None:
    with pytest.raises(ArgumentError, match=r"stem\.0\.weight is on meta"):
        groupconv.compile(Network().to("meta"), images(1, 9, 9))
    with pytest.raises(ArgumentError, match="input 0 is on meta"):
        compiled(images(2, 13, 17).to("meta"))
    with pytest.raises(ArgumentError, match="input 0 is a list"):
        compiled([1.0])


def test_gradients(model: Network, compiled: Compiled) -> None:
    x = images(2, 13, 17).requires_grad_()
    with pytest.raises(ArgumentError, match="input 0 requires gradients"):
        compiled(x)
    with torch.no_grad():
        check(compiled, model, x)


def test_empty_batches(compiled: Compiled) -> None:
    with pytest.raises(ArgumentError, match=r"input 0 has shape \[0, 3, 13, 17\]"):
        compiled(images(0, 13, 17))


def test_inputs_that_do_not_fit(compiled: Compiled) -> None:
    with pytest.raises(GroupConvError, match="can't be recorded"):
        compiled(torch.randn(1, 4, 9, 9))
    with pytest.raises(GroupConvError, match="can't be recorded"):
        compiled(images(1, 9, 9), images(1, 9, 9))
    check(compiled, Network(), images(2, 13, 17))


class Counting(nn.Module):
    """Changes a buffer in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(3, 1, 1))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.count[0].add_(1)
        return x + self.count


def test_networks_that_change_themselves() -> None:
    counting = Counting()
    with pytest.raises(GroupConvError, match="changes its own tensors"):
        groupconv.compile(counting, images(1, 5, 5))
    assert counting.count.sum() == 0


# Weights.


def change_version(weight: Tensor) -> None:
    weight.mul_(2)


def change_data(weight: Tensor) -> None:
    weight.data[-1] += 1


def change_numpy(weight: Tensor) -> None:
    weight.detach().numpy().flat[0] = 5


def change_memory(weight: Tensor) -> None:
    weight.data = weight.data * 3


CHANGES = (change_version, change_data, change_numpy, change_memory)


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_model_do_not_arrive(
    change: Callable[[Tensor], None], tmp_path: Path
) -> None:
    model = Network()
    as_it_was = copy.deepcopy(model)
    compiled = groupconv.compile(model, images(1, 9, 9))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                change(tensor)
    check(compiled, as_it_was, images(1, 9, 9))
    compiled.save(tmp_path / "network")
    check(groupconv.load_compiled(tmp_path / "network"), as_it_was, images(1, 9, 9))
    with pytest.raises(ArgumentError, match=r"shapes \[\[1, 3, 7, 9\]\].* has changed"):
        compiled(images(1, 7, 9))


def test_one_number_that_changed_is_seen() -> None:
    model = Network()
    compiled = groupconv.compile(model, images(1, 9, 9))
    model.block[5].running_var.data[7] += 1e-6
    with pytest.raises(ArgumentError, match="has changed"):
        compiled(images(2, 9, 9))


def weights(compiled: Compiled) -> dict[str, set[int]]:
    """Addresses of the packed weights of each convolution."""
    found: dict[str, set[int]] = {}
    for program, _ in compiled.programs.values():
        for step in program.steps:
            if isinstance(step, Task) and step.packed is not None:
                found.setdefault(step.name, set()).add(step.packed.tensor.data_ptr())
    return found


def test_instances_share_packed_weights() -> None:
    first = groupconv.compile(Network(), images(1, 16, 16))
    second = groupconv.compile(Network(), images(1, 16, 16))
    assert len(weights(first)) > 3
    assert weights(first) == weights(second)
    # Programs for other sizes too, where their kernels read the weights in the same order.
    first(images(2, 16, 16))
    assert any(len(places) == 1 for places in weights(first).values())
    third = groupconv.compile(Network(seed=1), images(1, 16, 16))
    assert not set().union(*weights(first).values()) & set().union(*weights(third).values())


def test_packed_weights_go_with_the_last_instance() -> None:
    gc.collect()
    before = len(library._packed)
    compiled = groupconv.compile(Network(seed=5), images(1, 16, 16))
    assert len(library._packed) > before
    del compiled
    gc.collect()
    assert len(library._packed) == before


# Threads.


def bits(outputs: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: y.contiguous().numpy().tobytes() for name, y in outputs.items()}


@pytest.fixture
def threads() -> Any:
    """Sets the number of PyTorch's threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_any_number_of_threads_gives_the_same_bits(
    model: Network, threads: Callable[[int], None]
) -> None:
    # Large enough that the steps are shared.
    x = images(3, 61, 67)
    compiled = groupconv.compile(model, x)
    found = []
    for number in (1, 2, 3, 1, 2):
        threads(number)
        found.append(bits(compiled(x)))
    assert all(other == found[0] for other in found)


def test_more_threads_than_cores_meet_again_and_again(
    model: Network, threads: Callable[[int], None]
) -> None:
    """Those that wait give way to those that work."""
    x = images(3, 61, 67)
    compiled = groupconv.compile(model, x)
    threads(1)
    expected = bits(compiled(x))
    threads((os.cpu_count() or 1) + 3)
    assert all(bits(compiled(x)) == expected for _ in range(100))


def test_any_split_of_the_batch_gives_the_same_bits(model: Network) -> None:
    x = images(5, 21, 15)
    compiled = groupconv.compile(model, x)
    whole = compiled(x)
    for parts in ((1, 4), (2, 3), (1, 1, 1, 2)):
        pieces = [compiled(part) for part in x.split(parts)]
        joined = {name: torch.cat([piece[name] for piece in pieces]) for name in whole}
        assert bits(joined) == bits(whole)


@pytest.mark.parametrize("number", [1, 2])
def test_eight_python_threads(number: int, model: Network, threads: Callable[[int], None]) -> None:
    threads(number)
    compiled = groupconv.compile(model, images(1, 11, 11))
    inputs = [images(1 + i % 3, 11, 11 + i % 2, seed=i) for i in range(8)]
    expected = [bits(compiled(x)) for x in inputs]
    start = threading.Barrier(8)

    def work(i: int) -> bool:
        # Of PyTorch each thread has its own number.
        torch.set_num_threads(number)
        start.wait()
        return all(bits(compiled(inputs[i])) == expected[i] for _ in range(25))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_threads_that_ask_for_the_same_new_size_share_its_program(model: Network) -> None:
    compiled = groupconv.compile(model, images(1, 9, 9))
    start = threading.Barrier(4)

    def work(_: int) -> Program:
        start.wait()
        return compiled.program(images(1, 10, 9))

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(work, range(4)))) == 1
    assert len(compiled.programs) == 2


# Memory.


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells the memory")
def test_a_thousand_calls_leak_nothing(compiled: Compiled) -> None:
    x = images(2, 13, 17)
    strided = x.transpose(2, 3).contiguous().transpose(2, 3)

    def calls(count: int) -> tuple[int, int]:
        for _ in range(count):
            compiled(x)
            compiled(strided)
        gc.collect()
        return resident(), len(gc.get_objects())

    calls(100)
    memory, objects = calls(10)
    memory_after, objects_after = calls(1000)
    # What was read for the test itself is a handful of objects, and a page or two.
    assert objects_after - objects < 50
    assert memory_after - memory < 2**20


def test_arenas_are_not_written_past(compiled: Compiled, model: Network) -> None:
    margin, x = 64, images(2, 13, 17)
    program = compiled.program(x)
    size = program.memory.arena // 4
    whole = torch.full((size + 2 * margin,), torch.nan)
    for number in (1, 2):
        session = Session(
            program.graph, program.memory, program.steps, number, whole[margin : margin + size]
        )
        whole.fill_(torch.nan)
        found = session((x,))
        assert whole[:margin].isnan().all()
        assert whole[-margin:].isnan().all()
        for y, expected in zip(found, model(x).values(), strict=True):
            assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_sessions_are_used_again(compiled: Compiled) -> None:
    program = compiled.program(images(2, 13, 17))
    compiled(images(2, 13, 17))
    kept = list(program._free)
    for _ in range(5):
        compiled(images(2, 13, 17))
    assert list(program._free) == kept


# Copies.


def test_deep_copies_share_their_programs(model: Network, compiled: Compiled) -> None:
    twin = copy.deepcopy(compiled)
    check(twin, model, images(2, 13, 17))
    before = len(compiled.programs)
    check(twin, model, images(1, 6, 31))
    assert len(compiled.programs) == before
    whole = copy.deepcopy(nn.Sequential(compiled, nn.Identity()))
    check(whole, model, images(2, 13, 17))


def test_pickling_names_what_to_do_instead(compiled: Compiled) -> None:
    with pytest.raises(ArgumentError, match=r"save\(path\)"):
        pickle.dumps(compiled)


def test_a_compiled_network_has_no_parameters(compiled: Compiled) -> None:
    assert not list(compiled.parameters())
    assert not compiled.state_dict()
