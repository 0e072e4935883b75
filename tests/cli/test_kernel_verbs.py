"""The verbs about kernels: explain, cache and doctor."""

import json
import pwd
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Run, one_object

from groupconv.cli import doctor
from groupconv.kernels import cache, dispatch, fingerprint, openmp, tuning
from groupconv.kernels.native import Native

NETWORK = """
import torch
from torch import nn
from groupconv import nn as our_nn
def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), our_nn.GroupConv2d(8, 8, 3, groups=2))
def norm():
    return nn.Sequential(our_nn.GroupConv2d(3, 3, 1, groups=3), nn.BatchNorm2d(3))
def linear():
    return nn.Linear(12, 2)
def nothing():
    return 3
def wrong():
    return our_nn.GroupConv2d(4, 6, 3, groups=4)
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a network, and a cache of its own that is not made yet."""
    (tmp_path / "net.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GROUPCONV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GROUPCONV_NATIVE", "1")
    dispatch._choices.clear()
    tuning._known.clear()
    fingerprint.fingerprint.cache_clear()
    return tmp_path


@pytest.fixture
def run(command: Run, work: Path) -> Run:
    return command


# explain.


def test_explain_for_people(run: Run) -> None:
    status, out, err = run("explain", "net.py:build", "--shape", "1,3,9,9")
    assert (status, out) == (0, "")
    assert err == (
        "0: Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))\n"
        "  runs on aten\n"
        "  not on native: the layer is a Conv2d of torch; groupconv.nn has layers that use it\n"
        "2: GroupConv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), groups=2)\n"
        "  runs on native\n"
        "  not on native in float32: the input is torch.float32, this takes torch.bfloat16 or "
        "torch.float16\n"
        "  not on aten: native comes first\n"
    )


def test_explain_as_json(run: Run) -> None:
    status, out, err = run("explain", "net.py:build", "--shape", "1x3x9x9", "--json")
    assert (status, err) == (0, "")
    calls = one_object(out)["calls"]
    assert [(call["layer"], call["chosen"]) for call in calls] == [("0", "aten"), ("2", "native")]
    assert set(calls[1]["refused"]) == {"native in float32", "aten"}


def test_explain_settings(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUPCONV_NATIVE", "0")
    _, out, _ = run("explain", "net.py:build", "--shape", "1,3,9,9", "--json")
    call = one_object(out)["calls"][1]
    assert (call["chosen"], call["refused"]["native"]) == ("aten", "GROUPCONV_NATIVE=0")


def test_explain_runs_in_evaluation(run: Run) -> None:
    """One pixel is too little for a batch norm in training."""
    status, out, _ = run("explain", "net.py:norm", "--shape", "1,3,1,1", "--json")
    assert status == 0
    assert len(one_object(out)["calls"]) == 1


def test_explain_without_convolutions(run: Run) -> None:
    assert run("explain", "net.py:linear", "--shape", "1,12") == (
        0, "", "no convolution was called\n",
    )  # fmt: skip
    _, out, _ = run("explain", "net.py:linear", "--shape", "1,12", "--json")
    assert one_object(out) == {"calls": []}


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["net.py:gone"], 2, "no function 'gone'"),
        (["gone.py:build"], 2, "there is no file"),
        (["net.py:nothing"], 2, "not a module"),
        (["net.py"], 2, "model='net.py'"),
        (["net.py:build", "--shape", "1,three"], 2, "shape='1,three'"),
        (["net.py:build", "--shape", "0,3,9,9"], 2, "shape='0,3,9,9'"),
        (["net.py:wrong"], 2, "out_channels=6 not divisible by groups=4"),
        (["net.py:build", "--weights", "gone.pth"], 1, "weights='gone.pth'"),
        (["net.py:build", "--no-such-option"], 2, "no-such-option"),
        ([], 2, "Missing argument"),
    ],
)
@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_explain_errors(
    json_flag: list[str], arguments: list[str], status: int, message: str, run: Run
) -> None:
    found, out, err = run("explain", *arguments, *json_flag)
    assert (found, out) == (status, "")
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_explain_with_a_shape_that_does_not_fit(run: Run) -> None:
    status, out, err = run("explain", "net.py:build", "--shape", "1,5,9,9")
    assert (status, out) == (2, "")
    assert "channels" in err


# cache.


def test_cache_shows_and_clears(run: Run, work: Path) -> None:
    folder = work / "cache"
    status, out, err = run("cache")
    assert (status, out) == (0, "")
    assert "0 entries, 0.0 MiB" in " ".join(err.split())
    assert "limit: 128 MiB" in err
    run("explain", "net.py:build", "--shape", "1,3,9,9")
    usage = cache.usage()
    assert usage.entries == 2
    expected = {"folder": str(folder), "limit": cache.LIMIT, "unused": None}
    numbers = {"entries": 2, "bytes": usage.bytes}
    assert one_object(run("cache", "--json")[1]) == expected | numbers | {"cleared": False}
    status, out, err = run("cache", "--clear", "--json")
    assert (status, err) == (0, "")
    assert one_object(out) == expected | numbers | {"cleared": True}
    assert list(folder.iterdir()) == []
    status, out, err = run("cache", "--clear")
    assert (status, out) == (0, "")
    assert "removed 0 entries" in " ".join(err.split())
    assert one_object(run("cache", "--json")[1])["entries"] == 0


def test_cache_names_its_folder_in_one_line(
    run: Run, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = work / ("long" * 20)
    monkeypatch.setenv("GROUPCONV_CACHE", str(folder))
    assert str(folder) in run("cache")[2]


def test_cache_that_is_not_used(run: Run, work: Path) -> None:
    (work / "cache").mkdir()
    (work / "cache").chmod(0o755)
    status, out, err = run("cache")
    assert (status, out) == (0, "")
    assert "not used:" in err
    assert "expected mode 0700" in " ".join(err.split())
    status, out, _ = run("cache", "--json")
    assert status == 0
    assert "open to other users" in one_object(out)["unused"]


def _without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("GROUPCONV_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)


@pytest.mark.parametrize("verb", ["cache", "doctor"])
def test_no_home(verb: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_a_home(monkeypatch)
    status, out, _ = run(verb, "--json")
    assert status == 0
    assert "home" in str(one_object(out))


# doctor.


def test_doctor_as_json(run: Run, work: Path) -> None:
    status, out, err = run("doctor", "--json")
    assert (status, err) == (0, "")
    found = one_object(out)
    assert found["order"] == ["native", "native in float32", "aten"]
    assert found["threads"] == openmp.threads()
    assert found["instruction_sets"]
    assert found["cache"] == {"folder": str(work / "cache"), "unused": None}
    assert found["settings"]["GROUPCONV_NATIVE"] == "1"
    assert found["check"]["right"] is True
    assert 0 <= found["check"]["error"] < 1e-5
    assert found["check"]["ready_after"] > 0
    assert found["check"]["latency"].keys() == {"native", "aten"}
    assert all(seconds > 0 for seconds in found["check"]["latency"].values())
    assert found["machine"]["torch"] == torch.__version__


def test_doctor_for_people(run: Run, work: Path) -> None:
    (work / "cache").mkdir()
    (work / "cache").chmod(0o755)
    status, out, err = run("doctor")
    assert (status, out) == (0, "")
    lines = dict(line.split(": ", 1) for line in err.splitlines())
    assert lines["implementations, in this order"] == "native, native in float32, aten"
    assert lines["GROUPCONV_NATIVE"] == "1"
    assert "open to other users" in lines["cache is not used"]
    assert ": right, native " in lines["checked"]
    assert lines["first use"].endswith(" ms")


def _wrong(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    compute = Native.__call__

    def call(self: Native, *tensors: Any) -> torch.Tensor:
        y = compute(self, *tensors)
        y[0, -1, -1, -1] = value
        return y

    monkeypatch.setattr(Native, "__call__", call)


@pytest.mark.parametrize(
    ("json_flag", "value"),
    [([], 1e3), ([], float("nan")), (["--json"], 1e3), (["--json"], float("inf"))],
)
def test_doctor_finds_a_wrong_kernel(
    json_flag: list[str], value: float, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    _wrong(monkeypatch, value)
    status, out, err = run("doctor", *json_flag)
    assert status == 1
    assert "a kernel is wrong by" in err
    if json_flag:
        assert one_object(out)["check"]["right"] is False
    else:
        assert out == ""
        assert "WRONG" in err


def test_doctor_prints_json_for_a_kernel_of_nan(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _wrong(monkeypatch, float("nan"))
    _, out, _ = run("doctor", "--json")

    def refuse(name: str) -> None:
        raise AssertionError(name)

    json.loads(out, parse_constant=refuse)


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_doctor_on_an_unknown_processor(
    json_flag: list[str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "runnable", lambda: ())
    status, out, err = run("doctor", *json_flag)
    assert status == 1
    assert "no code can be generated for this processor" in " ".join(err.split())
    if json_flag:
        found = one_object(out)
        assert found["instruction_sets"] == []
        assert "check" not in found
    else:
        assert "none that is known" in err


def test_doctor_without_openmp(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "pool", lambda: None)
    status, out, _ = run("doctor", "--json")
    assert status == 0
    assert (one_object(out)["openmp"], one_object(out)["threads"]) == (None, 1)
    status, _, err = run("doctor")
    assert status == 0
    assert "1 of no OpenMP runtime was found" in err


# As a program.


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "groupconv", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_explain_as_a_program(work: Path) -> None:
    done = program("explain", "net.py:build", "--shape", "1,3,9,9", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(one_object(done.stdout)["calls"]) == 2
    assert cache.usage().entries == 2


@pytest.mark.slow
def test_cache_and_doctor_as_programs(work: Path) -> None:
    done = program("doctor", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert one_object(done.stdout)["check"]["right"] is True
    done = program("cache", "--clear", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert one_object(done.stdout)["entries"] == 2
