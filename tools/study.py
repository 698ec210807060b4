"""The cost of low precision and the gain of averaging, on digits from many seeds: python tools/study.py ordering

    python tools/study.py ordering     SGD-LP against SWALP, with 8 to 4 bits in every role
    python tools/study.py averaging    how few bits the average itself needs, and when it stalls
    python tools/study.py formats      one role at a time in formats of every family: which breaks first

Each takes less than two minutes of one core, prints its table, and with --out DIR writes results.json and figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import averages
import experiment
import ordering
import roles
from command import run


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The record of the study that the command line names."""
    return experiment.main("study.py", __doc__, {"ordering": ordering, "averaging": averages, "formats": roles}, argv)


if __name__ == "__main__":
    run(main)
