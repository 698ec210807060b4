"""The compiler backend: it takes a graph of PyTorch's front end, and returns a function that runs its rewrite."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from .. import nodes
from ..passes import rewrite
from ..passes.captured import Scope
from ..passes.operations import SWITCHES
from .bare import Twins, give_bare
from .conversion import Conversion, Rewritten
from .dynamo import Frame, break_reason
from .modes import held
from .prepare import Owner, copied, prepare
from .running import local
from .unfit import refuse_hooked

__all__ = ["backend", "chained"]


def backend(
    weakly: weakref.ref[Conversion],
    graph_module: GraphModule,
    inputs: Sequence[Any],
    *,
    inner: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """The function that runs in place of ``graph_module``: its rewrite, compiled by the backend ``inner`` if given.

    The garbage collector cannot see the references of the front end. So the function must not hold the model.
    """
    conversion = _held(weakly)
    refuse_hooked(conversion.root)  # by now there may be such a layer
    conversion.forget_places()  # a graph is made with the present names, however the model was changed
    frame, reason = Frame(), break_reason(graph_module)
    owner = Owner(frame, conversion.places, foreign=inner is not None)
    for name in owner.locals:
        frame.guard_identity(name)
    if owner.name is not None and conversion.recipe.quantize_input:
        frame.guard_attribute(owner.name, "_swalp", "is_entered")
    new = copied(graph_module)
    graph = prepare(new, inputs, frame, owner, conversion.places, conversion.recipe, foreign=inner is not None)
    bodies = dict(new.named_children())
    # Code that calls the model holds whole calls of it, on either side of its graph breaks.
    calls = inner is not None and not owner.is_known
    place = "" if calls else _place(frame)
    returns = calls or (reason is None and (inner is not None or (owner.is_entry and not place and not local.nested)))
    enters = not place and (inner is not None or (owner.module is not None and owner.module is local.entered))
    scope = Scope(conversion.places.subjects, place, returns, enters=enters, bodies=bodies)
    keyed = conversion.is_keyed
    rewritten = rewrite(graph, conversion.recipe, scope, keyed=keyed, identity=conversion.identity)
    entry = f"{owner.path or type(conversion.root).__name__}: {_spoken(frame, owner)}"
    twins = Twins()
    if not returns and not conversion.recipe.quantize_logits and inner is None:  # the model may still return its output
        twins = give_bare(rewritten)
    module = GraphModule(new, rewritten, "Rewritten")
    made = Rewritten(entry, graph, module, conversion.root.training, reason, path=owner.path, place=scope.place)
    conversion.graphs.add(made)
    if keyed and next(_drawing(module), None) is None:  # nothing is rounded stochastically
        _without_key(module)
        keyed = False
    run, gpu = module.forward, _gpu(module) if keyed and inner is not None else None
    if inner is not None:
        key = conversion.key(gpu) if keyed else None
        if keyed and key is None:  # a graph for another backend is for one mode; entries guard the mode
            _without_key(module)
            keyed = False
        run = inner(module, [key, *inputs] if keyed else inputs)
    return _runner(weakly, made, run, keyed, gpu, twins)


def _held(weakly: weakref.ref[Conversion]) -> Conversion:
    conversion = weakly()
    assert conversion is not None, "the model whose forward runs is gone"
    return conversion


def _drawing(module: GraphModule) -> Iterator[Node]:
    """The nodes that draw random bits from a graph's key, in checkpoints and loops too."""
    key = next(iter(module.graph.nodes))
    for user in key.users:
        if user.target in nodes.RUNS:
            yield from _drawing(getattr(module, str(user.args[0].target)))
        else:
            yield user


def _gpu(module: GraphModule) -> torch.device | None:
    """The GPU that holds every tensor that is rounded with the key, or None; the key must be on it too.

    Each run draws its key on the CPU. Another compiler may make a CUDA graph, which takes no input from the CPU.
    """
    rounded = pytree.tree_leaves([node.args[0].meta.get("example_value") for node in _drawing(module)])  # type: ignore[union-attr]
    devices = {each.device for each in rounded if isinstance(each, Tensor)}
    return next((each for each in devices if each.type == "cuda" and len(devices) == 1), None)


def _without_key(module: GraphModule) -> None:
    key = next(iter(module.graph.nodes))
    key.replace_all_uses_with(None)
    module.graph.erase_node(key)
    module.recompile()


def chained(
    weakly: weakref.ref[Conversion],
    theirs: Callable[..., Any],
    graph_module: GraphModule,
    inputs: Sequence[Any],
    **options: Any,
) -> Callable[..., Any]:
    """The backend of another torch.compile around a converted model, with our rewrite in front of it."""
    return backend(weakly, graph_module, inputs, inner=functools.partial(theirs, **options))


def _spoken(frame: Frame, owner: Owner) -> str:
    """The name of a frame's function; of an entry, without its number."""
    name = frame.original_code.co_name
    return name.rpartition("_")[0] if owner.is_entry else name


def _place(frame: Frame) -> str:
    """The place of the break if the frame goes on after a graph break, else "". It tells frames of a module apart."""
    name = frame.code.co_name
    return name.rpartition("_at_")[2] if name.startswith("torch_dynamo_resume_in_") else ""


def _runner(
    weakly: weakref.ref[Conversion],
    made: Rewritten,
    run: Callable[..., Any],
    keyed: bool,
    gpu: torch.device | None,
    twins: Twins,
) -> Callable[..., Any]:
    """The function that the front end's code calls. ``gpu``: the key must be on it; ``twins``: see ``give_bare``."""
    switches = any(node.target in SWITCHES for node in made.graph.nodes)

    def runner(*args: Any) -> Any:
        if (gaps := local.gaps) is not None and not gaps.is_inside:
            with gaps.inside():
                return runner(*args)
        made.calls += 1
        local.ran = True
        if twins.inputs:
            args = (*args, *(local.bare.of(args[i]) for i in twins.inputs))
        if keyed:
            args = (_held(weakly).key(gpu), *args)
        given = run(*args) if local.watch is None else local.watch(made, args)
        return local.bare.keep(given, twins.outputs) if twins.outputs else given

    if not switches:
        return runner

    def switching(*args: Any) -> Any:
        with held():
            return runner(*args)

    return switching
