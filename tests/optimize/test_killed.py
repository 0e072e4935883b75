"""kill -9 at twenty random moments of a run, which then ends as if nothing had happened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

# Children are forked after the imports, so that the moments fall into the run itself.
KILLED = """
import os, random, shutil, signal, sys, time
from pathlib import Path
import torch
import groupconv
from groupconv.recovery import engine, stages
from networks import images, residual

folder = Path(sys.argv[1])
torch.set_num_threads(1)
# The time would plan another number of steps each time.
engine._Run._planned = lambda self, seconds: (40, 10)
engine._SAVE_EVERY = 0.0

def run(out):
    groupconv.optimize(residual(), images(96), budget="45%macs", recover="4s", out=out)

run(folder / "whole")
start = time.perf_counter()
run(folder / "whole")
took = time.perf_counter() - start
# What is measured differs from run to run: the same times are taken for both.
(folder / "killed").mkdir()
shutil.copy(folder / "whole" / "latency.json", folder / "killed")
random.seed(0)
killed = 0
while killed < 20:
    child = os.fork()
    if child == 0:
        run(folder / "killed")
        os._exit(0)
    time.sleep(random.uniform(0, 0.3 * took))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        break
    killed += 1
run(folder / "killed")
print(killed, took)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system can't fork")
def test_killed_at_random_moments(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "GROUPCONV_BUSY": "1"}
        | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 5, "ended before it was killed often: kill earlier"
    plans = [json.loads((tmp_path / out / "plan.json").read_text()) for out in ("whole", "killed")]
    assert plans[0]["layers"] == plans[1]["layers"]
    weights = [load_file(tmp_path / out / "model.safetensors") for out in ("whole", "killed")]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value), name
    files = [{path.name for path in (tmp_path / out).iterdir()} for out in ("whole", "killed")]
    assert files[0] == files[1]
