"""What the tests of marks on quantize nodes share: reading them, setting them, and that a wrong one is refused."""

import pytest
import shapes

from swalp_fx import nodes
from swalp_fx.passes import rewrite
from swalp_fx.passes.verify import VerifyError, verify


def marks(module, kind):
    """Producer -> the letters of that kind, "in_place" or "kept", of its quantize node."""
    found = module.graph.find_nodes(op="call_function", target=nodes.quantize_output)
    return {node.args[0].name: node.kwargs.get(kind, "") for node in found}


def marked(name, **letters):
    """What leaves the quantize node of ``name`` with these marks alone."""

    def spoil(module):
        (node,) = [each for each in module.graph.nodes if each.name == f"{name}_q"]
        node.kwargs = letters

    spoil.__name__ = f"{letters} of {name}"
    return spoil


def proved(module, recipe):
    """Whether ``module`` is right; raises VerifyError if not."""
    return verify(module.graph, module._present.captured.graph, module._root, recipe)


def assert_refused(kind, recipe, spoil, complaint):
    """A rewritten model of this kind is proved, and spoilt it is not."""
    model, _ = shapes.made(kind)
    module = rewrite(model, recipe)
    proved(module, recipe)
    spoil(module)
    with pytest.raises(VerifyError) as failure:
        proved(module, recipe)
    assert complaint in str(failure.value)


def assert_names(pattern, table, *others):
    """``pattern`` matches the names of ``table``, and of the others none."""
    for name in {*table, *others}:
        assert bool(pattern.fullmatch(name)) == (name in table), name


def hooked(layer, register):
    getattr(layer, register)(lambda *_: None)
    return layer
