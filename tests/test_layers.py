"""The package's modules import one way only, and nothing but torch and tabulate from outside."""

import ast
import re
import sys
from pathlib import Path

import pytest

import swalp_fx
from swalp_fx.passes.proof import RULES

PACKAGE = Path(swalp_fx.__file__).parent

# Each layer imports only from those before it. Modules of one layer do not know each other.
LAYERS = [
    ["copied", "errors", "globs", "nearest", "warn", "whole"],
    ["formats"],
    ["recipe"],
    ["random"],
    ["reference"],
    ["ops"],
    ["fingerprints"],
    ["nodes"],
    ["passes"],
    ["capture"],
    ["codes"],
    ["optimizer"],
    ["converting", "reports"],
    ["__init__"],
]
# Beyond the order: pairs that must stay apart, so that each can be trusted alone.
NEVER = [
    ("reference", "ops"),  # the oracle may not ask the op that it judges
    ("ops", "reference"),
    ("optimizer", "passes"),
    ("optimizer", "capture"),
    ("passes", "optimizer"),
]
# The proof reads the notes of the capture and the analysis, and the contraction axes of products, and knows how wide a
# place's streams are. It does not read the results of the passes.
PROOF = {"formats", "nodes", "random", "recipe", "passes.captured", "passes.facts", "passes.fit"}
OUTSIDE = {"torch", "tabulate", *sys.stdlib_module_names}

RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def modules():
    """Every module of the package as (layer, path); a folder is one layer."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).with_suffix("").parts[0], path


def imports(path):
    """Absolute dotted names that the module imports, those inside functions too.

    ``from . import a`` gives swalp_fx.a; ``from .a import b`` gives swalp_fx.a.b.
    """
    inside = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                above = inside[: len(inside) - (node.level - 1)]
                base = ".".join(filter(None, ["swalp_fx", *above, node.module]))
            else:
                base = node.module
            yield from (f"{base}.{alias.name}" for alias in node.names)


def layers_imported(path):
    for name in imports(path):
        root, _, rest = name.partition(".")
        if root == "swalp_fx":
            yield rest.partition(".")[0]


def string_constants(path):
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@pytest.mark.parametrize("layer, path", [pytest.param(*m, id=str(m[1].relative_to(PACKAGE))) for m in modules()])
def test_imports(layer, path):
    assert layer in RANK, f"{path.name} is in no layer; give it a place in LAYERS"
    for name in imports(path):
        root = name.partition(".")[0]
        assert root == "swalp_fx" or root in OUTSIDE, f"{path.name} imports {name}; only torch and tabulate may be"
    for other in layers_imported(path):
        if other == layer or other in ("_C", "_C_cuda"):
            continue
        assert other in RANK, f"{path.name} imports {other} from the package itself; name the module it lives in"
        assert RANK[other] < RANK[layer], f"{path.name} ({layer}) imports {other}, which comes after it"
        assert (layer, other) not in NEVER, f"{path.name} must not import {other}"


def test_compiled_modules_are_named_by_ops_alone():
    names = {"_C", "_C_cuda", "swalp_fx._C", "swalp_fx._C_cuda"}
    users = {layer for layer, path in modules() if names & {*string_constants(path), *layers_imported(path)}}
    assert users == {"ops"}


def test_every_layer_is_there():
    assert {layer for layer, _ in modules()} == set(RANK)


def test_the_proof_shares_nothing_with_the_passes():
    proof = [*(PACKAGE / "passes" / "proof").glob("*.py")]
    names = {name for path in proof for name in imports(path) if name.startswith("swalp_fx.")}
    modules = {re.match(r"swalp_fx\.(passes\.\w+|\w+)", name)[1] for name in names}
    assert modules - {"passes.proof"} == PROOF
    assert not {"swalp_fx.part", "swalp_fx.name", "swalp_fx.site"} & set().union(*map(string_constants, proof))


def test_each_rule_of_the_proof_is_required_somewhere():
    tree = ast.parse((PACKAGE / "passes" / "proof" / "verifier.py").read_text())
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require"
    ]
    named = {call.args[0].id if isinstance(call.args[0], ast.Name) else call.args[0].value for call in calls}
    assert named - {"rule"} | {2, 3} == set(RULES)  # the one name is of rules 2 and 3
