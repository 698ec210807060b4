"""The paper's two theorems, measured: python tools/theory.py quadratic --out runs/quadratic

    python tools/theory.py quadratic    theorem 1: averaging reaches the optimum at O(1/T), whatever the precision
    python tools/theory.py logistic     theorem 2: the remaining error is O(delta^2); low-precision SGD's is O(delta)

Each takes less than a minute of one core, prints its slopes, and with --out DIR writes results.json and a figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import experiment
import logistic
import quadratic
from command import run


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The record of the theorem that the command line names."""
    return experiment.main("theory.py", __doc__, {"quadratic": quadratic, "logistic": logistic}, argv)


if __name__ == "__main__":
    run(main)
