"""Every private name of torch that the capture uses, in one place; tests/test_dynamo.py has a test for each.

PyTorch's front end (torch._dynamo) traces a frame of Python into a torch.fx graph, guards the values that it read, and
hands the graph to a backend. torch.compile is its public form. Our backend has to look behind that: it needs the
parameter behind an input, and the module of a frame.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn
from torch._dynamo import config, optimize
from torch._dynamo.eval_frame import skip_code
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, TorchDynamoException
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.resume_execution import ContinueExecutionCache
from torch._dynamo.source import AttrSource, DictGetItemSource, LocalSource
from torch._dynamo.symbolic_convert import InliningInstructionTranslator, InstructionTranslator
from torch._dynamo.trace_rules import get_torch_obj_rule_map, torch_name_rule_map
from torch._dynamo.types import ConvertFrameReturn, FrameAction, FrameExecStrategy
from torch._dynamo.variables import (
    ConstantVariable,
    SymNodeVariable,
    TorchInGraphFunctionVariable,
    UserFunctionVariable,
)
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.lazy import LazyVariableTracker
from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable, record_nn_module_stack
from torch._inductor import config as inductor
from torch.fx import GraphModule, Node
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.nn.utils import stateless
from torch.utils import _pytree as pytree

from ..passes.captured import METHOD

__all__ = [
    "LEFT",
    "MAX_GRAPHS",
    "BackendCompilerFailed",
    "FailOnRecompileLimitHit",
    "Frame",
    "Inner",
    "TorchDynamoException",
    "assume_constant_result",
    "call_of_module",
    "compiled",
    "functional_call",
    "hooks_code",
    "innermost_backend",
    "is_functorch_active",
    "is_hooked",
    "knobs",
    "named_like",
    "original",
    "original_code",
    "skip_code",
    "straighten",
    "switched_off",
    "trace_apart",
    "trace_instead",
    "trace_into",
    "trace_number",
    "tracer_around",
]

MAX_GRAPHS = 64  # of one entry or frame; past it a call raises

# Settings for the trace of a frame, in place of the user's own for torch.compile. A hit in the cache reads none.
KNOBS: dict[str, Any] = {
    "accumulated_recompile_limit": 1 << 20,
    "fail_on_recompile_limit_hit": True,  # else the call runs in float, with a line in the log
    "suppress_errors": False,
    "optimize_ddp": False,  # else the graph is cut at DDP's buckets before a backend sees it
    "allow_rnn": True,
    "skip_nnmodule_hook_guards": False,  # else a hook registered later is ignored
    "skip_no_tensor_aliasing_guards_on_parameters": False,  # else tying after the first call is ignored
    "skip_tensor_guards_with_matching_dict_tags": False,  # the same, in torch 2.11
    "allow_unspec_int_on_nn_module": True,  # an integer attribute that counts becomes symbolic
    "specialize_float": False,
    "error_on_nested_fx_trace": True,
    "capture_scalar_outputs": True,  # else ``tensor.item()`` breaks the graph
    "prepare_freezing": False,  # else parameters are constants of the graph, and no inputs
    "install_free_tensors": False,  # the same
}

HOOKS = tuple(f"_{way}_{when}" for way in ("forward", "backward") for when in ("hooks", "pre_hooks"))
HOOKS_OF_ALL = tuple(f"_global{name}" for name in HOOKS)

assume_constant_result: Callable[[Callable[..., Any]], Callable[..., Any]] = torch._dynamo.assume_constant_result
call_of_module: Callable[..., Any] = nn.Module._call_impl
# The frame runs as Python this time. The front end does not remember that, so another compiler may still trace it.
LEFT: Any = ConvertFrameReturn(frame_exec_strategy=FrameExecStrategy(FrameAction.DEFAULT, FrameAction.DEFAULT))
functional_call: CodeType = stateless._functional_call.__code__


@contextmanager
def knobs(limit: int = MAX_GRAPHS) -> Iterator[None]:
    """A context with the settings that this torch has; limit: of the graphs of one frame's code."""
    values = {**KNOBS, "recompile_limit": limit}
    known = {name: value for name, value in values.items() if hasattr(config, name)}
    with config.patch(**known), inductor.patch(freezing=False):  # or parameters would be constants of the graph
        yield


def compiled(
    function: Callable[..., Any],
    backend: Callable[..., Any],
    around: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> Callable[..., Any]:
    """``function``, compiled: its frames go to ``backend``, and ``around`` wraps the tracing of each frame."""
    context: Any = optimize(backend)
    context.callback = around(context.callback)
    return context(function)


def named_like(function: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates as ``functools.wraps`` does, without the marks of PyTorch's front end on ``function``.

    With them, a trace would take the decorated function for ``function`` itself.
    """

    def decorate(wrapper: Callable[..., Any]) -> Callable[..., Any]:
        wraps(function)(wrapper)
        for mark in _marks(wrapper):
            delattr(wrapper, mark)
        return wrapper

    return decorate


def _marks(function: Callable[..., Any]) -> list[str]:
    """The attributes that torch.compile, torch.compiler.disable and the like have put on ``function``."""
    return [name for name in vars(function) if name.startswith("_torchdynamo")]


def trace_into(function: Callable[..., Any]) -> None:
    """From now on, traces go into ``function`` like into any code, in place of making one node of its call."""
    _set_rule(function, UserFunctionVariable)


def trace_instead(function: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the function that traces go into, from now on, in place of ``function``."""
    _set_rule(function, None)
    return torch.compiler.substitute_in_graph(function)


def trace_number(function: Callable[..., Any], name: str, stand_in: float, holds: Callable[[], bool]) -> None:
    """From now on, traces keep a call of ``function`` in their graph if its argument ``name`` comes from a tensor.

    The front end needs a number to work out the shape of the result. It would break the graph here, as it does not know
    this one. It is given ``stand_in``, so the shape must not depend on the number. ``holds`` says whether a trace does
    so: some compilers would keep the stand-in.
    """
    index = list(inspect.signature(function).parameters).index(name)

    def call_function(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(enumerate(args)) | kwargs
        key: Any = index if index in given else name
        number = given[key].realize() if key in given else None
        graph = tx.output.current_tracer.graph
        if not isinstance(number, SymNodeVariable) or number.as_proxy().node.graph is not graph or not holds():
            return None
        given[key] = ConstantVariable.create(stand_in)
        result = self.call_function(tx, [given.pop(i) for i in range(len(args))], given)
        update = Node.update_arg if key == index else Node.update_kwarg
        update(result.as_proxy().node, key, number.as_proxy().node)
        return result

    TorchInGraphFunctionVariable._get_handlers()[function] = call_function


def trace_apart(function: Callable[..., Any], reason: str, holds: Callable[[], bool]) -> None:
    """From now on, a call of a function with the code of ``function`` ends the graph, in traces where ``holds``."""
    inlining: Any = InliningInstructionTranslator
    otherwise = inlining.check_inlineable
    code, disabled = function.__code__, torch.compiler.disable(lambda: None, reason=reason)

    def check_inlineable(called: Any) -> Any:
        is_apart = isinstance(called, UserFunctionVariable) and called.get_code() is code and holds()
        return otherwise(UserFunctionVariable(disabled) if is_apart else called)

    inlining.check_inlineable = staticmethod(check_inlineable)


def _set_rule(function: Callable[..., Any], rule: Any) -> None:
    """Sets how a trace treats a call of ``function``; None: like any other function.

    The rule is set by name. Rules by object are made anew from the names, as torch.distributed.init_process_group does.
    """
    name = f"{function.__module__}.{function.__qualname__}"
    maps: Any = torch_name_rule_map
    for rules in maps:
        if rules.pop(name, None) is not None and rule is not None:
            rules[name] = rule
    get_torch_obj_rule_map.cache_clear()


def straighten(goes_straight: Callable[[Inner], bool]) -> None:
    """From now on, a trace of a module's call is a trace of its class's forward, if ``goes_straight`` says so.

    The front end does the same by itself, but not for a module with a forward in its ``__dict__``.
    """
    otherwise = UnspecializedNNModuleVariable.call_function

    @wraps(otherwise)
    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> VariableTracker:
        function = inspect.getattr_static(self.value_type, "forward", None)
        is_plain = type(function) is FunctionType and not _marks(function)
        is_plain = is_plain and self.value_type.__call__ is nn.Module.__call__
        if self.source is None or not is_plain or not goes_straight(Inner(tx, self, [*args, *kwargs.values()])):
            return otherwise(self, tx, args, kwargs)
        source = AttrSource(self.cls_source, "forward")
        install_guard(source.make_guard(GuardBuilder.CLOSURE_MATCH))
        forward = UserFunctionVariable(function, source=source)
        with record_nn_module_stack(str(id(self.value)), self.get_nn_module_stack_source(), tx, self.value):
            return forward.call_function(tx, [self, *args], kwargs)

    UnspecializedNNModuleVariable.call_function = call_function  # type: ignore[method-assign]


def original(code: CodeType) -> CodeType:
    """The user's code of a frame. If the frame goes on after a graph break, this is the code with the break."""
    meta = ContinueExecutionCache.generated_code_metadata.get(code)
    return code if meta is None else meta.code


def original_code(function: Any) -> CodeType:
    """The code of the function that ``compiled`` was given. The front end keeps graphs by code."""
    return function._torchdynamo_orig_callable.__code__


def innermost_backend(backend: Any) -> Any:
    """The backend inside the wrappers that torch.compile puts around it."""
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    return backend


def is_functorch_active() -> bool:
    """Whether the running code is inside a transform of torch.func (grad, vmap, ...)."""
    return torch._C._are_functorch_transforms_active()


def tracer_around() -> str | None:
    """The name of an older tracer of PyTorch around the running code, or None."""
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    return "torch.fx.symbolic_trace, or make_fx," if is_fx_symbolic_tracing() else None


def switched_off() -> str | None:
    """Why frames are not traced now, if a setting of the process says so."""
    if config.disable:
        return "compilation is switched off (TORCH_COMPILE_DISABLE, torch._dynamo.config.disable); switch it on"
    stance = torch._dynamo.eval_frame._stance.stance
    if stance != "default":
        return f"torch.compiler.set_stance({stance!r}) runs the original code; use the default stance"
    return None


def is_hooked(module: nn.Module) -> bool:
    """Whether hooks run before or behind the forward of ``module``."""
    return next(_hooks_of(module), None) is not None


def hooks_code(module: nn.Module) -> Iterator[CodeType]:
    """The code of the hooks that run before or behind the forward of ``module``."""
    for hook in _hooks_of(module):
        code = getattr(inspect.unwrap(hook), "__code__", None)
        if code is not None:
            yield code


def _hooks_of(module: nn.Module) -> Iterator[Callable[..., Any]]:
    for of_one, of_all in zip(HOOKS, HOOKS_OF_ALL, strict=True):
        if "forward" in of_one:
            yield from getattr(module, of_one, {}).values()
            yield from getattr(nn.modules.module, of_all).values()


class Inner:
    """A module as a trace sees it, with the changes that the trace has already made."""

    def __init__(self, tx: Any, variable: Any, given: Iterable[Any]) -> None:
        self._tx, self._variable, self._given = tx, variable, given
        self.module: nn.Module = variable.value

    def stand_in(self) -> None:
        """Notes that the rest of this frame is a method of the module, and no hook around it.

        The front end itself notes only the module that is called, for its hooks too.
        """
        stack, calls = self._tx.nn_module_stack, self._tx.num_calls
        key, source = str(id(self.module)), self._variable.source
        last = next(reversed(stack), "")
        is_noted = last.partition("@")[0] == key and (METHOD in last or not is_hooked(self.module))
        if source is None or is_noted:
            return
        name = source.name if isinstance(source.name, str) else source.name()
        call = calls.get(name, 0)
        calls[name] = call + 1
        stack[f"{key}@{METHOD}{call}"] = (name, type(self.module))

    def is_given(self, kind: type) -> bool:
        """Whether an argument of the call is of this type; guarded."""
        return any(_type_of(each.realize()) is kind for each in self._given)

    def guard(self, *attributes: str) -> None:
        """Guards an attribute of the module, by its path: the graph is used only while its value is the present one."""
        source: Any = self._variable.source
        for name in attributes:
            source = AttrSource(source, name)
        install_guard(source.make_guard(GuardBuilder.CONSTANT_MATCH))

    def guard_identity(self, *attributes: str) -> None:
        """Guards the identity of attributes: the graph is used only while each is the same object."""
        for name in attributes:
            install_guard(AttrSource(self._variable.source, name).make_guard(GuardBuilder.ID_MATCH))

    def is_set(self, attribute: str) -> bool:
        """Whether the trace has set this attribute of the module."""
        return bool(self._tx.output.side_effects.has_pending_mutation_of_attr(self._variable, attribute))

    def has_hooks(self) -> bool:
        """Whether the module has hooks, or there are hooks of all modules; guarded."""
        of_all = self._tx.output.root_tx.nn_modules_globals_vt
        lengths = [self._length(of_all, source) for source in _attributes(of_all.source, HOOKS_OF_ALL)]
        own = self._variable.source
        return any(lengths) or any(self._length(self._variable, AttrSource(own, name)) for name in HOOKS)

    def _length(self, variable: Any, source: Any) -> int:
        """The number of hooks in the attribute ``source`` of a module, or of the Python module of torch.nn."""
        install_guard(source.make_guard(GuardBuilder.SEQUENCE_LENGTH))  # of all modules, the front end does not
        name, effects = source.member, self._tx.output.side_effects
        hooks = vars(variable.value)[name]
        if hooks not in effects and not effects.has_pending_mutation_of_attr(variable, name):
            return len(hooks)  # the trace has not met the dict, so it has not changed it
        read = getattr(variable, "tp_getattro_impl", None) or variable.var_getattr
        length: int = read(self._tx, name).realize().len()
        return length


@cache
def _attributes(source: Any, names: tuple[str, ...]) -> list[Any]:
    """The sources of attributes, cached with their hash: a guard asks for it again for each module."""
    return [AttrSource(source, name) for name in names]


class Frame:
    """The frame that is being traced: its code, its locals, and the backend that will get its graph."""

    def __init__(self) -> None:
        self._tx = InstructionTranslator.current_tx()
        self._later: set[str] | None = None

    @property
    def code(self) -> CodeType:
        return self._tx.f_code

    @property
    def original_code(self) -> CodeType:
        return original(self.code)

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) of the locals that are modules, also in closures."""
        for name, value in self._tx.f_locals.items():
            module = _content(value)
            if isinstance(module, nn.Module):
                yield name, module

    @property
    def runs_call(self) -> bool:
        """Whether the frame runs the call of a module, with its hooks: an entry closes over what it calls."""
        return _content(self._tx.f_locals.get("call")) is call_of_module

    def guard_identity(self, local: str) -> None:
        """Guards the identity of a local: the graph is for this object alone, so each module gets its own."""
        names = self.code.co_varnames
        if local in names:
            source = LocalSource(local, is_input=local in names[: self.code.co_argcount])
            install_guard(source.make_guard(GuardBuilder.ID_MATCH))

    def guard_attribute(self, local: str, *attributes: str) -> None:
        """Guards an attribute of a local, by its path: the graph is used only while its value is the present one."""
        if local in self.code.co_varnames:
            source: Any = LocalSource(local, is_input=local in self.code.co_varnames[: self.code.co_argcount])
            for name in attributes:
                source = AttrSource(source, name)
            install_guard(source.make_guard(GuardBuilder.CONSTANT_MATCH))

    def is_inside(self, code: CodeType) -> bool:
        """Whether the frame that is being inlined, or one that it is inlined into, runs ``code``."""
        tx: Any = self._tx.output.current_tx
        while tx is not None and tx.f_code is not code:
            tx = getattr(tx, "parent", None)
        return tx is not None

    @property
    def is_inlining(self) -> bool:
        """Whether the running code is of a function that the frame calls, and not of the frame itself."""
        return self._tx.output.current_tx is not self._tx

    @property
    def inner(self) -> Inner:
        """The module of the method that is being inlined: its local ``self``."""
        tx = self._tx.output.current_tx
        names = tx.symbolic_locals
        given = (each for name in ("args", "kwargs") if name in names for each in _items(names[name]))
        return Inner(tx, names["self"].realize(), given)

    @property
    def backend(self) -> Any:
        return self._tx.output.compiler_fn

    @backend.setter
    def backend(self, backend: Callable[..., Any]) -> None:
        self._tx.output.compiler_fn = backend

    @property
    def is_exported(self) -> bool:
        return self._tx.output.export or torch.compiler.is_exporting()

    def given(self) -> set[int]:
        """The ids of the tensors in the arguments of an entry."""
        leaves = pytree.tree_leaves([self._tx.f_locals.get(name) for name in ("args", "kwargs")])
        return {id(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)}

    def parameter_slot(self, placeholder: Node) -> tuple[nn.Module, str] | None:
        """(module, name) of the parameter that an input replaces, as in functional_call; None if it replaces none."""
        source: Any = getattr(placeholder.meta.get("grapharg"), "source", None)
        if not isinstance(source, DictGetItemSource) or getattr(source.base, "member", "") != "_parameters":
            return None
        base: Any = source.base
        owner = self._value(base.base)
        return (owner, source.index) if isinstance(owner, nn.Module) else None

    def buffers_set(self) -> set[str]:
        """The names of the nodes that buffers are set to: ``self.mean = self.mean * 0.9 + new * 0.1``."""
        names = []
        effects = self._tx.output.side_effects
        for variable in effects.id_to_variable.values():
            source = getattr(variable, "source", None)
            if getattr(source, "member", "") == "_buffers" and effects.is_modified(variable):
                names += [_node_of(item) for item in getattr(variable, "items", {}).values()]
        return {name for name in names if name is not None}

    def returned(self) -> set[str] | None:
        """The names of the nodes that the frame returns; None if it does not return here."""
        if self._tx.current_instruction.opname != "RETURN_VALUE" or not self._tx.stack:
            return None
        return self._nodes_of([self._tx.stack[-1]])

    def read_later(self, placeholder: Node) -> bool:
        """Whether the frame returns this input, or code outside of the graph still has a name for it."""
        source: Any = getattr(placeholder.meta.get("grapharg"), "source", None)
        while source is not None and not isinstance(source, AttrSource):
            source = getattr(source, "base", None)
        if source is not None:  # an object has it
            return True
        if self._later is None:
            returned = self.returned()
            held = [*self._tx.stack, *self._tx.symbolic_locals.values()]  # behind a break
            self._later = self._nodes_of(held) if returned is None else returned
        return placeholder.name in self._later

    def _nodes_of(self, variables: Sequence[Any]) -> set[str]:
        """The names of the nodes that ``variables``, and the objects and nests in them, hold."""
        names: set[str] = set()
        seen: set[int] = set()
        attributes = self._tx.output.side_effects.store_attr_mutations
        waiting = [*variables]

        def note(variable: Any) -> None:
            if id(variable) in seen:
                return
            seen.add(id(variable))
            if (node := _node_of(variable)) is not None:
                names.add(node)
            if variable in attributes:  # an object that the frame has made
                waiting.extend(attributes[variable].values())

        while waiting:
            VariableTracker.visit(note, waiting.pop())
        return names

    def _value(self, source: Any) -> Any:
        cells: Mapping[str, Any] = self._tx.f_locals
        scope = {
            "L": {name: _content(value) for name, value in cells.items()},
            "G": self._tx.f_globals,
        }
        try:
            return eval(source.name if isinstance(source.name, str) else source.name(), scope)
        except Exception:  # the guard's expression may need more than locals and globals
            return None


def _content(local: Any) -> Any:
    """The value of a local, which may be in the cell of a closure."""
    return local.cell_contents if type(local).__name__ == "cell" else local


def _items(variable: Any) -> Iterable[Any]:
    """The items of a tuple, or the values of a dict."""
    items: Any = variable.realize().items
    return items.values() if isinstance(items, Mapping) else items


def _type_of(variable: Any) -> type | None:
    try:
        kind: type = variable.python_type()
    except NotImplementedError:
        return None
    return kind


def _node_of(variable: Any) -> str | None:
    """The name of the node that computes a variable of a trace.

    None if nothing has read the variable yet. Asking would read it, and so add an input to the graph.
    """
    variable = variable.unwrap()
    proxy = None if isinstance(variable, LazyVariableTracker) else getattr(variable, "proxy", None)
    return None if proxy is None else proxy.node.name


def break_reason(graph_module: GraphModule) -> str | None:
    """The reason of the graph break after this graph, with its line; None if the frame returns."""
    reason = getattr(graph_module, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    text = "a branch on a tensor's value" if reason.reason.startswith("generic_jump") else str(reason.reason)
    lines = [f"{each.filename}:{each.lineno}: " for each in reason.user_stack if "/swalp_fx/" not in each.filename]
    return f"{lines[-1] if lines else ''}{text}"
