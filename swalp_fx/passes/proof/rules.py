"""The numbered rules of a rewritten graph."""

from __future__ import annotations

from torch.fx import Node

__all__ = ["RULES", "VerifyError", "require"]

# Each goes on from "a rewritten graph is right if".
RULES = {
    1: "without its key and its quantize nodes it is the captured graph, node for node, argument for argument",
    2: "every floating parameter is read through one quantize node, the same for all its readers; a weight that a "
    "parametrization derives is, and the parameters behind it are not",
    3: "every output that the placement names is read through one quantize node, and so is the new value of a buffer; "
    "only a return reads it bare, unless the recipe rounds returns",
    4: "nothing else is quantized: no movement, size, buffer or quantized tensor, and an input only by the recipe",
    5: "formats and roundings are the recipe's at that place, rules applied, and a role in float has no node",
    6: "no two nodes share a stream, in the graphs that it runs too, and all draw from its first input, the key",
    7: "an output that is rounded in place has memory of its own that nothing else reads, autograd included; an error "
    "signal likewise; and the recipe allows it",
    8: "no mode (autocast, gradients, inference) is switched between an output and its quantize node",
    9: "an activation that is kept has all its numbers from a tensor rounded to that format, and nothing writes into "
    "it; an error signal likewise; and the recipe allows it",
    10: "attention, or a recurrent layer, is one call only where the recipe rounds nothing inside of it",
    11: "a constant is made of no parameter and no floating input; only a softmax reads a mask, only sin and cos an "
    "angle; a norm that is one operation holds no product",
    12: "whoever reads a tensor reads all that was written into its memory before, under any name; only for that a "
    "return may read a number rounded, or a layer read it bare",
}


class VerifyError(AssertionError):
    """A rewritten graph that breaks a rule: a defect of the passes, not of the model."""


def require(rule: int, ok: bool, node: Node | None, complaint: str) -> None:
    """Raises VerifyError unless ``ok``. complaint: the fault of ``node``, in words that follow "it"."""
    if not ok:
        raise VerifyError(
            f"the rewritten graph is wrong at node {node}: it {complaint}; please report this model. "
            f"Rule {rule}: a rewritten graph is right if {RULES[rule]}"
        )
