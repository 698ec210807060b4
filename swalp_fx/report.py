"""``report``: a converted model as a table: who got which format, and why."""

from __future__ import annotations

import inspect
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .audit import Audit, audited
from .capture import Conversion
from .capture.methods import set_on
from .formats import FLOAT
from .graphs import conversion_in, inlined
from .nodes import quantize_output
from .passes.names import PART, place
from .recipe import ROLES, Quantizer
from .rows import DERIVED, Row, operation_of, rows
from .table import WIDTH, folded_rows, listed, paragraph, table

__all__ = ["report"]

MEANT = {
    "constant": "constants, made of no parameter and of nothing floating that the model is given",
    "mask": "scales and masks on the way to a softmax",
    "angle": "angles, which only sin and cos read",
}
UNSEEN = "layers are known after the first call: call the model once, or pass an input: report(lp, x)"


def report(module: nn.Module, /, *inputs: Any, fold: bool = False, **keywords: Any) -> str:
    """A table of at most 100 columns, one row a layer: its name, operation, output shape, the formats of W A E G M,
    multiply-adds and parameters. Below it totals, what stays in float and why, and what runs outside of the graphs.

    The names are those that a recipe's rules, ``include`` and ``exclude`` take, and that ``measure`` is indexed by:
    ``layer1.0.conv1``, a function as ``layer1.0.iadd``, and the calls of a module that is called twice as
    ``layer1.0.relu@1`` and ``layer1.0.relu@2``. A name that is too long goes on in the next line. Long lists below the
    table fold names that differ in their numbers: ``layer*.*.relu@* (16)``.

    The table is of all graphs that calls have made so far, each place once; before the first call it has the parameters
    alone. With ``inputs``, of one call of the module, that call is made in its present mode, and changes nothing: it
    fills in output shapes and multiply-adds, and finds the operations that run outside of the graphs, with their lines.
    A role that stays in float, or that the layer has not, is left out of its formats; ``-`` stands for none at all. A
    parameter that several layers read is counted at the first. With ``fold``, the layers of equal blocks have one row,
    where the first of them stood: ``layer1.*.conv2 (3)``.
    Raises ConvertError for a module that is not converted.
    """
    conversion = conversion_in(module, "report")
    audit = audited(conversion, module, inputs, keywords) if inputs or keywords else None
    found = rows(conversion)
    header = ["layer", "operation", *(["output"] if audit else []), "formats", *(["multiply-adds"] if audit else [])]
    cells = [_cells(row, audit) for row in found]
    cells = folded_rows(cells) if fold else cells
    lines = [table([*header, "parameters"], cells, numbers=2 if audit else 1)]
    lines += ["", *(paragraph(line, 12) for line in _totals(conversion, found, audit))]
    lines += ["", "in float:", *(paragraph(line, 4) for line in _floats(conversion, found))]
    here = f"{Path.cwd()}{os.sep}"
    if outside := [line.replace(here, "") for line in _outside(conversion, audit)]:
        lines += ["", "outside of the graphs:", *(paragraph(line, 4) for line in outside)]
    return "\n".join(lines)


def _cells(row: Row, audit: Audit | None) -> list[str]:
    cells = [row.name, row.operation, _formats(row), f"{row.size:,}" if row.size else ""]
    if audit is not None:
        count = audit.inside[row.name] if row.has_output or row.operation == DERIVED else 0
        cells.insert(2, audit.shapes.get(row.name, ""))
        cells.insert(4, f"{count:,}" if count else "")
    return cells


def _formats(row: Row) -> str:
    """``WGM bfp8[0], A e4m3, E e5m2``."""
    letters: dict[str, str] = {}
    for letter, spec in zip(ROLES, row.formats, strict=True):
        if spec not in ("", str(FLOAT)):
            letters[spec] = letters.get(spec, "") + letter
    return ", ".join(f"{roles} {spec}" for spec, roles in letters.items()) or "-"


def _totals(conversion: Conversion, found: list[Row], audit: Audit | None) -> Iterator[str]:
    specs = {name: spec for row in found for name, spec in row.weights.items()}
    parameters = dict(conversion.root.named_parameters())
    bits = sum(p.numel() * _bits(specs.get(name, str(FLOAT)), p) for name, p in parameters.items())
    values = sum(p.numel() for p in parameters.values())
    counted = Counter(spec for name, spec in specs.items() if name in parameters)
    formats = ", ".join(f"{number} in {spec}" for spec, number in counted.items()) or "none"
    yield f"roles       {', '.join(f'{letter} {role}' for letter, role in ROLES.items())}; one not named is in float"
    yield f"parameters  {values:,} values in {len(parameters)} tensors: {formats}"
    if values:
        share = bits / (32 * values)
        yield f"bits        {bits:,.0f}, {share:.1%} of {32 * values:,} in float32 (shared exponents not counted)"
    yield f"outputs     {_outputs(found) if conversion.graphs else UNSEEN}"
    yield f"rounding    {conversion.recipe.rounding}{_own_roundings(found)}"
    if audit is not None:
        yield f"inside      {_inside(found, audit)}"


def _own_roundings(found: list[Row]) -> str:
    specs = (spec for row in found for spec in row.formats)
    return ", but where ~ names another" if any(Quantizer.parse(spec).rounding for spec in specs if spec) else ""


def _outputs(found: list[Row]) -> str:
    """How many outputs are rounded, of those that a graph sees; and what none sees."""
    outputs = [row for row in found if row.has_output]
    activations, errors = (sum(each.formats[i] not in ("", str(FLOAT)) for each in outputs) for i in (1, 2))
    text = f"{activations} of {len(outputs)} rounded"
    if errors != activations:
        text += f", {errors} of their error signals"
    if whole := Counter({row.whole: row.operation for row in outputs if row.whole}.values()):
        text += f"; inside {_counted(whole)}, called whole, none (not counted)"
    return text


def _inside(found: list[Row], audit: Audit) -> str:
    """The share of the multiply-adds that ran in graphs; and what has some that PyTorch does not count."""
    inside, outside = sum(audit.inside.values()), sum(sum(each.values()) for each in audit.outside.values())
    share = f"{inside / (inside + outside):.1%} of " if inside + outside else ""
    text = f"{share}{inside + outside:,} multiply-adds ran in rewritten graphs"
    counted = {row.whole for row in found if audit.inside[row.name]}
    if unknown := dict.fromkeys(row.whole for row in found if row.whole and row.weights and row.whole not in counted):
        text += f" (those of {', '.join(unknown)} not counted)"
    return text


def _counted(numbers: Counter[str]) -> str:
    return ", ".join(f"{name} x {n}" if n > 1 else name for name, n in numbers.items())


def _bits(spec: str, parameter: Tensor) -> float:
    quantizer = Quantizer.parse(spec)
    return quantizer.format.bits if quantizer.rounds else 8 * parameter.element_size()


def _line(names: Iterable[str], reason: str, among: list[str], before: str = "") -> str:
    room = max(WIDTH - 2 - len(before + reason), WIDTH // 2)
    return f"  {before}{listed(dict.fromkeys(names), among, room)}{reason}"


def _floats(conversion: Conversion, found: list[Row]) -> Iterator[str]:
    """Why what is in float is in float, a line a reason."""
    recipe = conversion.recipe
    names, parameters = [row.name for row in found], [name for name, _ in conversion.root.named_parameters()]
    if by_recipe := [role for role in ROLES.values() if not getattr(recipe, role).rounds]:
        yield f"  {', '.join(by_recipe)}: the recipe says so"
    inputs, moves = _inputs(conversion), _moves(conversion)
    if inputs and not recipe.quantize_input:
        yield _line(inputs, ": the model's input", inputs)
    bare = [row for row in found if row.unrounded]
    if recipe.activation.rounds or recipe.error.rounds or len(bare) < len(found):
        for reason in dict.fromkeys(row.unrounded for row in bare):
            yield _line((row.name for row in bare if row.unrounded == reason), f": {reason}", names)
    for graph, reason in dict.fromkeys(each for row in found for each in row.exceptions.items()):
        held = (row.name for row in found if row.exceptions.get(graph) == reason)
        yield _line(held, f", in {graph}: {reason}", names)
    if moves:
        yield f"  {', '.join(moves)}: no new numbers"
    for meaning, why in MEANT.items():
        if meant := _meant(conversion, meaning):
            yield _line(meant, f": {why}", meant)
    if norms := [row.name for row in found if row.is_written_norm]:
        yield _line(norms, ": a norm is one operation, only what it gives is rounded", names, before="inside ")
    if whole := [row.whole for row in found if row.whole]:
        yield _line(whole, ": called whole, only weights are rounded", names, before="inside ")
    if derived := [name for row in found if row.operation == DERIVED for name in row.weights]:
        yield _line(derived, ": a weight is derived from them, and rounded", parameters)
    read = dict.fromkeys(name for row in found for name in row.weights)
    if foreign := [name for name in read if name not in parameters]:
        yield _line(foreign, ": no parameters of the model, only W is rounded", foreign)
    parameters += conversion.places.loose
    if unread := [name for name in parameters if name not in read]:
        yield _line(unread, ": never read by a graph", parameters)


def _inputs(conversion: Conversion) -> list[str]:
    """The inputs of the model; what one graph gives to the next is none."""
    found = dict.fromkeys(
        place(node)
        for made in conversion.graphs
        if not made.path and not made.place
        for node in made.graph.find_nodes(op="placeholder")
        if node.meta.get(PART) == "input"
    )
    return list(found)


def _meant(conversion: Conversion, meaning: str) -> list[str]:
    """The places of this meaning that no graph rounds."""
    graphs = (inlined(made.graph_module).graph for made in conversion.graphs)
    found = [node for graph in graphs for node in graph.nodes if node.meta.get(PART) == meaning]
    rounded = {place(node) for node in found if any(user.target is quantize_output for user in node.users)}
    return [name for name in dict.fromkeys(map(place, found)) if name not in rounded]


def _moves(conversion: Conversion) -> list[str]:
    """The operations that make no new numbers."""
    graphs = (inlined(made.graph_module).graph for made in conversion.graphs)
    moved = (node for graph in graphs for node in graph.nodes if node.meta.get(PART) in ("movement", "exit"))
    return list(dict.fromkeys(map(operation_of, moved)))


def _outside(conversion: Conversion, audit: Audit | None) -> Iterator[str]:
    """Where the model's code runs as Python, and with an audit what it computes there."""
    for made in conversion.graphs:
        if made.broke is not None:
            yield f"  {made.entry} goes on in Python: {made.broke.splitlines()[0]}"
    yield from (f"  {where} runs as Python" for where in _run_as_python(conversion))
    for path, module in conversion.root.named_modules():
        for name, function in set_on(module):
            if name != "forward":
                code = inspect.unwrap(function).__code__
                where = f"{code.co_filename}:{code.co_firstlineno} {'.'.join(filter(None, (path, name)))}"
                yield f"  {where}: set after convert, in float where no graph calls it"
    if audit is not None:
        for line, counts in audit.outside.items():
            done = (f"{name} ({n:,} multiply-adds)" if n else name for name, n in counts.items())
            yield f"  {line}: {', '.join(done)}"


def _run_as_python(conversion: Conversion) -> Iterator[str]:
    """Where the methods stand that PyTorch's front end leaves to Python."""
    from .capture.compiler import PYTHON  # and with it the front end, a second's import

    kinds = dict.fromkeys(base for module in conversion.root.modules() for base in type(module).__mro__)
    for function in (value for kind in kinds for value in vars(kind).values()):
        if (where := PYTHON.get(getattr(function, "__code__", None))) is not None:  # type: ignore[arg-type]
            yield where
