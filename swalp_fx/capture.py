"""Capture: a model's torch.fx graph, one that is live in train and in eval mode, the model itself left as it was."""

from __future__ import annotations

import contextlib
import inspect
import operator
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from traceback import StackSummary
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node, Proxy, Tracer
from torch.fx.node import Argument
from torch.fx.proxy import TraceError
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree as pytree

from . import modes
from .modes import recorded, replaced
from .snapshot import untouched

__all__ = ["ROOT", "UNPACK", "CaptureError", "Captured", "ConvertError", "LiveTracer", "capture", "refuse_unfit"]

# The attribute by which the graph of a bare layer calls the layer, which is the graph's own root.
ROOT = "_root"

UNPACK = "unpack what convert returns: lp, swalp = swalp_fx.convert(...)"


class ConvertError(ValueError):
    """A model that cannot be rewritten. The message names the module, the reason and the remedy."""


class CaptureError(ConvertError):
    """A module whose forward torch.fx cannot trace; those inside it may be traceable."""


@dataclass(frozen=True)
class Captured:
    """What ``capture`` returns."""

    graph: Graph
    constants: dict[str, torch.Tensor]  # tensors the graph reads that are no parameter or buffer, by attribute name
    # Modules that branch on their training flag -> the flag whose branch the graph holds.
    flags: dict[str, bool] = field(default_factory=dict)
    bare: bool = False  # the model is one layer: the graph calls the root itself, with its hooks


def capture(model: nn.Module, leaves: Sequence[type[nn.Module]] = (), *, training: bool | None = None) -> Captured:
    """The graph of ``model.forward``, following train and eval mode; the model is left exactly as it was.

    ``leaves`` are module types to call as they are rather than to trace through, beside torch.nn's own layers. Each
    node holds its nn_module_stack and stack_trace. A bare layer gives a graph of one call, of the module "". Where a
    module branches on its training flag, the graph holds the branch of ``training``, or of the flag as it is if None.

    Modes that forward switches (autocast, gradients, inference) are switched by nodes, custom autograd functions are
    called whole, and a buffer that is set is set by the graph: ``setattr(module, "buffer", value)``.

    Raises ConvertError, naming the module, the reason and the remedy, for what is no float model, and CaptureError for
    a forward that cannot be traced.
    """
    tracer = LiveTracer(leaves)
    refuse_unfit(model)
    if tracer.is_leaf_module(model, ""):
        return Captured(_one_call(model), {}, bare=True)
    with untouched(model) as snapshot:
        tracer.live_flags(model, training)
        state = _random_state()
        try:
            with recorded(tracer), tracer.recording():
                graph = tracer.trace(model)
            if _random_state() != state:
                raise TraceError(RANDOM)
            for path, name in snapshot.changes():
                raise CaptureError(tracer.sentence(path, KEPT.format(name)))
            for path, name in _parameters_written(graph, model):
                raise CaptureError(tracer.sentence(path, WRITTEN.format(name)))
        except ConvertError:
            raise
        except Exception as error:  # tracing runs the user's code, which may raise anything
            raise CaptureError(tracer.explain(error)) from error
        targets = {node.target for node in graph.find_nodes(op="get_attr")}
        constants = {
            name: value for name, value in vars(model).items() if name in targets and isinstance(value, torch.Tensor)
        }
    _read_after_writes(graph, model)
    if not tracer.flag.users:
        graph.erase_node(tracer.flag)
    return Captured(graph, constants, tracer.flags)


_HOOKED = {WeightNorm: "weight_norm", SpectralNorm: "spectral_norm"}

BRANCH = "it branches on a tensor's value or shape, which a graph cannot hold"
LOOP = "it loops over a tensor, or over sizes, that are known only when it runs"
RANDOM = "it draws random numbers without reading its input, which would be drawn once and then kept"
HANDED = "it hands code to the autograd function {}, where no graph sees it"
KEPT = "it changes its attribute {}, which a graph does not keep, unless it sets a buffer to a tensor that it computes"
WRITTEN = "it writes into its parameter {}, where a graph reads a rounded copy"


_TORCH = Path(torch.__file__).parent
_PATHS = ("fx", "nn", "amp", "autograd", "utils", "_jit_internal.py", "overrides.py")
MACHINERY = (__file__, modes.__file__, *(str(_TORCH / path) for path in _PATHS))


class LiveTracer(Tracer):
    """torch.fx's tracer, but faithful to training.

    A module's training flag is read when the graph runs, not when it is traced; so are buffers. ``x += y`` and
    ``x[i] = y`` stay in place. A branch on a flag is taken at once, and the flag noted in ``flags``.
    """

    record_stack_traces = True
    proxy_buffer_attributes = True

    def __init__(self, leaves: Sequence[type[nn.Module]] = ()) -> None:
        super().__init__()
        self.leaves = tuple(leaves)
        self.flags: dict[str, bool] = {}
        self.flag: Node  # the root's training flag

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # torchvision's own layers branch on their flag (StochasticDepth) or on shapes (RoIAlign); its blocks have
        # children, and are traced through.
        is_torchvision_layer = type(m).__module__.startswith("torchvision.ops") and not any(True for _ in m.children())
        if isinstance(m, (*self.leaves, ParametrizationList)):
            return True
        # A layer whose weight is derived is traced through, so that what it computes with is seen.
        is_layer = is_torchvision_layer or super().is_leaf_module(m, module_qualified_name)
        return is_layer and not any(is_parametrized(each) for each in m.modules())

    def live_flags(self, root: nn.Module, training: bool | None) -> None:
        """Puts a proxy in place of every training flag; the caller restores them."""
        for path, module in root.named_modules():
            value = module.training if training is None else training
            vars(module)["training"] = _Flag(self, path, value)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """While it holds, buffers that are set and custom autograd functions become nodes."""
        set_attribute = nn.Module.__setattr__

        def record_buffer(module: nn.Module, name: str, value: Any) -> None:
            if not isinstance(value, Proxy) or name not in vars(module)["_buffers"]:
                return set_attribute(module, name, value)
            path = self.path_of_module(module)
            owner = self.create_proxy("get_attr", path or ROOT, (), {})
            self.create_proxy("call_function", setattr, (owner, name, value), {})
            vars(module)[name] = value  # what later reads see; the caller restores it

        def record_apply(function: type[torch.autograd.Function], *args: Any) -> Any:
            leaves = pytree.tree_leaves(args)
            if not any(isinstance(leaf, Proxy) for leaf in leaves):
                return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]
            if any(callable(leaf) and not isinstance(leaf, Proxy) for leaf in leaves):  # reentrant checkpointing
                raise TraceError(HANDED.format(function.__name__))
            return self.create_proxy("call_function", _applied(function), args, {})

        with (
            replaced(nn.Module, "__setattr__", record_buffer),
            replaced(torch.autograd.Function, "apply", classmethod(record_apply)),
        ):
            yield

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> Any:
        function, arguments = super().create_args_for_root(*args, **kwargs)
        # Behind the placeholders, which must come first, and before every use.
        self.flag = vars(self.root)["training"].node
        return function, [self._fixed_at_default(argument) for argument in arguments]

    def _fixed_at_default(self, argument: Any) -> Any:
        """The default of an optional input that forward can only branch on (None, a bool, a string): the graph holds
        the one branch, and a call with another value fails. Any other input, as it is."""
        if not isinstance(argument, Proxy) or not argument.node.args:
            return argument
        (default,) = argument.node.args
        if default is not None and not isinstance(default, (bool, str)):
            return argument
        message = f"{argument.node.target} was {default!r} when the model was traced, and cannot be anything else now"
        same = self.create_proxy(
            "call_function", operator.is_ if default is None else operator.eq, (argument, default), {}
        )
        self.create_proxy("call_function", torch._assert, (same, message), {})
        return default

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        state = _random_state()
        self.path_of_module(m)  # raises for a module that forward has made, before the stack names it
        result = super().call_module(m, forward, args, kwargs)
        if _random_state() != state:
            raise CaptureError(self.sentence(self.path_of_module(m), RANDOM))
        return result

    def proxy(self, node: Node) -> Proxy:
        return _LiveProxy(node, self)

    def to_bool(self, obj: Proxy) -> bool:
        raise TraceError(BRANCH)

    def iter(self, obj: Proxy) -> Iterator[Any]:
        raise TraceError(LOOP)

    def _filter_traceback_frames(self, user_stack_summary: StackSummary) -> StackSummary:
        # torch.fx ends each trace with its own frames and ours, and prints the last one as the line that made the node.
        frames = super()._filter_traceback_frames(user_stack_summary)
        return StackSummary.from_list([frame for frame in frames if not frame.filename.startswith(MACHINERY)])

    def explain(self, error: Exception) -> str:
        """One sentence on why the trace failed: the innermost module entered, the reason, the remedy."""
        path = next(reversed(self.module_stack.values()))[0] if self.module_stack else ""
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        if not isinstance(error, TraceError):
            reason = f"{type(error).__name__}: {reason}"
        return self.sentence(path, reason)

    def sentence(self, path: str, reason: str) -> str:
        kind = type(self.root.get_submodule(path)).__name__
        if path:
            remedy = f"call it as it is with leaves=[{kind}], or rewrite its forward"
            return f"cannot trace {path} ({kind}): {reason}; {remedy}"
        remedy = "rewrite its forward, or move that part into a module and pass its type in leaves"
        return f"cannot trace {kind}: {reason}; {remedy}"


class _Flag(Proxy):
    """A module's training flag: a node of the graph when it is an argument, a constant when it is branched on."""

    def __init__(self, tracer: LiveTracer, path: str, value: bool) -> None:
        self.tracer = tracer
        self.path, self.value = path, value
        self.read: Node | None = None

    @property
    def node(self) -> Node:  # type: ignore[override]
        if self.read is None:
            target = f"{self.path}.training" if self.path else "training"
            self.read = self.tracer.create_node("get_attr", target, (), {})
        return self.read

    def __bool__(self) -> bool:
        self.tracer.flags[self.path] = self.value  # type: ignore[attr-defined]
        return self.value


class _LiveProxy(Proxy):
    """A proxy that records writes: torch.fx's own records ``x += y`` as ``x + y`` and refuses ``x[i] = y``."""

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _record_in_place(function: Callable[..., Any]) -> Callable[[Proxy, Any], Proxy]:
    def record(self: Proxy, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


IN_PLACE_OPERATORS = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
for _name in IN_PLACE_OPERATORS:
    setattr(_LiveProxy, f"__{_name}__", _record_in_place(getattr(operator, _name)))


def _applied(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply``, as a function that goes by the name of its class, as generated code must name it."""

    def apply(*args: Any) -> Any:
        return function.apply(*args)

    apply.__name__, apply.__qualname__, apply.__module__ = function.__name__, function.__qualname__, function.__module__
    return apply


def _one_call(layer: nn.Module) -> Graph:
    """``layer(...)``, with the inputs and the defaults of its forward."""
    graph = Graph()
    arguments: list[Node] = []
    keywords: dict[str, Argument] = {}
    for name, parameter in inspect.signature(layer.forward).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise CaptureError(f"cannot trace {type(layer).__name__}: its forward takes any number of inputs")
        if parameter.default is parameter.empty:
            arguments.append(graph.placeholder(name))
        else:
            keywords[name] = graph.placeholder(name, default_value=parameter.default)
    call = graph.create_node("call_module", "", tuple(arguments), keywords, name=type(layer).__name__.lower())
    call.meta["nn_module_stack"] = {"": ("", type(layer))}
    graph.output(call)
    return graph


# Classes of torch that a model must not be or hold, by name, since torch loads some of them late -> what to do instead.
UNFIT = {
    "DataParallel": "convert the module inside it, then wrap the result",
    "DistributedDataParallel": "convert the module inside it, then wrap the result",
    "FullyShardedDataParallel": "formats round whole parameters: wrap the converted module in DistributedDataParallel",
    "FSDPModule": "formats round whole parameters: wrap the converted module in DistributedDataParallel",
    "OptimizedModule": "convert first, then torch.compile the result",
    "ScriptModule": "convert the Python module it was made from",
}


def refuse_unfit(model: nn.Module) -> None:
    """Raises ConvertError for what is no float model that can be traced at all."""
    if not isinstance(model, nn.Module):
        remedy = UNPACK if isinstance(model, tuple) else "pass a torch.nn.Module"
        raise ConvertError(f"cannot convert a {type(model).__name__}; {remedy}")
    for path, module in model.named_modules():
        which = path or "the model"
        for kind in type(module).__mro__:
            if kind.__name__ in UNFIT and kind.__module__.startswith("torch."):
                raise ConvertError(f"cannot convert {which}, which is {kind.__name__}; {UNFIT[kind.__name__]}")
        if module._compiled_call_impl is not None:
            raise ConvertError(f"cannot convert {which}, which is compiled; convert first, then compile the result")
    if isinstance(model, (nn.ModuleList, nn.ModuleDict)):
        raise ConvertError(
            f"cannot convert a bare {type(model).__name__}, which has no forward; "
            "convert the module that calls its layers"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ConvertError(f"cannot convert: parameter {name} has no shape yet; run the model on one batch first")
    for path, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if norm := next((name for kind, name in _HOOKED.items() if isinstance(hook, kind)), None):
                raise ConvertError(
                    f"{path or kind}: torch.nn.utils.{norm} derives its weight in a hook, out of sight; "
                    f"use torch.nn.utils.parametrizations.{norm}, or torch.nn.utils.remove_{norm} first"
                )


def _random_state() -> tuple[list[int], object]:
    return torch.get_rng_state().tolist(), random.getstate()


# What gives the same numbers in another form, or some of them: a write into it is a write into its source.
# fmt: off
VIEWS = (
    "getitem", "data", "detach", "view", "view_as", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "t", "T",
    "mT", "H", "mH", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "permute", "narrow", "select",
    "diagonal", "chunk", "split", "tensor_split", "unbind", "expand", "expand_as", "broadcast_to", "real", "imag",
    # These too, where there is nothing to do.
    "contiguous", "to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda", "dropout",
)
# fmt: on


def writes_in_place(node: Node, root: nn.Module) -> bool:
    """Whether ``node`` writes into its first argument and returns it: ``add_``, ``relu_``, ``ReLU(inplace=True)``."""
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    place = place_of_inplace(node.target) if node.op == "call_function" else None
    in_place = node.args[place] if place is not None and place < len(node.args) else node.kwargs.get("inplace")
    return (name.endswith("_") and not name.endswith("__")) or in_place is True


@cache
def place_of_inplace(function: Callable[..., Any]) -> int | None:
    """Where ``function`` takes ``inplace`` among its arguments, as ``relu`` of torch.nn.functional does."""
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # not written in Python
        return None
    return parameters.index("inplace") if "inplace" in parameters else None


def writes(node: Node, root: nn.Module) -> bool:
    """Whether ``node`` writes into its first argument, whatever it returns: ``x[i] = y`` and ``x += y`` too."""
    return writes_in_place(node, root) or name_of(node) in ("setitem", *IN_PLACE_OPERATORS)


def name_of(node: Node) -> str:
    """What ``node`` calls: ``conv2d``, ``add``, ``Conv2d``. Attributes count as calls: ``x.shape`` is ``shape``."""
    if node.op == "call_function":
        if node.target is getattr:
            return str(node.args[1])
        return getattr(node.target, "__name__", str(node.target))
    return str(node.target)


def module_around(node: Node) -> str:
    """The qualified name of the module whose forward ``node`` is part of; "" for the root's."""
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return stack[-1] if stack else ""


def _read_after_writes(graph: Graph, root: nn.Module) -> None:
    """After ``y = x.add_(1)``, reads of x become reads of y: the same tensor, and what is done to y reaches them."""
    for node in graph.nodes:
        if not writes_in_place(node, root) or not node.args or not isinstance(node.args[0], Node):
            continue
        written = node.args[0]
        for user in [user for user in written.users if user > node]:
            user.replace_input_with(written, node)


def _renormalised(node: Node) -> Argument:
    """The weight of a functional embedding whose max_norm makes it write into that."""
    if name_of(node) not in ("embedding", "embedding_bag"):
        return None
    names = ("input", "weight", "offsets or padding_idx", "max_norm")
    arguments = dict(zip(names, node.args, strict=False)) | node.kwargs
    return arguments.get("weight") if arguments.get("max_norm") is not None else None


def _parameters_written(graph: Graph, root: nn.Module) -> Iterator[tuple[str, str]]:
    """(qualified name of the module, parameter) of each write into a parameter or a part of one."""
    parameters = {name: None for name, _ in root.named_parameters(remove_duplicate=False)}
    for node in graph.nodes:
        written = node.args[0] if writes(node, root) and node.args else _renormalised(node)
        while isinstance(written, Node) and name_of(written) in VIEWS and written.args:
            written = written.args[0]
        if isinstance(written, Node) and written.op == "get_attr" and written.target in parameters:
            path, _, name = str(written.target).rpartition(".")
            yield path, name
