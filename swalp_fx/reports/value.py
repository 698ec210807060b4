"""``Report``: a report as a value, and as text, Markdown, JSON, CSV and HTML."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from ..formats import FLOAT
from ..globs import folded_rows, in_room
from ..recipe import ROLES
from .files import written
from .page import Table, page
from .table import WIDTH, escaped, markdown, paragraph, table

__all__ = ["InFloat", "LayerLine", "ParameterLine", "Report"]


@dataclass(frozen=True)
class LayerLine:
    """A layer, or a parameter that is read outside of a layer."""

    name: str  # of its place
    operation: str
    output: str  # "2x4x8x8"; "" if it is not known
    formats: dict[str, str]  # W A E G M -> spec; "" for a role that it does not have
    multiply_adds: int | None  # None if they are not known
    values: int  # in its parameters, except those that an earlier line has
    bits: int  # of these values, scales included

    @property
    def rounded(self) -> str:
        """``WGM bfp8[0], A e4m3, E e5m2``; ``-`` if all is in float."""
        letters: dict[str, str] = {}
        for letter, spec in self.formats.items():
            if spec not in ("", str(FLOAT)):
                letters[spec] = letters.get(spec, "") + letter
        return ", ".join(f"{roles} {spec}" for spec, roles in letters.items()) or "-"


@dataclass(frozen=True)
class ParameterLine:
    """A parameter by itself."""

    name: str
    shape: tuple[int, ...]
    format: str  # of W
    values: int
    bits: int  # of its values, scales included


@dataclass(frozen=True)
class InFloat:
    """Names that are in float, and the reason."""

    names: tuple[str, ...]
    why: str
    before: str = ""  # a word before the names: "inside "
    among: tuple[str, ...] = field(default=(), repr=False)  # all names of that kind

    def __str__(self) -> str:
        room = max(WIDTH - 4 - len(self.before + self.why), WIDTH // 2)
        return f"{self.before}{in_room(self.names, self.among or self.names, room)}: {self.why}"


@dataclass(frozen=True, repr=False)
class Report:
    """The formats of a converted model's layers, the bits of its parameters, and the parts in float with the reason.

    ``str(report)`` is text of at most 100 columns. ``to_markdown``, ``to_json``, ``to_csv`` and ``to_html`` are the
    same in other forms.
    """

    model: str  # its type
    recipe: str
    layers: tuple[LayerLine, ...]
    parameters: tuple[ParameterLine, ...]
    totals: dict[str, str]  # label -> text
    in_float: tuple[InFloat, ...]
    outside: tuple[str, ...]  # the operations that run outside of the graphs
    is_audited: bool = False  # whether a call has been watched, so that shapes and multiply-adds are known
    folds: bool = False  # whether equal blocks have one row in tables

    @property
    def header(self) -> list[str]:
        """The titles of the table's columns."""
        output, count = (["output"], ["multiply-adds"]) if self.is_audited else ([], [])
        return ["layer", "operation", *output, "formats", *count, "parameters", "bits"]

    @property
    def numbers(self) -> int:
        """How many of the last columns are numbers."""
        return 3 if self.is_audited else 2

    def rows(self) -> list[list[str]]:
        """The table's cells, a list a layer."""
        cells = [self._cells(line) for line in self.layers]
        return folded_rows(cells) if self.folds else cells

    def _cells(self, line: LayerLine) -> list[str]:
        cells = [line.name, line.operation, line.rounded, *_size(line.values, line.bits)]
        if self.is_audited:
            cells.insert(2, line.output)
            cells.insert(4, f"{line.multiply_adds:,}" if line.multiply_adds else "")
        return cells

    def __str__(self) -> str:
        lines = [table(self.header, self.rows(), numbers=self.numbers), ""]
        lines += [paragraph(f"{label:<11} {text}", 12) for label, text in self.totals.items()]
        for title, each in self.lists():
            lines += ["", f"{title}:", *(paragraph(f"  {line}", 4) for line in each)]
        return "\n".join(lines)

    __repr__ = __str__

    def lists(self) -> Iterator[tuple[str, list[str]]]:
        """(title, lines) of each list below the totals."""
        yield "in float", list(map(str, self.in_float))
        if self.outside:
            yield "outside of the graphs", list(self.outside)

    def to_markdown(self, path: str | os.PathLike[str] | None = None) -> str:
        """The table, and lists below it. Like the other forms, also written to ``path`` if given."""
        parts = [f"# {self.model}: `{self.recipe}`", markdown(self.header, self.rows(), numbers=self.numbers)]
        parts.append("\n".join(f"- **{label}**: {escaped(text)}" for label, text in self.totals.items()))
        for title, lines in self.lists():
            parts.append("\n".join([f"**{title}**", "", *(f"- {escaped(line)}" for line in lines)]))
        return written("\n\n".join(parts) + "\n", path)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """An object with all fields, nothing folded. Null stands for unknown."""
        fields = asdict(self)
        del fields["is_audited"], fields["folds"]
        for each in fields["in_float"]:
            del each["among"]
        return written(json.dumps(fields, indent=1, allow_nan=False) + "\n", path)

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """A header and a line for each layer, nothing folded; bits are the sum over all its values."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["layer", "operation", "output", *ROLES, "multiply_adds", "values", "bits"])
        for each in self.layers:
            counts = each.multiply_adds, each.values, each.bits
            writer.writerow([each.name, each.operation, each.output, *each.formats.values(), *counts])
        return written(text.getvalue(), path)

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """One page that needs no other file and no network, for light and dark screens."""
        parameters = [
            [each.name, "x".join(map(str, each.shape)), each.format, f"{each.values:,}", f"{each.bits:,}"]
            for each in self.parameters
        ]
        layers = Table(self.header, self.rows(), self.numbers)
        more = Table(["parameter", "shape", "format", "values", "bits"], parameters, 2)
        return written(page(self.model, self.recipe, self.totals, layers, self.lists(), more), path)


def _size(values: int, bits: int) -> tuple[str, str]:
    return (f"{values:,}", f"{bits / values:.2f}") if values else ("", "")
