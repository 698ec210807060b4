"""Models as people use them today: exact under identity formats, on the grid and different in four bits.

Without the packages that they come from, each is skipped by name; `make zoo` installs them.
"""

import pytest
import torch
from torch.fx import Interpreter
from torch.utils import _pytree as pytree
from zoo import ZOO

from swalp_fx import check, convert, nodes, quantize
from swalp_fx.capture.running import local

# A decoder, an encoder with labels, a model of pictures, one of volumes, and one of many small graphs.
FAST = ("Llama", "BERT", "timm vision_transformer", "monai UNet", "GCN")

every_model = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in ZOO]
)


class Roundings(Interpreter):
    """Runs a rewritten graph and keeps (spec, result) of each of its roundings."""

    def __init__(self, graph_module, seen):
        super().__init__(graph_module)
        self.seen = seen

    def call_function(self, target, args, kwargs):
        result = super().call_function(target, args, kwargs)
        if target in (nodes.quantize_weight, nodes.quantize_output):
            # A copy: a reader may write into its memory.
            self.seen += [(args[3], leaf.detach().clone()) for leaf in pytree.tree_leaves(result)]
        return result


@pytest.fixture
def roundings(monkeypatch):
    """(spec, result) of every rounding that rewritten graphs do in this test."""
    seen = []
    monkeypatch.setattr(local, "watch", lambda made, inputs: Roundings(made.graph_module, seen).run(*inputs))
    return seen


def outputs(model, args, keywords):
    torch.manual_seed(0)  # dropout draws the same masks in float
    leaves = pytree.tree_leaves(model(*args, **keywords))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


@every_model
def test_identity_formats_change_no_bit(name):
    model, args, keywords = ZOO[name]()
    assert check(model, *args, **keywords)


@every_model
def test_in_four_bits_all_that_is_rounded_is_on_the_grid_and_the_outputs_are_others(name, roundings):
    model, args, keywords = ZOO[name]()
    expected = outputs(model, args, keywords)
    lp, _ = convert(model, recipe="bfp4[0] rounding=nearest")
    found = outputs(lp, args, keywords)
    assert lp is model and len(roundings) > len(list(model.children()))
    assert [spec for spec, value in roundings if not torch.equal(quantize(value, spec), value)] == []
    assert len(found) == len(expected)
    assert not any(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["Llama", "BERT"])
def test_both_attentions_of_transformers_have_the_same_bits(name):
    found = []
    for implementation in ("eager", "sdpa"):
        torch.manual_seed(0)
        model, args, keywords = ZOO[name]()
        model.set_attn_implementation(implementation)
        if "attention_mask" in keywords:  # in float, the two differ at padding
            keywords["attention_mask"] = torch.ones_like(keywords["attention_mask"])
        lp, _ = convert(model.eval(), recipe="mxfp8 rounding=nearest")
        found.append(outputs(lp, args, keywords))
    assert all(map(torch.equal, *found))
