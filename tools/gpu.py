"""All checks and timings on a GPU, in ten minutes on an unprepared machine: in stages, the most telling first.

    python tools/gpu.py                          # all stages; gpu.json is written anew after each
    python tools/gpu.py hashes bandwidth         # some of them
    python tools/gpu.py --list                   # their names, and how long each may take

Each stage is a process of its own under a time limit, so that neither a hang nor a crash takes the others with it.
Without a GPU, the stages that need one say so. Exit status 1: a stage failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
TAIL = 6000  # characters of a stage's output that are kept
NO_GPU = 3  # exit status of a stage that needs a GPU where there is none


@dataclass(frozen=True)
class Stage:
    """The work of one process: a function of gpu_stages by its name or, if there are files, the tests in them."""

    name: str
    seconds: int  # its time limit
    shows: str
    tests: tuple[str, ...] = ()
    needs_gpu: bool = True
    is_table: bool = False  # whether its rows are printed

    def rows(self) -> Iterator[dict[str, Any]]:
        """The results of the stage, a row at a time; raises if something is wrong."""
        if self.tests:
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-m",
                "gpu",
                "--show-capture=no",
                "--durations=5",
                *self.tests,
            ]
            subprocess.run(command, check=True)
            return
        stages = importlib.import_module("gpu_stages")  # imports torch and swalp_fx, which may not be built yet
        yield from getattr(stages, self.name)()


STAGES = (
    Stage("build", 300, "the compiled modules, built if they are not there already", needs_gpu=False),
    Stage("smoke", 30, "the modules load, and round as the CPU does"),
    Stage("hashes", 60, "each kernel and path in each dtype gives the CPU's bits", ("tests/test_cuda_hashes.py",)),
    Stage("sanitizer", 150, "no bad access and no race, by compute-sanitizer where it is installed"),
    Stage("bandwidth", 60, "bytes moved a second, by path, beside a copy", is_table=True),
    Stage("steps", 90, "training steps of ResNet-18 and ResNet-50 over float, and their launches", is_table=True),
    Stage("models", 80, "a model trained, captured, under autocast and compiled", ("tests/test_cuda_models.py",)),
    Stage(
        "tests",
        130,
        "the other tests that need a GPU",
        (
            "tests/test_cuda.py",
            "tests/test_codes.py",
            "tests/test_optimizer.py",
            "tests/test_averaging.py",
            "tests/test_recalibration.py",
            "tests/test_where_a_dtype_ends.py",
        ),
    ),
)


def run_stage(stage: Stage) -> dict[str, Any]:
    """The stage's outcome and rows, from a process of its own. Rows found before a timeout count too."""
    with tempfile.TemporaryDirectory() as folder:
        rows, output = Path(folder, "rows"), Path(folder, "output")
        command = [sys.executable, __file__, stage.name, "--inside", str(rows)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        begin = time.perf_counter()
        with output.open("wb") as sink:
            process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
            try:
                outcome = {0: "passed", NO_GPU: "no GPU"}.get(process.wait(stage.seconds), "failed")
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                outcome = f"stopped after {stage.seconds} s"
        return {
            "outcome": outcome,
            "seconds": round(time.perf_counter() - begin, 1),
            "rows": [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else [],
            "output": output.read_text(errors="replace")[-TAIL:],
        }


def inside(stage: Stage, rows: Path) -> None:
    """Run the stage here, and write each row as it comes."""
    if stage.needs_gpu:
        import torch

        if not torch.cuda.is_available():
            print("torch finds no GPU")
            raise SystemExit(NO_GPU)
    with rows.open("w") as file:
        for row in stage.rows():
            print(json.dumps(row), file=file, flush=True)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The numbers and words of the rows. Nested values are in the JSON file alone."""
    flat = [{name: value for name, value in row.items() if not isinstance(value, dict | list)} for row in rows]
    return tabulate(flat, headers="keys", floatfmt=".4g")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"{', '.join(s.name for s in STAGES)} (all)")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="what was found (default: gpu.json)")
    parser.add_argument("--list", action="store_true", help="print the stages and their time limits")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)  # this process is a stage's own
    args = parser.parse_args(argv)
    by_name = {stage.name: stage for stage in STAGES}
    if unknown := [name for name in args.stages if name not in by_name]:
        parser.error(f"there is no stage {unknown[0]!r}; there are {', '.join(by_name)}")
    if not args.inside and (args.json.is_dir() or not args.json.resolve().parent.is_dir()):
        parser.error(f"--json {args.json} is no file in a folder that exists; name one")
    stages = [by_name[name] for name in args.stages] or list(STAGES)
    if args.inside:
        return inside(stages[0], args.inside)
    if args.list:
        for stage in stages:
            print(f"{stage.name:10} {stage.seconds:4} s  {stage.shows}")
        print(f"{'all':10} {sum(stage.seconds for stage in stages):4} s at most")
        return None
    found: dict[str, Any] = {"date": date.today().isoformat(), "python": platform.python_version(), "stages": {}}
    for stage in stages:
        print(f"{stage.name:10} ", end="", flush=True)
        result = found["stages"][stage.name] = run_stage(stage)
        print(f"{result['outcome']} in {result['seconds']} s: {stage.shows}", flush=True)
        if result["outcome"] not in ("passed", "no GPU"):
            print(result["output"], flush=True)
        if stage.is_table and result["rows"]:
            print("\n" + table(result["rows"]) + "\n", flush=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    raise SystemExit(any(each["outcome"] not in ("passed", "no GPU") for each in found["stages"].values()))


if __name__ == "__main__":
    main()
