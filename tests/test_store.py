"""Finished parts of a run: found again by the same run only, whole or not at all."""

import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import assert_close

from groupconv.store import Store, fingerprint

VALUES = {"losses": [0.25, 1e-300, 3], "start": "energy", "partition": None}
TENSORS = {
    "weight": torch.arange(6.0).reshape(2, 3).T,
    "loss": torch.tensor(0.5, dtype=torch.float64),
}


def files(folder: Path) -> list[Path]:
    return sorted((folder / ".unfinished").iterdir())


def test_what_was_written_is_read(tmp_path: Path) -> None:
    Store(tmp_path, "run").write("menu", VALUES)
    Store(tmp_path, "run").write_tensors("refit", TENSORS)
    again = Store(tmp_path, "run")
    assert again.read("menu") == VALUES
    found = again.read_tensors("refit")
    assert found is not None
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert_close(found[name], tensor, rtol=0, atol=0)


def test_other_inputs_and_names_are_not_found(tmp_path: Path) -> None:
    store = Store(tmp_path, "run")
    store.write("menu", VALUES)
    store.write_tensors("refit", TENSORS)
    for other, name in ((Store(tmp_path, "another"), "menu"), (store, "menu of conv1")):
        assert other.read(name) is None
    assert Store(tmp_path, "another").read_tensors("refit") is None
    # The two kinds do not meet.
    assert store.read("refit") is None
    assert store.read_tensors("menu") is None


def test_a_later_result_takes_the_place_of_the_earlier(tmp_path: Path) -> None:
    store = Store(tmp_path, "run")
    store.write("menu", [1])
    store.write("menu", [2])
    assert store.read("menu") == [2]
    assert len(files(tmp_path)) == 1


def test_no_folder_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store(None, "run")
    store.write("menu", VALUES)
    store.write_tensors("refit", TENSORS)
    assert store.read("menu") is None
    assert store.read_tensors("refit") is None
    store.clear()
    assert not list(tmp_path.iterdir())


def test_clear_forgets_all_and_only_that(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    store = Store(tmp_path, "run")
    store.clear()
    store.write("menu", VALUES)
    Store(tmp_path, "another").write("menu", VALUES)
    store.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert store.read("menu") is None
    store.write("menu", VALUES)
    assert store.read("menu") == VALUES


@pytest.mark.parametrize(("kind", "earlier"), [("write", [1]), ("write_tensors", None)])
def test_a_run_killed_while_it_writes_leaves_no_part(
    kind: str, earlier: list[int] | None, tmp_path: Path
) -> None:
    store = Store(tmp_path, "run")
    if earlier is not None:
        store.write("result", earlier)
        store.write_tensors("result", {"x": torch.tensor(earlier)})
    code = f"""
import os, signal, torch
from pathlib import Path
from groupconv.store import Store

def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)

# The last step before the new file takes its place: its contents are on the disk.
os.fsync = killed
value = {{"x": torch.ones(1000)}} if {kind!r} == "write_tensors" else list(range(1000))
getattr(Store(Path({str(tmp_path)!r}), "run"), {kind!r})("result", value)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert any(path.name.startswith(".") for path in files(tmp_path)), "killed too early"
    assert store.read("result") == earlier
    tensors = store.read_tensors("result")
    assert (None if tensors is None else tensors["x"].tolist()) == earlier
    store.clear()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["write", "write_tensors"])
def test_a_full_disk_is_one_error_and_loses_nothing(kind: str, tmp_path: Path) -> None:
    """As far as a limit on the size of files stands for it: a write ends half-way."""
    store = Store(tmp_path, "run")
    store.write("result", [1])
    store.write_tensors("result", {"x": torch.ones(1)})
    before = {path: path.read_bytes() for path in files(tmp_path)}
    code = f"""
import resource, signal, torch
from pathlib import Path
from groupconv.errors import DataError
from groupconv.store import Store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
value = {{"x": torch.ones(100_000)}} if {kind!r} == "write_tensors" else list(range(100_000))
try:
    getattr(Store(Path({str(tmp_path)!r}), "run"), {kind!r})("result", value)
except DataError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "can't be written: " in done.stdout
    assert {path: path.read_bytes() for path in files(tmp_path)} == before


@pytest.mark.parametrize("damage", ["half", "empty", "zeros", "noise"])
def test_a_damaged_file_is_computed_again(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path, "run")
    store.write("menu", VALUES)
    store.write_tensors("refit", TENSORS)
    for path in files(tmp_path):
        content = path.read_bytes()
        path.write_bytes(
            {
                "half": content[: len(content) // 2],
                "empty": b"",
                "zeros": bytes(len(content)),
                "noise": bytes(255 - byte for byte in content),
            }[damage]
        )
    with caplog.at_level(logging.WARNING):
        assert store.read("menu") is None
        assert store.read_tensors("refit") is None
    assert len(caplog.records) == 2
    for name, path in (("menu", "json"), ("refit", "safetensors")):
        (message,) = (m for m in caplog.messages if f"{name} is computed again" in m)
        assert any(str(p) in message for p in files(tmp_path) if p.suffix == f".{path}")
    store.write("menu", VALUES)
    store.write_tensors("refit", TENSORS)
    assert store.read("menu") == VALUES
    assert store.read_tensors("refit") is not None


def test_fingerprints_differ_where_anything_does() -> None:
    x = torch.arange(6.0)
    tensors = [
        [("a", x)],
        [("b", x)],
        [("a", x.reshape(2, 3))],
        [("a", x.double())],
        [("a", x.view(torch.int32))],
        [("a", x + torch.tensor([0, 0, 0, 0, 0, 1e-6]))],
        [("a", x), ("b", x)],
        [("a", x[::2]), ("b", x[1::2])],
    ]
    texts = [fingerprint(some, 0) for some in tensors] + [fingerprint(tensors[0], 1)]
    assert len(set(texts)) == len(texts)
    # Strides are no input.
    assert fingerprint([("a", x.reshape(2, 3).T.contiguous().T)], 0) == texts[2]
    assert fingerprint([("a", torch.tensor(3))]) != fingerprint([("a", torch.tensor(4))])
    assert fingerprint([("a", torch.ones(0))]) != fingerprint([("b", torch.ones(0))])
    assert fingerprint([("a", x.bfloat16())]) == fingerprint([("a", x.bfloat16().clone())])
