"""Compiled networks in files: what comes back, what it costs, and what is refused."""

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch
from compiler.build import kinds
from compiler.evaluate import evaluate
from compiler.random_graphs import graphs
from compiler.test_compiled import Network, bits, images
from hypothesis import given, settings
from torch import Tensor, nn

import groupconv
from groupconv.compiler import records
from groupconv.compiler.compiled import Compiled
from groupconv.compiler.graph import Graph, Operator
from groupconv.compiler.passes import optimize
from groupconv.errors import ArgumentError, DataError
from groupconv.kernels import jit, kernel, tuning

X = images(2, 13, 17)


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return groupconv.compile(Network(), X)


@pytest.fixture(scope="module")
def file(compiled: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "network.gcn"
    compiled.save(path)
    return path


def rewritten(file: Path, target: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """A copy of a file with other members."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return target


def head(**values: Any) -> Callable[[dict[str, bytes]], None]:
    """A change of entries of ``program.json``."""

    def change(members: dict[str, bytes]) -> None:
        content = json.loads(members["program.json"])
        members["program.json"] = json.dumps(content | values).encode()

    return change


# What comes back.


def test_the_same_bits(compiled: Compiled, file: Path) -> None:
    loaded = groupconv.load_compiled(file)
    for seed in range(2):
        x = images(2, 13, 17, seed=seed)
        assert bits(loaded(x)) == bits(compiled(x))


def test_all_programs(tmp_path: Path) -> None:
    compiled = groupconv.compile(Network(), images(1, 9, 9))
    sizes = [images(1, 9, 9), images(3, 9, 9), images(2, 7, 12)]
    sizes.append(images(1, 9, 9).contiguous(memory_format=torch.channels_last))
    expected = [bits(compiled(x)) for x in sizes]
    compiled.save(tmp_path / "network")
    loaded = groupconv.load_compiled(tmp_path / "network")
    assert [bits(loaded(x)) for x in sizes] == expected
    assert len(loaded.programs) == 4
    # All of them together have the weights once.
    once = groupconv.compile(Network(), images(1, 9, 9))
    once.save(tmp_path / "one")
    ratio = members(tmp_path / "network") / members(tmp_path / "one")
    assert ratio == 1


def members(file: Path) -> int:
    """Bytes of the weights."""
    with zipfile.ZipFile(file) as archive:
        return archive.getinfo("weights.safetensors").file_size


def test_saved_again(file: Path, tmp_path: Path) -> None:
    groupconv.load_compiled(file).save(tmp_path / "again")
    with zipfile.ZipFile(file) as first, zipfile.ZipFile(tmp_path / "again") as second:
        assert first.namelist() == second.namelist()
        for name in first.namelist():
            assert first.read(name) == second.read(name)


def test_sizes_that_it_has_no_program_for(file: Path) -> None:
    loaded = groupconv.load_compiled(file)
    with pytest.raises(ArgumentError, match=r"\[\[1, 3, 9, 9\]\].*\[\[2, 3, 13, 17\]\]"):
        loaded(images(1, 9, 9))


class Zoo(nn.Module):
    """Arguments of PyTorch's operators of every kind that a file can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.register_buffer("index", torch.tensor([2, 0, 1]))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("rough", torch.randn(6, 1, 1).half())
        wide = torch.randn(12, 3, 1, 1)
        self.first, self.second = nn.Parameter(wide[:6]), nn.Parameter(wide[6:])
        self.eval()

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        a = torch.nn.functional.conv2d(x, self.first) + torch.nn.functional.conv2d(x, self.second)
        b = torch.index_select(x, 1, self.index) * self.mask[:, None, None]
        top, where = torch.topk(y.flatten(1), 3, dim=1)
        c = y.to(torch.float64).cumsum(-1, dtype=torch.float32).clamp(min=-float("inf"))
        d = torch.linalg.vector_norm(a, ord=float("inf"), dim=(2, 3))
        return [a, (b, {"top": top, "where": where}), c, y * self.rough, d]


def test_every_kind_of_argument(tmp_path: Path) -> None:
    x = images(2, 8, 9)
    compiled = groupconv.compile(Zoo(), x)
    compiled.save(tmp_path / "network")
    loaded = groupconv.load_compiled(tmp_path / "network")
    expected, found = compiled(x), loaded(x)
    flat, structure = torch.utils._pytree.tree_flatten(found)
    flat_expected, expected_structure = torch.utils._pytree.tree_flatten(expected)
    assert structure == expected_structure
    for y, z in zip(flat, flat_expected, strict=True):
        assert y.dtype == z.dtype
        assert torch.equal(y, z)


def test_every_operator_can_be_written() -> None:
    assert {operator.__name__ for operator in get_args(Operator)} <= records._RECORDS.keys()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(graphs())
def test_random_graphs(graph: Graph) -> None:
    for one in (graph, optimize(graph)):
        tensors: dict[str, Tensor] = {}
        text = json.dumps(records.encode(one, tensors))
        again = records.decode(json.loads(text), tensors)
        random = torch.Generator().manual_seed(0)
        inputs = [torch.randn(v.shape, generator=random) for v in one.inputs]
        found = evaluate(again, [x.clone() for x in inputs])
        for y, z in zip(found, evaluate(one, inputs), strict=True):
            assert torch.equal(y, z)
        assert [node.name for node in again.nodes] == [node.name for node in one.nodes]
        assert kinds(again) == kinds(one)


# What it costs.


def forbid(monkeypatch: pytest.MonkeyPatch, *places: tuple[Any, str]) -> None:
    for module, name in places:

        def refuse(*_: Any, name: str = name, **__: Any) -> None:
            raise AssertionError(f"{name} was called")

        monkeypatch.setattr(module, name, refuse)


def test_loading_tunes_and_compiles_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch, (jit, "compile_object"), (kernel, "compile"), (tuning, "tuned"))
    groupconv.load_compiled(file)(X)


_FRESH = """
import sys, torch
import groupconv
from groupconv.kernels import jit
def refuse(*_):
    raise AssertionError("compiled")
jit.compile_object = refuse
loaded = groupconv.load_compiled(sys.argv[1])
torch.save(loaded(torch.load(sys.argv[2])), sys.argv[3])
"""


def test_a_fresh_process_with_an_empty_cache_compiles_nothing(
    compiled: Compiled, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GROUPCONV_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("GROUPCONV_TUNE", "1")
    torch.save(X, tmp_path / "x")
    paths = [str(path) for path in (file, tmp_path / "x", tmp_path / "y")]
    subprocess.run([sys.executable, "-c", _FRESH, *paths], check=True, timeout=100)
    assert bits(torch.load(tmp_path / "y")) == bits(compiled(X))


@pytest.mark.parametrize("name", ["another machine", "another version"])
def test_elsewhere_the_code_is_made_anew(
    name: str, compiled: Compiled, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    tuned = tuning.tuned

    def count(*args: Any, **options: Any) -> Any:
        made.append(str(args[0]))
        return tuned(*args, **options)

    def spoil(members: dict[str, bytes]) -> None:
        """Code that would not run here, and must not be loaded."""
        head(made=name)(members)
        content = json.loads(members["program.json"])
        for number, code in enumerate(content["codes"]):
            members[f"code/{number}.o"] = b"code of " + name.encode()
            content["codes"][code] = hashlib.sha256(members[f"code/{number}.o"]).hexdigest()
        members["program.json"] = json.dumps(content).encode()

    monkeypatch.setattr(tuning, "tuned", count)
    loaded = groupconv.load_compiled(rewritten(file, tmp_path / "elsewhere", spoil))
    assert bits(loaded(X)) == bits(compiled(X))
    assert len(made) == len(compiled.library.kernels)


# What is refused.


def damaged(file: Path, tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "damaged"
    path.write_bytes(content)
    return path


def test_truncated(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    for part in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        with pytest.raises(DataError, match=r"path='.*damaged' can't be read"):
            groupconv.load_compiled(damaged(file, tmp_path, whole[:part]))


def test_flipped_bits(compiled: Compiled, file: Path, tmp_path: Path) -> None:
    """Are found, or lie where nothing counts, such as in the date of a member."""
    whole, refused = file.read_bytes(), 0
    for place in range(7, len(whole), len(whole) // 60):
        content = bytearray(whole)
        content[place] ^= 0x10
        try:
            loaded = groupconv.load_compiled(damaged(file, tmp_path, bytes(content)))
        except DataError:
            refused += 1
        else:
            assert bits(loaded(X)) == bits(compiled(X))
    assert refused > 50


def without(name: str) -> Callable[[dict[str, bytes]], None]:
    return lambda members: members.__delitem__(name) if name in members else None


def replaced(name: str, content: bytes) -> Callable[[dict[str, bytes]], None]:
    return lambda members: members.__setitem__(name, content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (head(format=1), "has format 1, not 3"),
        (head(format="next"), "has format next, not 3"),
        (without("program.json"), "program.json"),
        (without("weights.safetensors"), "weights.safetensors"),
        (without("code/0.o"), "code/0.o"),
        (replaced("code/0.o", b"other"), "is damaged"),
        (replaced("program.json", b"{"), "can't be read"),
        (replaced("program.json", b"[]"), "can't be read"),
        (replaced("program.json", b"{}"), "format"),
        (replaced("weights.safetensors", b"nothing"), "can't be read"),
        (head(programs=[{"graph": {}, "structure": ""}]), "can't be read"),
        (head(programs=3), "can't be read"),
        (head(tiles={"kernel": {"rows": 3}}), "can't be read"),
    ],
)
def test_files_that_are_not_ours(
    change: Callable[[dict[str, bytes]], None], message: str, file: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="load_compiled: path=") as caught:
        groupconv.load_compiled(rewritten(file, tmp_path / "other", change))
    assert message in str(caught.value)


def test_records_of_another_version(file: Path, tmp_path: Path) -> None:
    def rename(old: bytes, new: bytes) -> Callable[[dict[str, bytes]], None]:
        def change(members: dict[str, bytes]) -> None:
            assert old in members["program.json"]
            members["program.json"] = members["program.json"].replace(old, new)

        return change

    for old, new in (
        (b'"record": "Convolution"', b'"record": "Whirl"'),
        (b"aten::cumsum", b"aten::no_such_operator"),
        (b'"activation"', b'"actuation"'),
    ):
        with pytest.raises(DataError, match="load_compiled"):
            groupconv.load_compiled(rewritten(file, tmp_path / "other", rename(old, new)))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't be read"):
        groupconv.load_compiled(tmp_path / "missing")
    with pytest.raises(DataError, match="can't be read"):
        groupconv.load_compiled(tmp_path)


def test_a_state_dict_is_not_a_compiled_network(tmp_path: Path) -> None:
    torch.save(Network().state_dict(), tmp_path / "weights.pth")
    with pytest.raises(DataError, match="can't be read"):
        groupconv.load_compiled(tmp_path / "weights.pth")


def test_a_folder_that_is_not_there(compiled: Compiled, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't be written"):
        compiled.save(tmp_path / "missing" / "network")


def test_an_interrupted_write_leaves_the_old_file(
    compiled: Compiled, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "network"
    shutil.copy(file, path)
    before = path.read_bytes()
    write = zipfile.ZipFile.writestr

    def interrupted(archive: zipfile.ZipFile, name: str, data: Any) -> None:
        if name.startswith("code"):
            raise KeyboardInterrupt
        write(archive, name, data)

    monkeypatch.setattr(zipfile.ZipFile, "writestr", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compiled.save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["network"]
    compiled.save(path)
    assert bits(groupconv.load_compiled(path)(X)) == bits(compiled(X))


class Pair(NamedTuple):
    """Of a kind that only its own module knows."""

    first: Tensor
    second: Tensor


class Named(nn.Module):
    def forward(self, x: Tensor) -> Pair:
        return Pair(x + 1, x * 2)


class Drawing(nn.Module):
    """An operator that takes a generator of random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        return torch.bernoulli(x.sigmoid(), generator=self.generator)


@pytest.mark.parametrize("model", [Named(), Drawing()])
def test_what_can_not_be_written(model: nn.Module, tmp_path: Path) -> None:
    compiled = groupconv.compile(model.eval(), X)
    with pytest.raises(DataError, match=r"save: .*can't be written"):
        compiled.save(tmp_path / "network")
    assert not list(tmp_path.iterdir())


def test_an_unknown_processor(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("groupconv.compiler.compiled.runnable", lambda: ())
    with pytest.raises(ArgumentError, match="no code can be generated"):
        groupconv.load_compiled(file)
    with pytest.raises(ArgumentError, match="no code can be generated"):
        groupconv.compile(Network(), X)
