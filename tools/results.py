"""Runs the commands behind the figures of the pages again, and writes their tables and pictures into the pages.

    python tools/results.py              all of them: some hours, one on each core; runs in runs/ are not repeated
    python tools/results.py ordering     one of them

A page has a table between two comments, "results: NAME" and "end of NAME". Prose that quotes figures is not changed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import files
from command import CommandLine, run, show
from settings import nearest

ROOT = Path(__file__).parent.parent
RESULTS = "results.json"
WRITING = threading.Lock()  # of pages: several figures have one page


@dataclass(frozen=True)
class Figure:
    """A command, the page that has its table, and the pictures: those in the run's folder, or a command that draws."""

    command: str
    page: str
    pictures: tuple[str, ...] = ()  # in the run's folder
    drawn: str = ""  # {results} and {out} in it are replaced; the picture is NAME.svg
    caption: str = ""  # puts the picture above the table; without it, the page has it already

    def words(self, folder: Path) -> list[str]:
        """The command, writing to ``folder``, and going on there if a training run was stopped."""
        words = [*shlex.split(self.command), "--out", str(folder)]
        return [*words, "--resume"] if any(folder.glob("*.pt")) else words


FOUR_RECIPES = '--recipe "bfp8[0]" --recipe mxfp8 --recipe mxfp4 --recipe "e4m3[0]"'
FIGURES = {
    "quadratic": Figure("tools/theory.py quadratic", "docs/results.md", ("quadratic.svg",)),
    "logistic": Figure("tools/theory.py logistic", "docs/results.md", ("logistic.svg",)),
    "ordering": Figure("tools/study.py ordering", "docs/results.md", ("ordering.svg",)),
    "averaging": Figure("tools/study.py averaging", "docs/results.md", ("averaging.svg", "stall.svg")),
    "formats": Figure("tools/study.py formats", "docs/results.md", ("formats.svg",)),
    "decoder": Figure(
        'tools/train.py --dataset stdlib --recipe "bfp8[0] M=float" --recipe mxfp8',
        "docs/gallery.md",
        drawn="tools/plot.py {results} --out {out}",
    ),
    "rotary": Figure(
        f"tools/train.py --dataset stdlib --model rotary --epochs 3 --average-from 2 {FOUR_RECIPES} --score-last",
        "docs/gallery.md",
        drawn="tools/plot.py {results} --out {out}",
    ),
    "vit": Figure(
        "tools/train.py --dataset fashion-mnist --model vit --optimizer adamw --lr 1e-3 --average-lr 5e-4 "
        f"--batch-size 128 --samples 20000 --epochs 4 --average-from 3 --average-every 16 {FOUR_RECIPES}",
        "docs/gallery.md",
        drawn="tools/plot.py {results} --out {out}",
    ),
    "convnet": Figure(
        'tools/train.py --dataset fashion-mnist --recipe "bfp8[0]" --recipe "bfp6[0]" --average-every 0 --seeds 3',
        "README.md",
    ),
    "fashion-mnist": Figure(
        "tools/train.py --config tools/configs/fashion-mnist.toml --seeds 3 --score-last",
        "docs/results.md",
        drawn="tools/bits.py {results} --out {out}",
        caption="Test error against the bits of every role, for three networks: SGD-LP and SWALP",
    ),
}


def refresh(name: str, root: Path, runs: Path) -> None:
    """Runs the command unless it has been run, and writes the page and the pictures below ``root``."""
    figure, folder = FIGURES[name], runs / name
    if not is_done(folder, figure):
        _call(figure.words(folder), root)
    record = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    page = root / figure.page
    with WRITING:
        files.write(page, placed(page.read_text(encoding="utf-8"), name, section(name, record, figure)).encode())
    for picture in figure.pictures:
        files.write(root / "docs" / picture, (folder / picture).read_bytes())
    if figure.drawn:
        out = root / "docs" / f"{name}.svg"
        _call(shlex.split(figure.drawn.format(results=folder / RESULTS, out=out)), root)


def is_done(folder: Path, figure: Figure) -> bool:
    """Whether the results there come from this command."""
    try:
        made = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["command"]
    except (OSError, ValueError, KeyError):
        return False
    words = [word for word in shlex.split(made)[1:] if word != "--resume"]
    out = words.index("--out")
    return words[:out] + words[out + 2 :] == shlex.split(figure.command)


def _call(words: Sequence[str], root: Path) -> None:
    """Runs a command; exits with its status if it fails. One thread: sums depend on the number of threads."""
    show("python " + shlex.join(words))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    status = subprocess.run([sys.executable, *words], cwd=root, env=environment).returncode
    if status:
        raise SystemExit(status)


def section(name: str, record: dict[str, Any], figure: Figure) -> str:
    """The picture, if it stands here, the tables of a record, and where they were made."""
    of = record["environment"]
    made = f"`python {figure.command}`; {of['machine']}, threads: {of['threads']}, torch {of['torch']}, {of['date']}"
    picture = f"![{figure.caption}]({name}.svg)\n\n" if figure.caption else ""
    return f"{picture}{markdown(record['table'])}\n\n*{made}.*"


def markdown(text: str) -> str:
    """A command's tables, as tabulate's "simple" prints them, as Markdown's; the text between them stays."""
    parts: list[str] = []
    for block in re.split(r"\n\n+", text.strip("\n")):
        lines = block.split("\n")
        rule = next((i for i, line in enumerate(lines) if re.fullmatch(r"-+(  +-+)+", line)), None)
        parts.append("\n".join(line.strip() for line in lines) if rule is None else _table(lines, rule))
    return "\n\n".join(parts)


def _table(lines: list[str], rule: int) -> str:
    spans = [match.span() for match in re.finditer("-+", lines[rule])]
    rows = [[line[start:end].strip() for start, end in spans] for line in lines]
    header = [" ".join(filter(None, column)) for column in zip(*rows[:rule], strict=True)]
    sides = ["---", *["---:"] * (len(spans) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, sides, *rows[rule + 1 :]))


def placed(page: str, name: str, content: str) -> str:
    """The page with ``content`` between the comments of that name; raises FileError if it has none."""
    begin, end = f"<!-- results: {name} -->", f"<!-- end of {name} -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise files.FileError(f"the page of {name} lacks {begin} or {end}; add both around its table")
    return f"{before}{begin}\n{content}\n{end}{after}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandLine(prog="results.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("names", metavar="NAME", nargs="*", help=f"{', '.join(FIGURES)} (default: all)")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in FIGURES:
            parser.refuse(f"there is no figure {name!r}; use {nearest(name, FIGURES)}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads, which wait for the commands' processes
        try:
            # The last are the longest.
            list(pool.map(lambda name: refresh(name, ROOT, ROOT / "runs"), args.names or reversed(FIGURES)))
        except files.FileError as error:
            parser.refuse(error)


if __name__ == "__main__":
    run(main)
