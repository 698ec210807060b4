"""The proof's own reading of a node: its function's name, its writes, and the types of its module."""

from __future__ import annotations

import contextlib
import inspect
import re
from typing import Any

from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Node
from torch.utils import _pytree as pytree

from ..captured import INTO, TYPE
from ..facts import FACTS

__all__ = ["argument", "called", "does", "is_own_code", "reads_sizes", "types_around", "written_by"]

# add_ and _foreach_add_; iadd, and the method __iadd__
WRITES = re.compile(
    r"[a-z0-9_]*[a-z0-9]_|(?:__)?(?:i(?:add|sub|mul|truediv|floordiv|mod|pow|and|or|xor)|setitem)(?:__)?"
)


def called(node: Node) -> str:
    """The name of the function, method or attribute that ``node`` calls."""
    if node.target is getattr:
        return str(node.args[1])
    if isinstance(node.target, OpOverload):
        return node.target._schema.name.rpartition("::")[2].lstrip("_")
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def argument(node: Node, name: str) -> Any:
    """The argument of that name, as the signature of the function that ``node`` calls has it."""
    call: Any = node.target
    bound = inspect.signature(call).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments[name]


def does(node: Node, what: str) -> bool:
    """Whether ``what`` is among the effects of ``node`` in the table of operations."""
    return FACTS in node.meta and what in node.meta[FACTS].does


def written_by(node: Node) -> list[Node]:
    """The tensors that ``node`` writes into."""
    if not node.op.startswith("call"):
        return []
    parameters: list[str] = []
    if node.op == "call_function":
        with contextlib.suppress(TypeError, ValueError):
            parameters = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    by_place = dict(zip(parameters, node.args, strict=False))
    in_place = {**by_place, **node.kwargs}.get("inplace", False)
    written = [node.kwargs.get("out"), *(node.args[1 + i] for i in node.meta.get(INTO, ()))]  # after the body
    if in_place or WRITES.fullmatch(called(node)):
        written.append(node.args[0] if node.args else node.all_input_nodes[0])
    if isinstance(node.target, OpOverload):
        schema = node.target._schema.arguments
        written += [given for given, each in zip(node.args, schema, strict=False) if each.is_write]
        written += [node.kwargs.get(each.name) for each in schema if each.is_write]
    return [each for each in pytree.tree_leaves(written) if isinstance(each, Node)]


def reads_sizes(user: Node, node: Node) -> bool:
    """Whether ``user`` reads only the size or the type of ``node``."""
    if called(user).rstrip("_").endswith("_as"):
        return node not in user.args[:1]
    return FACTS in user.meta and user.meta[FACTS].category == "number" and not does(user, "reads")


def is_own_code(node: Node) -> bool:
    """Whether ``node`` runs code of PyTorch's own."""
    if node.op not in ("call_function", "call_method") or isinstance(node.target, HigherOrderOperator):
        return False
    is_registered = re.match(r"torch\._ops\.(?!aten$)", getattr(node.target, "__module__", None) or "")
    return not is_registered and _is_torch(node.target)


def _is_torch(thing: Any) -> bool:
    return (
        re.match(r"(torch|torchvision|_operator|builtins|math)(\.|$)", getattr(thing, "__module__", None) or "torch")
        is not None
    )


def types_around(node: Node) -> list[str]:
    """The names of the type, and of its bases, of the innermost module that ran ``node``'s code."""
    return [base.__name__ for base in getattr(node.meta.get(TYPE), "__mro__", ())]
