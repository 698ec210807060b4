"""``report``: a converted model as a table: each layer with its formats, and the reasons."""

from __future__ import annotations

import inspect
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..capture import Conversion
from ..capture.methods import set_on
from ..formats import FLOAT
from ..globs import in_room
from ..passes.names import PART, place
from ..passes.rounding import ACTIVATION, Rounding
from ..recipe import ROLES, Recipe
from ..recipe.quantizer import MARK
from .audit import Audit, audited
from .graphs import conversion_in, inlined
from .masks import masked_later
from .rows import DERIVED, Row, operation_of, rows, stored_bits
from .table import WIDTH
from .value import InFloat, LayerLine, ParameterLine, Report

__all__ = ["report"]

MEANT = {
    "constant": "constants, made of no parameter and of nothing floating that the model is given",
    "mask": "scales and masks on the way to a softmax",
    "angle": "angles, which only sin and cos read",
}
LATER = "rounded together with scores that a mask takes out later"
UNSEEN = "layers are known after the first call: call the model once, or pass an input: report(lp, x)"


def report(module: nn.Module, /, *inputs: Any, fold: bool = False, **keywords: Any) -> Report:
    """The formats of each layer and parameter, and the reasons. It prints as a table of at most 100 columns.

    A layer is a row: its name, operation, output shape, the formats of W A E G M, multiply-adds, parameters, and the
    bits of a parameter's value, scales included. Below the table: totals, the parts in float with the reason, and the
    operations outside of the graphs.

    Recipes' rules, ``include`` and ``exclude`` take these names, and ``measure`` does: ``layer1.0.conv1``, a function
    as ``layer1.0.iadd``, two calls of a module as ``layer1.0.relu@1`` and ``layer1.0.relu@2``. A name that is too long
    goes on in the next line. Long lists below the table fold names that differ in their numbers:
    ``layer*.*.relu@* (16)``.

    The table covers all graphs that calls have made so far, each place once. Before the first call it has the
    parameters alone. ``inputs`` are the arguments of a call, which is then made in the present mode, and changes
    nothing. The call fills in output shapes and multiply-adds, and finds the operations outside of the graphs, with
    their lines.

    Formats leave out a role that is in float or that the layer does not have; ``-`` stands for no format at all. A
    parameter that several layers read is counted at the first. With ``fold``, the layers of equal blocks share the row
    of the first: ``layer1.*.conv2 (3)``.

    Raises ConvertError for a module that is not converted.
    """
    conversion = conversion_in(module, "report")
    audit = audited(conversion, module, inputs, keywords) if inputs or keywords else None
    found = rows(conversion)
    parameters = tuple(_parameters(conversion, found))
    here = f"{Path.cwd()}{os.sep}"
    return Report(
        model=type(conversion.root).__name__,
        recipe=str(conversion.recipe),
        layers=tuple(_layer(row, audit) for row in found),
        parameters=parameters,
        totals=dict(_totals(conversion, found, parameters, audit)),
        in_float=tuple(_floats(conversion, found)),
        outside=tuple(line.replace(here, "") for line in _outside(conversion, audit)),
        is_audited=audit is not None,
        folds=fold,
    )


def _layer(row: Row, audit: Audit | None) -> LayerLine:
    formats = dict(zip(ROLES, row.formats, strict=True))
    if audit is None:
        return LayerLine(row.name, row.operation, "", formats, None, row.size, row.bits)
    count = audit.inside[row.name] if row.has_output or row.operation == DERIVED else 0
    return LayerLine(row.name, row.operation, audit.shapes.get(row.name, ""), formats, count, row.size, row.bits)


def _parameters(conversion: Conversion, found: list[Row]) -> Iterator[ParameterLine]:
    specs = {name: spec for row in found for name, spec in row.weights.items()}
    for name, parameter in conversion.root.named_parameters():
        spec = specs.get(name, str(FLOAT))
        yield ParameterLine(name, tuple(parameter.shape), spec, parameter.numel(), stored_bits(spec, parameter))


def _totals(
    conversion: Conversion, found: list[Row], parameters: Sequence[ParameterLine], audit: Audit | None
) -> Iterator[tuple[str, str]]:
    recipe = conversion.recipe
    bits, values = sum(each.bits for each in parameters), sum(each.values for each in parameters)
    read = {name for row in found for name in row.weights}
    counted = Counter(each.format for each in parameters if each.name in read)
    formats = ", ".join(f"{number} in {spec}" for spec, number in counted.items()) or "none"
    yield "roles", f"{', '.join(f'{letter} {role}' for letter, role in ROLES.items())}; one not named is in float"
    yield "parameters", f"{values:,} values in {len(parameters)} tensors: {formats}"
    if values:
        share = bits / (32 * values)
        yield (
            "bits",
            f"{bits:,}, {share:.1%} of {32 * values:,} in float32; {bits / values:.2f} an element, scales included",
        )
    yield "outputs", _outputs(found) if conversion.graphs else UNSEEN
    graphs = (inlined(made.graph_module).graph for made in conversion.graphs)
    if later := dict.fromkeys(name for graph in graphs for name in masked_later(graph)):
        yield "masks", f"{in_room(later, [row.name for row in found], WIDTH // 2)} {LATER}"
    yield "rounding", f"{recipe.rounding}{_own_roundings(found)}"
    if masters := _with_rules(recipe, "master"):
        yield "master", f"{masters}, which the optimizer steps on"
    if averages := _with_rules(recipe, "average"):
        yield "average", averages
    if states := list(_states(recipe)):
        yield "states", f"{', '.join(states)}, of the optimizer"
    if audit is not None:
        yield "inside", _inside(found, audit)


def _with_rules(recipe: Recipe, role: str) -> str:
    """The formats that a recipe and its rules give to ``role``; "" if nothing has one."""
    default, own = getattr(type(recipe), role), getattr(recipe, role)
    here = [str(own)] if own != default else []
    return ", ".join(
        [*here, *(f"{quantizer} in {rule.match}" for rule in recipe.rules if (quantizer := getattr(rule, role)))]
    )


def _states(recipe: Recipe) -> Iterator[str]:
    """The formats that a recipe and its rules give to second moments, and to states by name."""
    if recipe.second_moment.rounds:
        yield f"V {recipe.second_moment}"
    yield from (f"{name} {quantizer}" for name, quantizer in recipe.states)
    for rule in recipe.rules:
        second_moment = [("V", rule.second_moment)] if rule.second_moment is not None else []
        yield from (f"{name} {quantizer} in {rule.match}" for name, quantizer in (*second_moment, *rule.states))


def _own_roundings(found: list[Row]) -> str:
    specs = (spec for row in found for spec in row.formats)
    return ", but where ~ names another" if any(MARK in spec for spec in specs) else ""


def _outputs(found: list[Row]) -> str:
    """How many of the graphs' outputs are rounded, and the layers with insides that no graph sees."""
    outputs = [row for row in found if row.has_output]
    activations, errors = (sum(each.formats[i] not in ("", str(FLOAT)) for each in outputs) for i in (1, 2))
    text = f"{activations} of {len(outputs)} rounded"
    if errors != activations:
        text += f", {errors} of their error signals"
    if whole := Counter({row.whole: row.operation for row in outputs if row.whole}.values()):
        text += f"; inside {_counted(whole)}, called whole, none (not counted)"
    return text


def _inside(found: list[Row], audit: Audit) -> str:
    """The share of multiply-adds that ran in graphs, and the layers with multiply-adds that PyTorch does not count."""
    inside, outside = sum(audit.inside.values()), sum(sum(each.values()) for each in audit.outside.values())
    share = f"{inside / (inside + outside):.1%} of " if inside + outside else ""
    text = f"{share}{inside + outside:,} multiply-adds ran in rewritten graphs"
    if inside:
        whole = {row.name for row in found if row.whole}  # inside them, operands are not rounded
        rounded = sum(count for place, count in audit.rounded.items() if place not in whole)
        text += f", {rounded / (inside + outside):.1%} on rounded operands"
    counted = {row.whole for row in found if audit.inside[row.name]}
    if unknown := dict.fromkeys(row.whole for row in found if row.whole and row.whole not in counted):
        text += f" (those of {', '.join(unknown)} not counted)"
    return text


def _counted(numbers: Counter[str]) -> str:
    return ", ".join(f"{name} x {n}" if n > 1 else name for name, n in numbers.items())


def _floats(conversion: Conversion, found: list[Row]) -> Iterator[InFloat]:
    """The parts in float, a line a reason."""
    recipe = conversion.recipe
    names, parameters = tuple(row.name for row in found), [name for name, _ in conversion.root.named_parameters()]

    def line(names: Iterable[str], why: str, among: Iterable[str] = (), before: str = "") -> InFloat:
        return InFloat(tuple(dict.fromkeys(names)), why, before, tuple(among))

    if by_recipe := [role for role in ROLES.values() if not getattr(recipe, role).rounds]:
        yield line(by_recipe, "the recipe says so")
    inputs, moves = _inputs(conversion), _moves(conversion)
    if inputs and not recipe.quantize_input:
        yield line(inputs, "the model's input")
    bare = [row for row in found if row.unrounded]
    if recipe.activation.rounds or recipe.error.rounds or len(bare) < len(found):
        for reason in dict.fromkeys(row.unrounded for row in bare):
            yield line((row.name for row in bare if row.unrounded == reason), reason, names)
    for graph, reason in dict.fromkeys(each for row in found for each in row.exceptions.items()):
        held = (row.name for row in found if row.exceptions.get(graph) == reason)
        yield line(held, f"{reason}, in {graph}", names)
    if moves:
        yield line(moves, "no new numbers")
    for meaning, why in MEANT.items():
        if meant := _meant(conversion, meaning):
            yield line(meant, why)
    if norms := [row.name for row in found if row.is_written_norm]:
        yield line(norms, "a norm is one operation, only its output is rounded", names, before="inside ")
    if whole := [row.whole for row in found if row.whole]:
        yield line(whole, "called whole, only weights are rounded", names, before="inside ")
    if derived := [name for row in found if row.operation == DERIVED for name in row.weights]:
        yield line(derived, "a weight is derived from them, and rounded", parameters)
    read = dict.fromkeys(name for row in found for name in row.weights)
    if foreign := [name for name in read if name not in parameters]:
        yield line(foreign, "no parameters of the model, only W is rounded")
    parameters += conversion.places.loose
    if unread := [name for name in parameters if name not in read]:
        yield line(unread, "never read by a graph", parameters)


def _inputs(conversion: Conversion) -> list[str]:
    """The inputs of the model. Tensors that pass from one graph to the next do not count."""
    found = dict.fromkeys(
        place(node)
        for made in conversion.graphs
        if not made.path and not made.place
        for node in made.graph.find_nodes(op="placeholder")
        if node.meta.get(PART) == "input"
    )
    return list(found)


def _meant(conversion: Conversion, meaning: str) -> list[str]:
    """The places with this meaning that no graph rounds."""
    graphs = (inlined(made.graph_module).graph for made in conversion.graphs)
    found = [node for graph in graphs for node in graph.nodes if node.meta.get(PART) == meaning]
    rounded = {place(node) for node in found if any(Rounding.of(user, ACTIVATION) for user in node.users)}
    return [name for name in dict.fromkeys(map(place, found)) if name not in rounded]


def _moves(conversion: Conversion) -> list[str]:
    """The operations that make no new numbers."""
    graphs = (inlined(made.graph_module).graph for made in conversion.graphs)
    moved = (node for graph in graphs for node in graph.nodes if node.meta.get(PART) in ("movement", "exit"))
    return list(dict.fromkeys(map(operation_of, moved)))


def _outside(conversion: Conversion, audit: Audit | None) -> Iterator[str]:
    """The places where the model's code runs as Python; with an audit, also the operations there."""
    for made in conversion.graphs:
        if made.broke is not None:
            yield f"{made.entry} goes on in Python: {made.broke.splitlines()[0]}"
    yield from (f"{where} runs as Python" for where in _run_as_python(conversion))
    for path, module in conversion.root.named_modules():
        for name, function in set_on(module):
            if name != "forward":
                code = inspect.unwrap(function).__code__
                where = f"{code.co_filename}:{code.co_firstlineno} {'.'.join(filter(None, (path, name)))}"
                yield f"{where}: set after convert, in float where no graph calls it"
    if audit is not None:
        for line, counts in audit.outside.items():
            done = (f"{name} ({n:,} multiply-adds)" if n else name for name, n in counts.items())
            yield f"{line}: {', '.join(done)}"


def _run_as_python(conversion: Conversion) -> Iterator[str]:
    """The lines of the methods that PyTorch's front end leaves to Python."""
    from ..capture.compiler import PYTHON  # it imports the front end, which takes a second

    kinds = dict.fromkeys(base for module in conversion.root.modules() for base in type(module).__mro__)
    for function in (value for kind in kinds for value in vars(kind).values()):
        if (where := PYTHON.get(getattr(function, "__code__", None))) is not None:  # type: ignore[arg-type]
            yield where
