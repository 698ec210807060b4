"""The rewrite of a captured graph: expand, analyse, classify, assign, insert, elide, reuse, verify."""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from torch.fx import Graph, GraphModule, Node

from .. import nodes
from ..formats import FLOAT
from ..recipe import Quantizer, Recipe
from .analyse import analyse
from .assign import assign
from .captured import ARGUMENT, HOLDS, LATER, Scope
from .classify import OUT, classify
from .elide import elide
from .expand import expand
from .facts import Origin, facts
from .fit import of_parameter
from .hooks import give_weights_to_layers
from .insert import insert
from .names import NAME, PART, originals, parameter_subjects
from .operations import operands_of
from .origin import ORIGIN
from .proof import verify
from .recurrent import expand_recurrent, prepare_step
from .reuse import reuse

__all__ = [
    "analyse",
    "assign",
    "classify",
    "elide",
    "expand",
    "insert",
    "recipes_of_parameters",
    "reuse",
    "rewrite",
    "verify",
]


def rewrite(graph: Graph, recipe: Recipe, scope: Scope, *, keyed: bool = True, identity: bool = False) -> Graph:
    """The rewrite of a captured ``graph``: every number that ``recipe`` names is quantized.

    The graphs that it runs (bodies) are rewritten in place.

    keyed: whether the first input is the random key; without a key, stochastic rounds to nearest.
    identity: inserts nodes for roles in ``float`` too.
    """
    give_weights_to_layers(graph)
    twins = not scope.returns and not recipe.quantize_logits  # another graph reads its outputs, and the caller may too
    classify(analyse(expand(expand_recurrent(graph, recipe, scope.bodies, twins=twins), recipe)))
    for node in graph.nodes:
        if node.meta[PART] == "nested":
            _rewrite_body(node, recipe, scope, identity)
    assign(graph, recipe, scope, identity=identity)
    new = insert(graph, keyed=keyed)
    if recipe.in_place:
        reuse(elide(new))
    return verify(new, graph, recipe, scope, keyed=keyed, identity=identity)


def _rewrite_body(call: Node, recipe: Recipe, scope: Scope, identity: bool) -> None:
    """Rewrites the graph that ``call`` runs. Its inputs are the key and the operands of ``call``."""
    leaves = all(user.meta[PART] in OUT for user in call.users)
    body: GraphModule = scope.bodies[str(call.args[0].target)]  # type: ignore[union-attr]
    for placeholder, operand in zip(body.graph.find_nodes(op="placeholder"), operands_of(call), strict=True):
        given = operand if isinstance(operand, Node) else placeholder
        part = given.meta.get(PART, "number")
        placeholder.meta[HOLDS] = part if part in ("parameter", "state", "number") else "operand"
        placeholder.meta[LATER] = True  # for the graph around the body
        placeholder.meta[ARGUMENT] = given.meta.get(NAME, given.name)
        placeholder.meta[ORIGIN] = facts(given).origin if isinstance(operand, Node) else Origin.CONSTANT
    if call.target is nodes.recurrent:
        prepare_step(call, body.graph)  # which says of each output whether it leaves
    is_loop = call.target is nodes.recurrent
    inner = replace(scope, returns=is_loop or (scope.returns and leaves), bodies=dict(body.named_children()))
    body.graph = rewrite(body.graph, recipe, inner, identity=identity)


def recipes_of_parameters(model: nn.Module, recipe: Recipe) -> dict[str, Recipe]:
    """First name -> the recipe of each parameter, its rule applied.

    The parameters that a parametrization derives a weight from are no weights: the graph rounds the derived weight, and
    the optimizer does not round them.
    """
    parameters = dict(model.named_parameters())
    subjects = parameter_subjects(model)
    recipes = {name: of_parameter(recipe, each, parameters[name].dim()) for name, each in subjects.items()}
    floats = dict.fromkeys(originals(model), Quantizer(FLOAT))
    return {name: replace(each, weight=floats.get(name, each.weight)) for name, each in recipes.items()}
