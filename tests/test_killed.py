"""Runs of tools/train.py that are killed at any moment, each time resumed, end with the bits of one that never stopped.

pytest -s -m slow tests/test_killed.py    prints how many were resumed; a quarter of an hour
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_tools_train import alike, without_times

TRAIN = Path(__file__).parent.parent / "tools" / "train.py"
KILLS = 20
OPTIONS = ["--dataset", "digits", "--batch-size", "100", "--device", "cpu", "--average-from", "1", "--epochs", "40"]
PYTHON = [sys.executable, "-u"]
TORCHRUN = [*PYTHON, "-m", "torch.distributed.run", "--nproc-per-node", "2"]

pytestmark = pytest.mark.slow


def started(launcher, folder, *more):
    command = [*launcher, TRAIN, *OPTIONS, "--recipe", "bfp8[0] master=float", "--out", folder, *more]
    return subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True, start_new_session=True)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid):
    """Whether a process runs; a dead one that nobody has waited for does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_for_end(pids):
    end = time.monotonic() + 60
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < end, f"{alive} run on, though what started them was killed"
        time.sleep(0.05)


def states(folder):
    """All that a run leaves, without its times."""
    found = {path.name: torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))}
    return {name: {**state, "epochs": without_times(state["epochs"])} for name, state in found.items()}


@pytest.mark.parametrize("launcher", [PYTHON, TORCHRUN], ids=["one process", "two ranks"])
def test_a_run_that_is_killed_goes_on_to_the_same_bits(launcher, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    with started(launcher, whole) as process:
        assert process.wait() == 0, process.stderr.read()
    moments, kills, resumed = random.Random(0), 0, 0
    while True:
        more = ["--resume"] if any(folder.glob("*.pt")) else []
        with started(launcher, folder, *more) as process:
            first = next((line for line in process.stderr if "epoch " in line), "")
            resumed += bool(more) and bool(first)
            if kills < KILLS and first:
                time.sleep(moments.uniform(0, 0.6))  # an epoch takes a fifth of a second
                ranks = children(process.pid) if launcher is TORCHRUN else []
                os.kill(moments.choice([process.pid, *ranks]), signal.SIGKILL)
                process.wait()
                wait_for_end(ranks)
                kills += 1
                continue
            said = first + process.stderr.read()
        assert process.returncode == 0, said
        break
    assert (kills, resumed) == (KILLS, KILLS), "the run was over too soon"
    assert alike(states(folder), states(whole))
    print(f"{KILLS} of {KILLS} SIGKILLs resumed bit for bit")
