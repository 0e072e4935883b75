"""Several processes on one job: the same result as one, and no process waits for a dead one."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from groupconv import ranks
from groupconv.errors import ArgumentError

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")

NETWORK = """
import torch
from torch import nn
def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8),
        nn.ReLU(), nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.Conv2d(16, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
def photos():
    torch.manual_seed(2)
    return torch.randn(400, 3, 12, 12)
"""
ALONE = {"OMP_NUM_THREADS": "1", "GROUPCONV_BUSY": "1"}


def together(code: str, folder: Path, seconds: float = 60) -> list[tuple[int, str]]:
    """Exit status and output of two processes that run a piece of code, ``rank`` known to it."""
    start = f"""
import sys
import torch.distributed as dist
from datetime import timedelta
from groupconv import ranks
from groupconv.errors import ArgumentError, GroupConvError
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{folder}/store", rank=rank, world_size=2,
                        timeout=timedelta(seconds=20))
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", start + code, str(rank)], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    return [(p.returncode, output) for p, output in zip(processes, outputs, strict=True)]


def test_one_process_is_the_first_of_one() -> None:
    assert (ranks.count(), ranks.rank(), ranks.first()) == (1, 0, True)
    assert ranks.on_first(lambda: 7) == 7
    assert ranks.gathered("x") == ["x"]


def test_results_and_errors_are_shared(tmp_path: Path) -> None:
    code = """
print(ranks.on_first(lambda: f"from {rank}"), ranks.gathered(rank * 10))
def refuse():
    raise ArgumentError(f"refused by {rank}")
try:
    ranks.on_first(refuse)
except ArgumentError as error:
    print(error)
ranks.leave()
"""
    expected = "from 0 [0, 10]\nrefused by 0\n"
    assert together(code, tmp_path) == [(0, expected)] * 2


@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_that_dies_is_not_waited_for(dies: int, tmp_path: Path) -> None:
    code = f"""
import os, signal
ranks.gathered(None)
if rank == {dies}:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    ranks.gathered(None)
except GroupConvError as error:
    print("another process has ended" in str(error))
"""
    found = together(code, tmp_path)
    assert found[dies][0] == -9
    assert found[1 - dies][1] == "True\n"


@pytest.mark.skipif(sys.platform != "linux", reason="lists its threads under /proc")
def test_nothing_of_a_group_is_left(tmp_path: Path) -> None:
    """A thread of the group that outlives Python's end ends the process with SIGABRT."""
    (tmp_path / "job.py").write_text("""
from pathlib import Path
from groupconv import ranks
def threads():
    return {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
before = threads()
ranks.join()
during = threads() - before
import torch._dynamo  # what torch.export does
ranks.leave()
print(f"{len(during) > 0} {threads() & during}\\n", end="")
""")
    done = subprocess.run(
        [*torchrun(2), "job.py"], cwd=tmp_path, env=os.environ | ALONE, capture_output=True,
        text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "True set()\nTrue set()\n"), done.stderr


def test_illegal_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("GROUPCONV_TIMEOUT", "soon")
    with pytest.raises(ArgumentError, match="GROUPCONV_TIMEOUT='soon' must be a number"):
        ranks.join()


def torchrun(processes: int) -> list[str]:
    """The command that starts a script in some processes, before the script."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *launcher]


def optimize(folder: Path, *options: str, launch: Sequence[str]) -> dict:
    command = [
        *launch, "-m", "groupconv", "optimize", "--model", "net.py:build",
        "--data", "net.py:photos", "--budget", "60%macs", *options,
    ]  # fmt: skip
    done = subprocess.run(
        [*command, "--json"], cwd=folder, env=os.environ | ALONE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    """The same structures, channels and weights; and what is learned is learned by both."""
    (tmp_path / "net.py").write_text(NETWORK)
    one = optimize(tmp_path, "--out", "one", launch=[sys.executable])
    # What is measured differs from run to run: the same times are taken for both.
    (tmp_path / "two").mkdir()
    shutil.copy(tmp_path / "one" / "latency.json", tmp_path / "two")
    two = optimize(tmp_path, "--out", "two", launch=torchrun(2))
    plans = [json.loads((tmp_path / out / "plan.json").read_text()) for out in ("one", "two")]
    assert plans[0]["layers"] == plans[1]["layers"]
    assert any(layer.get("groups", 1) > 1 for layer in plans[0]["layers"].values())
    weights = [load_file(tmp_path / out / "model.safetensors") for out in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-5)
    assert one["output_error"] == pytest.approx(two["output_error"], rel=1e-4)
    learned = optimize(tmp_path, "--recover", "4s", "--out", "three", launch=torchrun(2))
    assert learned["recovery"][-1]["steps"] > 0
    assert not list(tmp_path.rglob(".unfinished"))


def test_accelerate_launches_it(tmp_path: Path) -> None:
    """On CPUs as one process."""
    (tmp_path / "net.py").write_text(NETWORK)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"]
    learned = optimize(tmp_path, "--recover", "2s", "--out", "out", launch=launch)
    assert learned["recovery"][-1]["steps"] > 0


@pytest.mark.skipif(os.name != "posix", reason="SLURM is for Linux")
def test_slurm(tmp_path: Path) -> None:
    """The script of the examples, on one node; what belongs to SLURM is stood in for."""
    (tmp_path / "net.py").write_text(NETWORK)
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, what in (
        ("srun", 'exec "$@"'),
        ("scontrol", 'test "$3" = "node[1-2]"; echo localhost'),
    ):
        (bin_folder / name).write_text(f"#!/bin/sh\nset -e\n{what}\n")
        (bin_folder / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    job = {
        "PATH": f"{bin_folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_PER_TASK": "2", "PROCESSES_PER_NODE": "2", "RENDEZVOUS_PORT": str(port),
    }  # fmt: skip
    script = Path(__file__).parents[1] / "examples" / "slurm_optimize.sh"
    done = subprocess.run(
        ["bash", str(script), "--model", "net.py:build", "--data", "net.py:photos",
         "--budget", "60%macs", "--out", "out", "--json"],
        cwd=tmp_path, env=os.environ | ALONE | job, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # One object: the second process says nothing.
    assert json.loads(done.stdout)["machine"]["threads"] == 1
    assert (tmp_path / "out" / "model.safetensors").exists()
