"""The code cache: private or not used, checked or rebuilt, bounded, and shared by processes."""

import errno
import json
import os
import pwd
import re
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close

from groupconv.kernels import cache, dispatch, fingerprint, jit, tuning, weights
from groupconv.nn import functional


def forget() -> None:
    """Make this process ask the cache again."""
    dispatch._choices.clear()
    tuning._known.clear()
    weights._entries.clear()
    fingerprint.fingerprint.cache_clear()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of this test's own, not made yet."""
    path = tmp_path / "cache"
    monkeypatch.setenv("GROUPCONV_CACHE", str(path))
    monkeypatch.setenv("GROUPCONV_NATIVE", "1")
    forget()
    yield path
    forget()


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The object files that came into this process."""
    codes: list[bytes] = []
    load = jit.load

    def spy(code: bytes, *rest: Any) -> jit.Function:
        codes.append(code)
        return load(code, *rest)

    monkeypatch.setattr(jit, "load", spy)
    return codes


def convolve() -> None:
    """One call, as the first of a process, must be right."""
    forget()
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 3, 3, generator=random)
    weight = torch.randn(4, 1, 2, 2, generator=random)
    chosen: list[str] = []
    with dispatch.listening(lambda name, _: chosen.append(name)):
        actual = functional.group_conv2d(x, weight, groups=4)
    assert chosen == ["native"]
    assert_close(actual, F.conv2d(x, weight, groups=4), rtol=1e-5, atol=1e-5)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.kernel"))


def kernel_entry(folder: Path) -> Path:
    """The entry of the convolution, not of the fingerprint."""
    (entry,) = (path for path in entries(folder) if path.read_bytes()[32:33] == b"{")
    return entry


class TooLongError(Exception):
    """No OSError, or it would be taken for a missing file."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail, rather than wait for ever."""

    def stop(*_: object) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# The folder.


def test_folder_and_entries_are_private(folder: Path) -> None:
    before = os.umask(0)
    try:
        convolve()
    finally:
        os.umask(before)
    assert cache.why_not() is None
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in entries(folder)] == [0o600] * 2
    assert set(folder.iterdir()) == set(entries(folder))


def test_second_process_finds_everything(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convolve()

    def never(*_: object) -> bytes:
        raise AssertionError("compiled again")

    monkeypatch.setattr(jit, "compile_object", never)
    convolve()


def test_where_the_folder_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("GROUPCONV_CACHE", "")
    assert cache.folder() == tmp_path / ".cache" / "groupconv"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg" / "groupconv"
    assert cache.why_not() is None
    assert cache.folder().is_dir()
    monkeypatch.setenv("GROUPCONV_CACHE", str(tmp_path / "chosen"))
    assert cache.folder() == tmp_path / "chosen"


def _open(mode: int) -> Callable[[Path, pytest.MonkeyPatch], None]:
    def make(folder: Path, _: pytest.MonkeyPatch) -> None:
        folder.mkdir()
        folder.chmod(mode)

    return make


def _of_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(mode=0o700)
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)


def _symlink(folder: Path, _: pytest.MonkeyPatch) -> None:
    target = folder.with_name("target")
    target.mkdir(mode=0o700)
    folder.symlink_to(target)


def _dangling(folder: Path, _: pytest.MonkeyPatch) -> None:
    folder.symlink_to(folder.with_name("gone"))


def _file(folder: Path, _: pytest.MonkeyPatch) -> None:
    folder.write_text("")


def _below_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_text("")
    monkeypatch.setenv("GROUPCONV_CACHE", str(folder / "cache"))


def _unwritable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(mode=0o500)
    if os.getuid() == 0:
        # Nothing stops root.
        monkeypatch.setattr(os, "access", lambda *_: False)


def _read_only_disk(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)


def _no_home(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user is a bare number."""

    def nobody(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("GROUPCONV_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)


def _no_folder_at_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _no_home(folder, monkeypatch)
    monkeypatch.setenv("HOME", "/proc")


UNUSABLE = [
    (_open(0o755), "open to other users; expected mode 0700"),
    (_open(0o770), "open to other users"),
    (_open(0o701), "open to other users"),
    (_of_another, "belongs to another user"),
    (_symlink, "is not a folder"),
    (_dangling, "can't be made"),
    (_file, "can't be made"),
    (_below_a_file, "can't be made"),
    (_unwritable, "can't be written to"),
    (_read_only_disk, "can't be made: .*Read-only"),
    (_no_home, "can't be made: .*home"),
    pytest.param(
        _no_folder_at_home,
        "can't be made",
        marks=pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux"),
    ),
]


@pytest.mark.parametrize(
    ("make", "reason"), UNUSABLE, ids=lambda v: getattr(v, "__name__", str(v)).strip("_")
)
def test_no_cache_but_right_results(
    make: Callable[[Path, pytest.MonkeyPatch], None],
    reason: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make(folder, monkeypatch)
    before = sorted(tmp_path.rglob("*"))
    why = cache.why_not()
    assert why is not None
    assert re.search(reason, why)
    convolve()
    cache.write("key", b"content")
    assert cache.read("key") is None
    assert sorted(tmp_path.rglob("*")) == before


def test_entries_of_an_open_folder_are_not_read(folder: Path, loaded: list[bytes]) -> None:
    """Another user may have put code there while it was open."""
    convolve()
    entry = kernel_entry(folder)
    folder.chmod(0o777)
    assert cache.read(entry.stem) is None
    loaded.clear()
    entry.write_bytes(b"planted")
    convolve()
    assert b"planted" not in loaded
    assert entry.read_bytes() == b"planted"


def test_usage_and_clear_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _no_home(tmp_path, monkeypatch)
    assert cache.usage() == cache.clear() == cache.Usage(0, 0)


# Broken entries.


def _flip(position: int) -> Callable[[Path], None]:
    def change(entry: Path) -> None:
        data = bytearray(entry.read_bytes())
        data[position] ^= 1
        entry.write_bytes(data)

    return change


def _cut(length: int) -> Callable[[Path], None]:
    return lambda entry: entry.write_bytes(entry.read_bytes()[:length])


def _longer(entry: Path) -> None:
    entry.write_bytes(entry.read_bytes() + b"\0")


def _garbage(entry: Path) -> None:
    entry.write_bytes(os.urandom(entry.stat().st_size))


def _renamed(entry: Path) -> None:
    """The fingerprint's code under the name of the kernel's."""
    (other,) = set(entries(entry.parent)) - {entry}
    entry.write_bytes(other.read_bytes())


def _lying_head(entry: Path) -> None:
    data = entry.read_bytes()
    head, _, code = data[32:].partition(b"\n")
    tile = json.loads(head)
    tile["pixels"] += 1
    entry.write_bytes(data[:32] + json.dumps(tile).encode() + b"\n" + code)


def _link_to_garbage(entry: Path) -> None:
    other = entry.with_name("other")
    other.write_bytes(os.urandom(100))
    entry.unlink()
    entry.symlink_to(other)


def _link_to_itself(entry: Path) -> None:
    """Even the right bytes are not read through a link."""
    entry.rename(entry.with_name("other"))
    entry.symlink_to("other")


def _link_to_nothing(entry: Path) -> None:
    entry.unlink()
    entry.symlink_to("gone")


BROKEN = [
    *(_flip(position) for position in (0, 31, 32, 600, -1)),
    *(_cut(length) for length in (0, 31, 32, 33, -1)),
    _longer,
    _garbage,
    _renamed,
    _lying_head,
    _link_to_garbage,
    _link_to_itself,
    _link_to_nothing,
]


@pytest.mark.parametrize("damage", BROKEN, ids=lambda f: f.__qualname__.partition(".")[0][1:])
def test_broken_entry_is_rebuilt_and_never_loaded(
    damage: Callable[[Path], None], folder: Path, loaded: list[bytes]
) -> None:
    convolve()
    entry = kernel_entry(folder)
    sound, codes = entry.read_bytes(), set(loaded)
    damage(entry)
    assert cache.read(entry.stem) is None
    convolve()
    assert set(loaded) == codes
    assert entry.read_bytes() == sound
    assert not entry.is_symlink()


def test_every_kind_of_entry_is_rebuilt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fingerprint, kernel and measured choice."""
    monkeypatch.setenv("GROUPCONV_TUNE", "1")
    monkeypatch.delenv("GROUPCONV_NATIVE")
    x, weight = torch.randn(1, 8, 9, 9), torch.randn(8, 4, 3, 3)
    expected = F.conv2d(x, weight, groups=2)
    for _ in range(2):
        forget()
        assert_close(functional.group_conv2d(x, weight, groups=2), expected, rtol=1e-5, atol=1e-5)
        found = entries(folder)
        assert len(found) == 3
        assert None not in [cache.read(entry.stem) for entry in found]
        for entry in found:
            entry.write_bytes(entry.read_bytes()[:-1])


def test_folder_in_place_of_an_entry(folder: Path) -> None:
    convolve()
    entry = kernel_entry(folder)
    entry.unlink()
    entry.mkdir()
    assert cache.read(entry.stem) is None
    with pytest.warns(UserWarning, match="can't be written to"):
        convolve()
    assert not list(folder.glob("*.part"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            Path.mkdir,
        ),
        os.mkfifo,
        Path.touch,
    ],
)
def test_no_file_stays_open(make: Callable[[Path], object], folder: Path) -> None:
    folder.mkdir(mode=0o700)
    make(folder / "key.kernel")
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        assert cache.read("key") is None
    assert os.listdir("/proc/self/fd") == before


def test_fifo_in_place_of_an_entry(folder: Path) -> None:
    convolve()
    entry = kernel_entry(folder)
    entry.unlink()
    os.mkfifo(entry)
    with within(1):
        convolve()


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_unreadable_entry_is_rebuilt(folder: Path) -> None:
    convolve()
    entry = kernel_entry(folder)
    entry.chmod(0)
    convolve()
    assert cache.read(entry.stem) is not None


def run(text: str, **environment: str) -> str:
    """Standard output of a Python program."""
    done = subprocess.run(
        [sys.executable, "-c", text],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Writing.


def test_write_then_read(folder: Path) -> None:
    for content in (b"", b"\0", b"text\n" * 1000, os.urandom(100_000)):
        cache.write("key", content)
        assert cache.read("key") == content
    assert cache.read("other") is None
    assert len(list(folder.iterdir())) == 1


def test_readers_see_whole_entries_only(folder: Path) -> None:
    contents = [bytes([i]) * 300_000 for i in range(4)]
    cache.write("key", contents[0])
    going = True

    def keep_writing() -> None:
        while going:
            for content in contents:
                cache.write("key", content)

    writers = [threading.Thread(target=keep_writing) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        seen = [cache.read("key") for _ in range(200)]
    finally:
        going = False
        for writer in writers:
            writer.join()
    assert set(seen) <= set(contents)
    assert len(list(folder.iterdir())) == 1


MANY_PROCESSES = """
import os, signal, sys, traceback
import torch
import torch.nn.functional as F
from groupconv.kernels import cache
from groupconv.nn import functional
torch.set_num_threads(1)
cases = [(8, 2, 9, 1), (16, 16, 11, 1), (6, 3, 10, 2), (8, 2, 9, 1)]

def work(i):
    start.read(1)
    for channels, groups, size, stride in cases[i % 2 :] + cases[: i % 2]:
        x, weight = torch.randn(2, channels, size, size), torch.randn(channels, 1, 3, 3)
        weight = weight.expand(-1, channels // groups, -1, -1).contiguous()
        actual = functional.group_conv2d(x, weight, None, stride, 1, 1, groups)
        expected = F.conv2d(x, weight, None, stride, 1, 1, groups)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

read, write = os.pipe()
start = open(read, "rb", buffering=0)
pids = []
for i in range(4):
    pids.append(os.fork())
    if pids[-1] == 0:
        signal.alarm(100)
        try:
            work(i)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
os.write(write, b"go!!")
assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
assert cache.why_not() is None
# Kernels of three convolutions, and the fingerprint.
print(cache.usage().entries)
"""


def test_several_processes_on_one_empty_folder(folder: Path) -> None:
    assert run(MANY_PROCESSES, GROUPCONV_TUNE="0", GROUPCONV_NATIVE="1") == "4\n"
    assert not list(folder.glob("*.part"))
    assert None not in [cache.read(entry.stem) for entry in entries(folder)]


def _age(folder: Path, key: str, seconds: float) -> None:
    when = time.time() - seconds
    os.utime(folder / f"{key}.kernel", (when, when))


def test_least_recently_used_go_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LIMIT", 3500)
    for age, key in enumerate("cba"):
        cache.write(key, bytes(968))
        _age(folder, key, 100 * (age + 1))
    assert cache.usage() == cache.Usage(3, 3000)
    # a was written first, but is used now.
    assert cache.read("a") is not None
    cache.write("d", bytes(968))
    assert [cache.read(key) is not None for key in "abcd"] == [True, False, True, True]
    cache.write("e", bytes(1968))
    assert [cache.read(key) is not None for key in "acde"] == [False, False, True, True]
    cache.write("f", bytes(4000))
    assert cache.usage().bytes <= 3500


def test_size_is_bounded_while_convolving(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def depthwise(size: int) -> None:
        x, weight = torch.randn(1, 4, size, size), torch.randn(4, 1, 3, 3)
        actual = functional.group_conv2d(x, weight, groups=4)
        assert_close(actual, F.conv2d(x, weight, groups=4), rtol=1e-5, atol=1e-5)

    depthwise(9)
    monkeypatch.setattr(cache, "LIMIT", cache.usage().bytes)
    for size in (8, 7, 6):
        depthwise(size)
        assert 0 < cache.usage().bytes <= cache.LIMIT
    monkeypatch.setattr(cache, "LIMIT", 0)
    convolve()
    assert cache.usage() == cache.Usage(0, 0)


def _full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _no_renaming(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", _full)


def _no_new_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "mkstemp", _full)


def _no_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails at the first byte; that of a read too, which is a missing entry."""

    def half_open(handle: int, mode: str) -> Any:
        file = open(handle, mode)  # noqa: SIM115
        return file if mode == "rb" else _Full(file)

    monkeypatch.setattr(cache, "open", half_open, raising=False)


class _Full:
    """A file on a full disk."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> "_Full":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    write = _full


@pytest.mark.parametrize("fill", [_no_renaming, _no_new_files, _no_writing])
def test_full_disk_is_a_warning(
    fill: Callable[[pytest.MonkeyPatch], None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write("key", b"content")
    with monkeypatch.context() as patch:
        fill(patch)
        with pytest.warns(UserWarning, match="can't be written to: .*No space left"):
            convolve()
        with pytest.warns(UserWarning, match="can't be written to"):
            cache.write("key", b"other")
    assert [path.name for path in folder.iterdir()] == ["key.kernel"]
    assert cache.read("key") == b"content"
    convolve()
    assert cache.usage().entries == 3


def test_file_that_may_not_grow_is_a_warning(folder: Path) -> None:
    def write(key: str, content: bytes) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            cache.write(key, content)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    cache.write("key", b"content")
    for key, size in (("key", 10_000), ("other", 1_000_000)):
        with pytest.warns(UserWarning, match="can't be written to"):
            write(key, bytes(size))
    assert [path.name for path in folder.iterdir()] == ["key.kernel"]
    assert cache.read("key") == b"content"


def test_a_writer_that_is_stopped_leaves_the_entry(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    cache.write("key", b"content")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            cache.write("key", b"other")
    assert cache.read("key") == b"content"


@pytest.mark.parametrize("remove", [lambda: cache.write("key", b""), cache.clear])
def test_leftovers_of_killed_writers_go(remove: Callable[[], object], folder: Path) -> None:
    """Those of writers at work stay."""
    cache.write("key", b"")
    for i in range(3):
        left = folder / f"tmp{i}.part"
        left.write_bytes(bytes(1000))
        os.utime(left, (0, 0))
    (folder / "new.part").write_bytes(b"")
    remove()
    assert [path.name for path in folder.glob("*.part")] == ["new.part"]


# Usage and removal.


def test_usage_and_clear(folder: Path) -> None:
    assert cache.usage() == cache.clear() == cache.Usage(0, 0)
    cache.write("a", bytes(100))
    cache.write("b", bytes(200))
    (folder / "note.txt").write_text("not an entry")
    assert cache.usage() == cache.Usage(2, 300 + 2 * 32)
    assert cache.clear() == cache.Usage(2, 364)
    assert cache.usage() == cache.clear() == cache.Usage(0, 0)
    assert [path.name for path in folder.iterdir()] == ["note.txt"]
    assert cache.read("a") is None
    convolve()
    assert cache.usage().entries == 2


def test_kernels_in_use_outlive_the_cache(folder: Path) -> None:
    x, weight = torch.randn(1, 4, 8, 8), torch.randn(4, 1, 3, 3)
    expected = F.conv2d(x, weight, groups=4)
    for _ in range(2):
        actual = functional.group_conv2d(x, weight, groups=4)
        assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        cache.clear()
        folder.rmdir() if folder.exists() else None


def test_entries_that_another_process_removes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write("a", b"")
    listed = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, p: [self / f"gone{p[1:]}", *listed(self, p)])
    assert cache.usage() == cache.Usage(1, 32)
    monkeypatch.setattr(cache, "LIMIT", 0)
    cache.write("b", b"")
    assert cache.clear() == cache.usage() == cache.Usage(0, 0)


@pytest.mark.parametrize("remove", ["clear", "limit"])
def test_removal_passes_by_a_folder(
    remove: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write("a", b"")
    (folder / "b.kernel").mkdir()
    _age(folder, "b", 100)
    monkeypatch.setattr(cache, "LIMIT", 100)
    cache.clear() if remove == "clear" else cache.write("c", bytes(200))
    assert cache.read("a") is None


# Names.


def test_keys_tell_everything_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [cache.key(), cache.key(1), cache.key("1"), cache.key(1.0), cache.key(1, 2),
            cache.key((1, 2)), cache.key("1", "2"), cache.key("1\n2"), cache.key(True)]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert keys == [cache.key(), *keys[1:]]
    monkeypatch.setattr(cache, "_generator", lambda: "another version")
    assert cache.key(1) != keys[1]


def test_key_names_version_llvm_and_source(monkeypatch: pytest.MonkeyPatch) -> None:
    cache._generator.cache_clear()
    seen = {cache._generator()}
    for target, name, value in (
        (cache, "__version__", "0"),
        (cache.llvmlite, "__version__", "0"),
        (Path, "read_bytes", lambda _: b"other source"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            cache._generator.cache_clear()
            seen.add(cache._generator())
    cache._generator.cache_clear()
    assert len(seen) == 4
