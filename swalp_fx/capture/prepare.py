"""The graph of PyTorch's front end, prepared for the passes: a copy, each node with its place in the model."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn.utils.parametrize import ParametrizationList

from ..errors import ConvertError, NotRewritten
from ..passes.captured import (
    ARGUMENT,
    CALLS,
    HOLDS,
    HOOK,
    INTO,
    KEPT,
    LATER,
    LAYER,
    METHOD,
    MODULE,
    PARAMETER,
    STEPS,
    TYPE,
    UPDATE,
    Layer,
    calls_around,
    is_layer,
)
from ..passes.facts import memory_of
from ..passes.operations import CHECKPOINT, NESTED, memory_written, name_of, read_after_writes, written_parameter
from ..passes.tables import layer_part
from ..recipe import Recipe
from .dynamo import Frame, hooks_code, is_hooked

if TYPE_CHECKING:
    from .conversion import Places

__all__ = ["Owner", "copied", "prepare"]

PACKAGE = str(Path(__file__).parent)
WRITTEN = "{} writes into its parameter {}, where a graph reads a rounded copy; keep it in a buffer"
CONSTANT = (
    "parameter {} would stay in float, since the graph around the model holds it as a constant; set "
    "torch._inductor.config.freezing to False, or keep an optimizer's step out of what is compiled with the model"
)
BODY = "{} around the converted model would compute it in float, as its body is not rewritten; call the model outside"


class Owner:
    """The module that a frame's code belongs to: an entry closes over it, a method has it as its first argument."""

    def __init__(self, frame: Frame, places: Places, *, foreign: bool) -> None:
        code = frame.original_code
        is_entry = code.co_filename.startswith(PACKAGE)
        first = (*(("module",) if is_entry else ()), *code.co_varnames[: min(1, code.co_argcount)])
        self.path = ""
        self.name: str | None = None  # of the local that holds it
        self.module: nn.Module | None = None
        self.locals = []
        for name, module in frame.modules():
            if (path := places.path(module)) is not None:
                self.locals.append(name)
                # Another compiler's frame may be the caller of the model: def loss(model, x).
                if name in first and (is_entry or not foreign or _is_method(code, module)):
                    self.path, self.name, self.module = path, name, module
        self.is_entry = is_entry and self.name == "module"
        runs_call = frame.runs_call or (is_entry and code.co_name == "_call")
        self.is_hook = self.module is not None and (
            (runs_call and is_hooked(self.module)) or code in hooks_code(self.module)
        )  # whether code of the frame that is no method's is a hook's
        self.type = places.type if self.module is None else type(self.module)
        # After a graph break, a local that is not read any more is gone from the frame, even self.
        self.is_known = self.module is not None or any(_is_method(code, each) for each in places.modules())

    def inputs(self) -> Sequence[str]:
        """The names of the positional inputs of the module's forward, if the frame is its entry's."""
        if self.module is None or not self.is_entry:
            return ()
        parameters = inspect.signature(self.module.forward).parameters.values()
        return [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]


def _is_method(code: CodeType, module: nn.Module) -> bool:
    method = getattr(type(module), code.co_name, None)
    return getattr(inspect.unwrap(method), "__code__", None) is code if callable(method) else False


def copied(graph_module: GraphModule) -> GraphModule:
    """A copy, with the bodies of checkpoints: the front end goes on reading the original."""
    new = GraphModule(graph_module, copy.deepcopy(graph_module.graph), type(graph_module).__name__)
    new.meta = dict(graph_module.meta)
    for name, body in graph_module.named_children():
        if isinstance(body, GraphModule):
            setattr(new, name, copied(body))
    return new


def prepare(
    graph_module: GraphModule,
    inputs: Sequence[Any],
    frame: Frame,
    owner: Owner,
    places: Places,
    recipe: Recipe,
    *,
    foreign: bool,
) -> Graph:
    """The graph of a copy that ``copied`` made. Its nodes have HOLDS, PARAMETER, MODULE, TYPE, LAYER, HOOK and CALLS.

    foreign: another torch.compile compiles it, together with the code around the model.
    """
    graph = graph_module.graph
    given = owner.inputs()
    for node, value in zip(graph.find_nodes(op="placeholder"), inputs, strict=True):
        _prepare_input(node, value, frame, places, given)
    updates = frame.buffers_set()
    for node in graph.nodes:
        if node.name in updates:
            node.meta[UPDATE] = True
    if (returned := frame.returned()) is not None:
        for node in graph.output_node().all_input_nodes:
            node.meta[KEPT] = node.name not in returned
    _prepare_nodes(graph_module, owner, places, recipe, foreign)
    _refuse_bodies(graph_module)
    for node in graph.find_nodes(op="placeholder"):
        is_outside = all(user.meta.get(MODULE, "") is None for user in node.users)
        if is_outside and node.meta.get(PARAMETER) in places.foreigners:
            node.meta[HOLDS] = "input"
            del node.meta[PARAMETER]
    _drop_writes_of_itself(graph)
    parameters = {node: node.meta[PARAMETER] for node in graph.nodes if PARAMETER in node.meta}
    for node in graph.nodes:
        if (written := written_parameter(node, parameters)) is not None:
            path, _, own = written.rpartition(".")
            raise ConvertError(WRITTEN.format(path or "the model", own))
    return graph


def _drop_writes_of_itself(graph: Graph) -> None:
    """Drops writes of a parameter to itself: ``module.to(dtype)`` in a forward makes them if the dtype is the same."""
    for node in graph.nodes:
        if name_of(node) != "shallow_copy_data_":
            continue
        written, value = node.args
        same = value.target == "to" and value.args[0] is written and _kind(value) == _kind(written)
        if same and not node.users and list(value.users) == [node]:
            graph.erase_node(node)
            graph.erase_node(value)


def _kind(node: Node) -> tuple[Any, Any]:
    value = node.meta["example_value"]
    return value.dtype, value.device


def _prepare_input(node: Node, value: Any, frame: Frame, places: Places, given: Sequence[str]) -> None:
    # l_x_ in a method's frame; l_args_0_ and l_kwargs_mask_ in an entry's.
    name = node.name.removeprefix("l_").strip("_").removeprefix("kwargs_")
    match = re.fullmatch(r"args_(\d+)(.*)", name)
    node.meta[ARGUMENT] = given[int(match[1])] + match[2] if match and int(match[1]) < len(given) else name
    if not isinstance(value, Tensor):
        node.meta[HOLDS] = "number"
    elif (parameter := _parameter(node, value, frame, places)) is not None:
        node.meta |= {HOLDS: "parameter", PARAMETER: parameter, ARGUMENT: parameter}
    elif (buffer := places.buffer(value)) is not None:
        node.meta |= {HOLDS: "state", ARGUMENT: buffer}
    else:
        node.meta[HOLDS] = "state" if "_buffers" in node.name else "input"
        node.meta[LATER] = frame.read_later(node)


def _parameter(node: Node, value: Tensor, frame: Frame, places: Places) -> str | None:
    """The first name of the parameter that an input is, or that it replaces, as in functional_call; else None."""
    name = places.parameter(value)
    if name is not None and (places.loose_name(value) is None or id(value) not in frame.given()):
        return name
    slot = frame.parameter_slot(node)
    if slot is None:
        return None
    if (path := places.path(slot[0])) is None:
        return places.foreign(re.sub(r"_+(modules|parameters)_", ".", node.meta[ARGUMENT]), slot[0])
    own = slot[0]._parameters.get(slot[1])
    return (places.parameter(own) if own is not None else None) or ".".join(filter(None, (path, slot[1])))


def _prepare_nodes(graph_module: GraphModule, owner: Owner, places: Places, recipe: Recipe, foreign: bool) -> None:
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            value = getattr(graph_module, str(node.target), None)
            node.meta[HOLDS] = "body" if isinstance(value, GraphModule) else "state"
            parameter = places.parameter(value) if isinstance(value, Tensor) else None
            if parameter is not None and recipe.at(*places.subjects[parameter]).weight.rounds:
                raise NotRewritten(CONSTANT.format(parameter))
            if isinstance(value, GraphModule):
                _prepare_nodes(value, owner, places, recipe, foreign)
        elif node.op.startswith("call"):
            around = [
                _Around(call, *known, is_hook=METHOD not in key and is_hooked(known[1]))
                for call, key in calls_around(node)
                if (known := places.module(key)) is not None
            ]
            node.meta[MODULE] = around[-1].path if around else None if foreign and not owner.is_known else owner.path
            if node.meta[MODULE] is not None:
                node.meta[TYPE] = _type_around(node, owner)
            if node.target is CHECKPOINT:
                node.meta[INTO] = _operands_written(getattr(graph_module, str(node.args[0].target)).graph)
            if owner.module is not None:
                around = [_Around("", owner.path, owner.module, owner.is_hook), *around]
            _prepare_calls(node, around, recipe)
    read_after_writes(graph_module.graph)


def _operands_written(body: Graph) -> list[int]:
    """The positions of the inputs of ``body`` that it writes into."""
    memory = memory_written(*body.nodes)
    return [i for i, node in enumerate(body.find_nodes(op="placeholder")) if memory & memory_of(node)]


class _Around(NamedTuple):
    """A module around a node."""

    call: str  # unique for each call; "" for the owner of the frame
    path: str
    module: nn.Module
    is_hook: bool  # whether a hook of the module ran the node's code, and not its forward


def _type_around(node: Node, owner: Owner) -> type:
    """The type of the innermost module that ran ``node``'s code; of the frame's owner behind a graph break."""
    types = [each for _, each in (node.meta.get("nn_module_stack") or {}).values() if isinstance(each, type)]
    return types[-1] if types else owner.type


def _refuse_bodies(graph_module: GraphModule) -> None:
    """Raises NotRewritten if code around the model calls it in a body that is not rewritten, as a branch of cond is."""
    for node in graph_module.graph.nodes:
        names = [str(each.target) for each in node.all_input_nodes if each.meta.get(HOLDS) == "body"]
        bodies = [getattr(graph_module, name) for name in names]
        if node.target in NESTED:
            for body in bodies:
                _refuse_bodies(body)
        elif node.meta.get(MODULE, "") is None and any(map(_holds_model, bodies)):
            raise NotRewritten(BODY.format(name_of(node)))


def _holds_model(body: GraphModule) -> bool:
    """Whether a node of ``body``, or of a body in it, is code of the model."""
    graphs = (each.graph for each in body.modules() if isinstance(each, GraphModule))
    return any(node.meta.get(MODULE) is not None for graph in graphs for node in graph.nodes)


def _prepare_calls(node: Node, around: Sequence[_Around], recipe: Recipe) -> None:
    """Notes LAYER, HOOK and CALLS; around: the modules around ``node``, outermost first."""
    calls = []
    for call, path, module, is_hook in around:
        if is_hook:
            node.meta[HOOK] = path
            continue
        whole = recipe.is_whole(path)
        # In a layer's own frame, its nodes have no other calls around them.
        if whole or (whole is None and is_layer(module) and (call or len(around) == 1)):
            # A parametrization may carry vectors from call to call, as spectral_norm does: they are no weights.
            derives = isinstance(module, ParametrizationList)
            part = "parameter" if derives else layer_part(type(module))
            node.meta[LAYER] = Layer("" if derives else call, path, type(module), part)
            break
        if whole is None:
            calls.append(Layer(call, path, type(module)))
    node.meta[CALLS] = tuple(calls)
    node.meta[STEPS] = bool(around) and recipe.is_whole(around[-1].path) is False
