"""Shared by the tests of the passes: graphs of a model, marks on quantize nodes, and the refusal of wrong graphs."""

import copy
import functools
import re

import pytest
import shapes
import torch
from graphs import converted, rewritten
from torch import nn

from swalp_fx import Recipe, nodes
from swalp_fx.passes import insert, rewrite, verify
from swalp_fx.passes.assign import SITE
from swalp_fx.passes.captured import MODULE, Scope
from swalp_fx.passes.elide import elide
from swalp_fx.passes.names import NAME, PART, parameter_subjects, place
from swalp_fx.passes.proof import VerifyError
from swalp_fx.passes.reuse import reuse


@functools.cache
def traced(kind, recipe):
    """The one graph of a model of this kind; not to be written to."""
    model, inputs = shapes.made(kind)
    return model, rewritten(model, recipe, *inputs)


class Branches(nn.Module):
    """Cases side by side, each on an input of its own: one trace for all."""

    def __init__(self, cases):
        super().__init__()
        self.cases = nn.ModuleList(cases)

    def forward(self, *inputs):
        return [case(x) for case, x in zip(self.cases, inputs, strict=True)]


def captured(cases, size):
    """(model, the captured graph of these cases), as the capture made it."""
    torch.manual_seed(0)
    model = Branches(cases).requires_grad_(False)  # which functions with out= want
    low = converted(model, "float")
    low(*(torch.randn(size) for _ in cases))
    (made,) = low.graphs
    return model, made.captured


def letters_of(model, graph, recipe, kind):
    """For each case the letters of its quantize nodes, in order, where ``recipe`` rewrites this captured graph."""
    found = [[] for _ in model.cases]
    for node in rewritten_again(model, graph, recipe).nodes:
        if node.target is nodes.quantize_output:
            found[int(node.meta[MODULE].split(".")[1])].append(node.kwargs.get(kind, ""))
    return found


def rewritten_again(model, graph, recipe):
    """The rewrite of a captured graph by ``recipe``, without another trace."""
    graph = copy.deepcopy(graph)
    for node in graph.nodes:
        node.meta = {key: value for key, value in node.meta.items() if key not in (PART, NAME, SITE)}
    return rewrite(graph, recipe, Scope(parameter_subjects(model)))


def rewritten_by(kind, recipe):
    """The rewrite of a model of this kind by ``recipe``."""
    model, made = traced(kind, Recipe())
    return rewritten_again(model, made.captured, recipe)


class Traced:
    """A graph of its own of a model of this kind, to be spoilt; ``proved`` says whether it is right."""

    def __init__(self, kind, recipe):
        self.model, made = traced(kind, recipe)
        self.recipe, self.captured = recipe, made.captured
        self.bodies = dict(made.graph_module.named_children())
        self.graph = insert(self.captured, keyed=True)
        if recipe.in_place:
            reuse(elide(self.graph))

    def proved(self, recipe=None):
        """The graph; raises VerifyError if it is wrong."""
        scope = Scope(parameter_subjects(self.model), bodies=self.bodies)
        return verify(self.graph, self.captured, recipe or self.recipe, scope)


def assert_refused(kind, recipe, spoil, complaint):
    """The graph of a model of this kind is proved, and spoilt it is not."""
    made = Traced(kind, recipe)
    made.proved()
    spoil(made.graph)
    with pytest.raises(VerifyError) as failure:
        made.proved()
    found = str(failure.value)
    assert complaint in found or re.search(complaint, found), found


def marks(graph, kind):
    """Producer -> the letters of that kind, "in_place" or "kept", of its quantize node."""
    found = graph.find_nodes(op="call_function", target=nodes.quantize_output)
    return {node.args[0].name: node.kwargs.get(kind, "") for node in found}


def marked(name, **letters):
    """An edit that leaves only these marks on the quantize node of ``name``."""

    def spoil(graph):
        (node,) = [each for each in graph.nodes if each.name == f"{name}_q"]
        node.kwargs = letters

    spoil.__name__ = f"{letters} of {name}"
    return spoil


def rounded(graph):
    """The places that are rounded, in order."""
    return [place(node.args[0]) for node in graph.find_nodes(op="call_function", target=nodes.quantize_output)]
