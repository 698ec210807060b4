"""What the tests of the passes share: graphs of a model, marks on their quantize nodes, and that wrong graphs are
refused."""

import functools

import pytest
import shapes
from graphs import rewritten

from swalp_fx import Recipe, nodes
from swalp_fx.passes import insert, verify
from swalp_fx.passes.captured import Scope
from swalp_fx.passes.elide import elide
from swalp_fx.passes.names import parameter_subjects
from swalp_fx.passes.reuse import reuse
from swalp_fx.passes.verify import VerifyError


@functools.cache
def traced(kind, recipe):
    """The one graph of a model of this kind; not to be written to."""
    model, inputs = shapes.made(kind)
    return model, rewritten(model, recipe, *inputs)


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
    assert complaint in str(failure.value)


def marks(graph, kind):
    """Producer -> the letters of that kind, "in_place" or "kept", of its quantize node."""
    found = graph.find_nodes(op="call_function", target=nodes.quantize_output)
    return {node.args[0].name: node.kwargs.get(kind, "") for node in found}


def marked(name, **letters):
    """What leaves the quantize node of ``name`` with these marks alone."""

    def spoil(graph):
        (node,) = [each for each in graph.nodes if each.name == f"{name}_q"]
        node.kwargs = letters

    spoil.__name__ = f"{letters} of {name}"
    return spoil


def assert_names(pattern, table, *others):
    """``pattern`` matches the names of ``table``, and of the others none."""
    for name in {*table, *others}:
        assert bool(pattern.fullmatch(name)) == (name in table), name


def rounded(graph):
    """The names of what is rounded, in order."""
    return [node.args[0].name for node in graph.find_nodes(op="call_function", target=nodes.quantize_output)]


def parse(text="bfp8[0]", **fields):
    return Recipe.parse(text, **fields)
