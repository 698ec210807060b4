"""The optimizer pass: every step of the user's own optimizer becomes a low-precision step.

Algorithm 2 of the SWALP paper, in the order of its authors' code:

    gradients    <- Q_G(gradients)       before the update, after accumulation and all-reduce
    update of the masters, or of the weights themselves if the recipe has no master
    masters      <- Q_master(masters)
    weights      <- Q_W(masters)
    states       <- Q_M(momentum)        means of gradients; second moments by V, and any state
                                         that the recipe names by its own quantizer

The pass runs in the optimizer's step hooks, so the optimizer keeps its type, its schedulers and its
state_dict. For the optimizers of kernels.py, on the CPU, the whole step is one pass over memory.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed import ProcessGroup
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from .. import fingerprints
from ..codes import packed_state, unpacked_state
from ..formats import FLOAT, Format
from ..ops import quantize_foreach_
from ..random import ROLES, fold_in, is_captured, parameter_stream, stream_of
from ..recipe import Quantizer, Recipe
from ..warn import warn
from ..whole import SHARDED, class_of_torch, unwhole
from .averaging import Average, mean_dtype
from .interrupts import uninterrupted
from .lost import length_of, loses_updates
from .moments import ends_in
from .one_pass import in_one_pass
from .ranks import agreed_seed
from .recalibration import recalibrate
from .saved import SWA, VERSION, read
from .scaling import scale_of, scaler_of, skip
from .states import is_known, quantizer_of, refuse_misnamed, states_of
from .twin import Loading, Twin, idle, is_half, kept_elsewhere, narrow_states

__all__ = ["SWALP"]

IN_AVERAGED = "inside `with swalp.averaged()` would use the averaged weights; do it outside"

# Compiled, the number of a step would be a symbol, and its key be computed in 64 bits that are too few.
_AS_PYTHON = torch.compiler.disable(reason="swalp_fx rounds a step between graphs; leave out fullgraph=True")


@dataclass
class _Step:
    """One step in progress, from its outermost pre-hook to the matching post-hook.

    An exception in between leaves no step: weights and masters are as before, and states as the optimizer left them. Or
    it leaves a whole one, in one pass.
    """

    calls: list[FrameType]  # calls between pre-hook and post-hook, the outermost first
    key: Tensor  # int64, shape []
    parameters: list[tuple[int, nn.Parameter]]  # (index in the model, parameter) that it updates
    ready: bool = False  # gradients rounded, masters in the place of the weights
    # Parameters that one pass has already stepped, with their gradients, by id. The gradients are hidden from the
    # optimizer until its own step is over.
    done: dict[int, tuple[nn.Parameter, Tensor]] = field(default_factory=dict)
    twin: Twin | None = None  # of the optimizer, which steps copies of the masters
    scaler: GradScaler | None = None  # the caller of the step
    scale: float = 1.0  # of the loss; the gradients are divided by it already
    overflows: bool = False  # a GradScaler found the gradients finite, and rounding made infinities: no step

    def is_running(self) -> bool:
        """Whether its outermost call goes on. Drops calls that raised and so never reached their post-hook."""
        self.calls = [call for call in self.calls if _is_running(call)]
        return bool(self.calls)


class SWALP:
    """Low-precision steps of an optimizer, and the higher-precision average of the weights.

    model: the float model. attach() accepts, and the average holds, its parameters alone.
        A tied parameter is one parameter, under its first name.
    recipe: a role in ``float`` is not touched.
    local: parameter name -> its recipe, if rules make it differ; every other parameter has ``recipe``. Or a function
        that returns this mapping; it is called again when the model has other parameters.
    float_copy: a deep copy of the model that computes in float.

    Random words come from key (seed, step) and stream (role, index of the parameter in the model).
    The seed is ``torch.initial_seed()`` at construction, which draws nothing. In a process group it
    is rank 0's: the ranks agree on it in their first step.

    ``copy.deepcopy`` and pickle copy the model and the attached optimizer too, and attach the copies
    to each other. An optimizer copied without its SWALP is an ordinary optimizer, because torch does
    not copy hooks.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: str | Recipe,
        local: Mapping[str, Recipe] | Callable[[], Mapping[str, Recipe]] = dict,
        float_copy: Callable[[nn.Module], nn.Module] = copy.deepcopy,
    ) -> None:
        self.model = model
        self._float_copy = float_copy
        self.recipe = recipe = Recipe.parse(recipe)
        self._local = local if callable(local) else functools.partial(dict, local)
        self._masters: dict[str, Tensor] = {}
        self._read_model()
        average = recipe.resolved().average
        self._average = Average(average.format, average.rounding or "nearest")
        #: Averages besides the paper's, by name: ``swalp.averages["ema"] = Average(decay=0.999)``.
        self.averages: dict[str, Average] = {}
        #: The factor that the loss is multiplied by; gradients are divided by it before the step. A number, or a
        #: function that returns it. None: the scale of the GradScaler that calls the step, or 1.
        self.grad_scale: float | Callable[[], float] | None = None
        self._is_averaged = False  # the model has the weights of an average, see ``averaged``
        self._seed = torch.initial_seed()
        self._has_agreed = False  # with the other ranks on the seed
        self._group: ProcessGroup | None = None
        self._steps = 0
        self._optimizer: Optimizer | None = None
        self._handles: list[RemovableHandle] = []
        self._step: _Step | None = None
        self._twin: Twin | None = None
        self._n_groups = 0  # groups of the optimizer that the warnings have seen
        self._may_average_float = False  # update_average() has warned of float weights
        self._warned_of: set[str] = set()  # names of states without a known role

    def _read_model(self) -> None:
        """Read the model's present parameters. If a name has a new parameter, its master starts again from that."""
        before = vars(self).get("_parameters", {})
        self._parameters: dict[str, nn.Parameter] = dict(self.model.named_parameters())
        self._places = [
            (held, name, value)
            for module in self.model.modules()
            for held in (module._modules, module._parameters)
            for name, value in held.items()
        ]
        for name in before:
            if before[name] is not self._parameters.get(name):
                self._masters.pop(name, None)
        owners = {name: self.model.get_submodule(name.rpartition(".")[0]) for name in self._parameters}
        for name, owner in vars(self).get("_owners", {}).items():
            if name not in owners or owners[name] is owner:
                continue
            for each in (self._average, *self.averages.values()):
                # A new layer is none of the average, which sees one of another shape by that.
                if name in each.means and each.means[name].shape == self._parameters[name].shape:
                    del each.means[name]
        self._owners = owners
        self._names = list(self._parameters)
        local = self._local()
        recipes = [local.get(name, self.recipe).resolved() for name in self._names]
        # Equal recipes become one object, as in_one_pass needs.
        self._recipes = [recipes[recipes.index(each)] for each in recipes]
        self._index = {parameter: index for index, parameter in enumerate(self._parameters.values())}

    def _follow_model(self) -> None:
        """``_read_model``, if the model has other parameters than before: a new head, or assigned weights."""
        now = dict(self.model.named_parameters())
        if now.keys() != self._parameters.keys() or any(now[name] is not p for name, p in self._parameters.items()):
            self._read_model()

    def __repr__(self) -> str:
        optimizer = "no optimizer" if self._optimizer is None else type(self._optimizer).__name__
        average = f"average of {self.n_averaged}" if self.n_averaged else "no average yet"
        return f"SWALP({self.recipe}, attached to {optimizer}, {self._steps} steps, {average})"

    # Attaching

    def attach(self, optimizer: Optimizer, *, group: ProcessGroup | None = None) -> None:
        """Make every later ``optimizer.step()`` a low-precision step. Changes no value.

        group: the ranks that train this model, if they are not all ranks. Each of them has to step. In the first step
            they take rank 0's seed; in the first step of a loaded state they compare seeds.

        With masters, values written into the weights between two steps do not reach the masters; detach() and attach()
        start the masters again from the weights.

        Warns of a format of second moments that may let the optimizer diverge, and of updates that are lost in the
        dtype of a parameter without a master.
        Raises TypeError (not an optimizer) and ValueError: a wrapper, a second attach without detach, a parameter that
        is complex or not the model's, LBFGS, a differentiable step. Raises RecipeError for a state that the recipe
        names and the optimizer lacks.
        """
        self.refuse(optimizer)
        if _attached_to(optimizer) is not None:
            raise ValueError(
                f"{type(optimizer).__name__} is already attached to another SWALP; call that one's detach() first, "
                "or convert its model again with this optimizer, which does"
            )
        self._group = group
        self._hook(optimizer)
        self._warn_of_groups(optimizer)

    def replace(self, optimizer: Optimizer) -> None:
        """``attach``, after the ``detach`` of an earlier SWALP of the same model.

        Warns if the earlier one had another recipe, or has taken a step or an average.
        """
        self.refuse(optimizer)
        earlier = _attached_to(optimizer)
        if earlier is None or earlier.model is not self.model:
            return self.attach(optimizer)
        described = repr(earlier)
        earlier.detach()
        self._hook(optimizer)
        self._warn_of_groups(optimizer)
        if earlier.recipe != self.recipe or earlier._steps or earlier.n_averaged:
            warn(f"{described} is detached now, since its model and optimizer are converted again")

    def refuse(self, optimizer: Optimizer) -> None:
        """Raises the errors of ``attach``, and changes nothing."""
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"attach takes a torch.optim.Optimizer, not {type(optimizer).__name__}")
        name = type(optimizer).__name__
        if (kind := class_of_torch(type(optimizer), SHARDED)) is not None:
            raise ValueError(f"cannot attach to {kind}; {SHARDED[kind]}")
        if (shard := unwhole(self.model)) is not None:
            raise ValueError(f"{name} cannot train {shard}")
        inner = next((key for key, value in vars(optimizer).items() if isinstance(value, Optimizer)), None)
        if inner is not None or not hasattr(optimizer, "_optimizer_step_pre_hooks"):
            raise ValueError(
                f"{name} wraps another optimizer, which has the states; attach to its .{inner or 'optimizer'}"
            )
        if self._optimizer is not None:
            raise ValueError(f"this SWALP is already attached to {type(self._optimizer).__name__}; call detach() first")
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                "LBFGS evaluates its closure several times a step, which has no low-precision order; use SGD or Adam"
            )
        if any(group.get("differentiable") for group in optimizer.param_groups):
            raise ValueError(
                f"{name} has differentiable=True, and rounding in place has no gradient; use differentiable=False"
            )
        trained = [
            (self._names[index], parameter, self._recipes[index]) for index, parameter in self._trained(optimizer)
        ]
        refuse_misnamed(optimizer, trained)
        mastered = {parameter for _, parameter, recipe in trained if recipe.master is not None}
        if (elsewhere := kept_elsewhere(optimizer, mastered)) is not None:
            raise ValueError(
                f"{name} keeps parameters in its attribute {elsewhere!r} too, where no master can stand in for "
                "them; leave master out"
            )

    def _hook(self, optimizer: Optimizer) -> None:
        self._optimizer, self._has_agreed = optimizer, False
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        if any(recipe.master is not None for recipe in self._recipes):
            # The optimizer steps masters, so others see the weights of the step only after this hook.
            hooks: Any = optimizer._optimizer_step_post_hooks
            hooks.move_to_end(self._handles[-1].id, last=False)
            loading = Loading(self._has_master)
            self._handles += [
                optimizer.register_load_state_dict_pre_hook(loading.before),
                optimizer.register_load_state_dict_post_hook(loading.after),
            ]

    def _warn_of_groups(self, optimizer: Optimizer) -> None:
        """Warns of what ``attach`` warns of; a later step calls it again if there are more groups."""
        self._n_groups = len(optimizer.param_groups)
        self._warn_of_moments(optimizer)
        self._warn_of_lost_updates(optimizer)

    def _warn_of_moments(self, optimizer: Optimizer) -> None:
        pairs = [
            (group, self._index[p]) for group in optimizer.param_groups for p in group["params"] if p.requires_grad
        ]
        ending = [(i, name) for group, i in pairs if (name := ends_in(optimizer, group, self._recipes[i])) is not None]
        if ending:
            index, state = ending[0]
            recipe = self._recipes[index]
            others = f"and {len(ending) - 1} more " if len(ending) > 1 else ""
            word = f"state.{state}" if state in dict(recipe.states) else "V"
            warn(
                f"{type(optimizer).__name__} divides one moment by another, and may diverge with the {state} of "
                f"{self._names[index]!r} {others}in {quantizer_of(recipe, state).format}; keep it in float: "
                f"{word}=float"
            )

    def _warn_of_lost_updates(self, optimizer: Optimizer) -> None:
        lost = [
            (parameter, length)
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad
            and not self._has_master(parameter)
            and loses_updates(parameter, length := length_of(group))
        ]
        if lost:
            parameter, length = lost[0]
            name = self._names[self._index[parameter]]
            others = f"and {len(lost) - 1} more " if len(lost) > 1 else ""
            warn(
                f"an update of {length:.2g}, which is {type(optimizer).__name__}'s for a gradient of one, is lost in "
                f"most of {name!r} {others}in {parameter.dtype}; keep masters: master=float"
            )

    def detach(self) -> None:
        """Take the hooks off, if they are on; the weights stay as they are.

        The masters are dropped, so a later attach() starts from the weights of that moment. Beside a master, states of
        half-precision parameters are float32; they go back to their parameter's dtype.
        """
        if self._optimizer is None:
            return
        for handle in self._handles:
            handle.remove()
        if any(is_half(parameter) and self._has_master(parameter) for parameter in self._index):
            narrow_states(self._optimizer)
        self._optimizer, self._handles, self._twin = None, [], None
        self._masters.clear()

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_averaged("a copy of swalp")
        return self.__dict__ | {"_handles": [], "_step": None, "_twin": None, "_group": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        optimizer = state["_optimizer"]
        self.__dict__.update(state, _optimizer=None)
        if optimizer is not None:
            self._hook(optimizer)
            self._has_agreed = state["_has_agreed"]

    # The average

    @property
    def average(self) -> Average:
        """The average itself; ``swalp.average.mean()`` has its tensors by name."""
        return self._average

    @property
    def n_averaged(self) -> int:
        """How many times update_average() was called."""
        return self._average.n_averaged

    @_AS_PYTHON
    def update_average(self) -> None:
        """Add the weights of this moment to the average, and to each of ``averages``.

        Warns, once, if no low-precision step has been taken.
        """
        self._refuse_averaged("update_average()")
        if self._steps == 0 and not self._may_average_float and any(map(_steps_low, self._recipes)):
            self._may_average_float = True
            remedy = "call it after optimizer.step()" if self._optimizer else "call attach(optimizer) before training"
            warn(f"update_average() got float weights, since no low-precision step has been taken; {remedy}")
        self._refuse_misnamed_averages()
        self._follow_model()
        for name, each in self.averages.items():
            each.refuse_unfit(self._parameters, f"swalp.averages[{name!r}]")
            if each.n_averaged:
                each.refuse(self._parameters)
        quantizers = {name: recipe.average for name, recipe in zip(self._names, self._recipes, strict=True)}
        self._average.update(self._parameters, key=fold_in(self._seed, self.n_averaged), quantizers=quantizers)
        for name, each in self.averages.items():
            seed = fold_in(self._seed, stream_of("average", name))
            each.update(self._parameters, key=fold_in(seed, each.n_averaged))

    def averaged_model(
        self,
        loader: Iterable[Any] | None = None,
        format: str | Format = FLOAT,
        *,
        average: str = SWA,
        low_precision: bool = False,
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> nn.Module:
        """A copy of the float model with the averaged weights, rounded to ``format``, in the parameters' own dtype.

        loader: yields a tensor, or a tuple or list with the input first. If given, batch-norm
            statistics are taken over all of it; if not, they are copied from the model.
        average: the name of one of ``averages``; by default the paper's own average.
        low_precision: the copy computes in the recipe, as the model does, and so do its statistics.
        forward: calls the model with a batch of another kind, see ``recalibrate``.
        Raises ValueError if update_average() was never called, or if the model has other parameters than then; KeyError
            for a name that is not in ``averages``.
        """
        of_name = self._averaged(average, "averaged_model()")
        copied = copy.deepcopy if low_precision else self._float_copy
        averaged = of_name.applied_to(self.model, format, copied=copied)
        if loader is not None:
            recalibrate(averaged, loader, forward=forward)
        return averaged

    @contextlib.contextmanager
    def averaged(
        self,
        loader: Iterable[Any] | None = None,
        format: str | Format = FLOAT,
        *,
        average: str = SWA,
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> Iterator[nn.Module]:
        """A context: inside, the model itself has the averaged weights, and computes with them in the recipe.

        At its end the model has its own weights and buffers again, bit for bit. Arguments and errors are as for
        ``averaged_model``. Steps and updates of the average raise ValueError inside.
        """
        of_name = self._averaged(average, "averaged()")
        self._refuse_averaged("averaged()")
        self._follow_model()
        of_name.refuse(self._parameters)
        # A forward may set a buffer to another tensor, or to None, so each goes back to its place.
        places = [
            (module._buffers, name, buffer)
            for module in self.model.modules()
            for name, buffer in module._buffers.items()
        ]
        tensors = [*self._parameters.values(), *(buffer for _, _, buffer in places if buffer is not None)]
        before = [tensor.detach().clone() for tensor in tensors]
        stored = [(parameter, fingerprints.number_of(parameter)) for parameter in self._parameters.values()]
        self._is_averaged = True
        # Its loads too: at the end they would be lost.
        refusal = _RefusedLoad(is_on=True)
        handles = [module.register_load_state_dict_pre_hook(refusal) for module in self.model.modules()]
        try:
            of_name.write(self._parameters, format)
            if loader is not None:
                recalibrate(self.model, loader, forward=forward)
            yield self.model
        finally:
            self._is_averaged = False
            for handle in handles:
                handle.remove()
            with torch.no_grad():
                for tensor, value in zip(tensors, before, strict=True):
                    tensor.copy_(value)
            fingerprints.put(stored)
            for buffers, name, buffer in places:
                buffers[name] = buffer

    def _refuse_misnamed_averages(self) -> None:
        places = {id(self._average): "swalp.average"}
        for name, each in self.averages.items():
            here = f"swalp.averages[{name!r}]"
            if not isinstance(name, str) or name == SWA or not isinstance(each, Average):
                raise TypeError(
                    f"{here} is {each!r}; it takes a text, not empty, and an Average: "
                    'swalp.averages["ema"] = Average(decay=0.999)'
                )
            if id(each) in places:
                raise ValueError(f"{here} is {places[id(each)]} too, and would have each update twice; make another")
            places[id(each)] = here

    def _averaged(self, name: str, caller: str) -> Average:
        """The average of that name. Raises KeyError for an unknown name, ValueError before the first update."""
        if name != SWA and name not in self.averages:
            known = ", ".join(map(repr, self.averages)) or "none"
            raise KeyError(f"there is no average {name!r}; swalp.averages has {known}")
        average = self._average if name == SWA else self.averages[name]
        if average.n_averaged == 0:
            raise ValueError(f"there is no average yet; call update_average() at least once before {caller}")
        return average

    def _refuse_averaged(self, what: str) -> None:
        if self._is_averaged:
            raise ValueError(f"{what} {IN_AVERAGED}")

    # The state

    def state_dict(self) -> dict[str, Any]:
        """Counters, seed, averages, masters and fingerprints of stored weights, to resume a run.

        With the model's and the optimizer's own states, the resumed run gives the bits of a run that was not stopped.
        Tensors are references, as in the optimizer's state_dict: copy or save before the next step. Every tensor that
        a load needs is there, also before the first step and the first average.
        """
        self._follow_model()
        return {
            "version": VERSION,
            "recipe": str(self.recipe),
            "parameters": list(self._names),
            "seed": self._seed,
            "step": self._steps,
            "n_averaged": self.n_averaged,
            "average": self._average.saved_means(self._parameters),
            "averages": {
                name: {
                    "n_seen": each.n_seen,
                    "n_averaged": each.n_averaged,
                    "means": each.saved_means(self._parameters),
                    "settings": each.settings,
                }
                for name, each in self.averages.items()
            },
            "masters": {name: self._master_of(name) for name in self._mastered()},
            "fingerprints": {
                name: fingerprints.number_of(parameter)
                for (name, parameter), recipe in zip(self._parameters.items(), self._recipes, strict=True)
                if mean_dtype(parameter) is not None
                and not fingerprints.keeps_rounded(recipe.weight.format, parameter.dtype)
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a copy of ``state``, before or after the model's and the optimizer's states.

        Raises ValueError, before anything is changed, if the state is of another version, another
        recipe or another model.
        """
        self._refuse_averaged("load_state_dict()")
        self._refuse_misnamed_averages()
        self._follow_model()
        averages = {SWA: self._average, **self.averages}
        found = read(state, self.recipe, self._parameters, self._mastered(), averages)
        self._seed, self._steps, self._masters = found.seed, found.step, found.masters
        self._has_agreed = False
        fingerprints.put((self._parameters[name], number) for name, number in found.fingerprints.items())
        for average, (n_seen, n_averaged, means) in zip(averages.values(), found.averages, strict=True):
            average.n_seen, average.n_averaged, average.means = n_seen, n_averaged, means

    # Packed checkpoints

    def packed_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """module's state_dict with its weights as codes of the recipe's weight format; docs/codes.md has an example.

        module: the model, or another with the same names: a copy, the averaged model. A weight off its format's grid
            stays as it is; so are all weights before the first step.
        """
        self._follow_model()
        formats = {name: recipe.weight.format for name, recipe in zip(self._names, self._recipes, strict=True)}
        return packed_state(module, formats)

    def load_packed_state_dict(self, module: nn.Module, state: Mapping[str, Any]) -> None:
        """Load the result of ``packed_state_dict`` into ``module``, bit for bit. Errors are as for load_state_dict."""
        module.load_state_dict(unpacked_state(state))

    # One step

    @_AS_PYTHON
    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        call = _hooked_call()
        # A subclass's step() calls super().step(), which fires the hooks again: only the outermost
        # call counts. A step that raised never reached its post-hook, and must not count as running.
        if self._step is not None and self._step.is_running():
            self._step.calls.append(call)
            return None
        self._refuse_averaged(f"{type(optimizer).__name__}.step()")
        _refuse_unserved(optimizer, kwargs)
        trained = self._trained(optimizer)
        if self._n_groups != len(optimizer.param_groups):
            self._warn_of_groups(optimizer)
        self._agree(trained)
        key = torch.tensor(fold_in(self._seed, self._steps), dtype=torch.uint64).view(torch.int64)
        step = _Step([call], key, trained)
        step.scaler = scaler_of(call)
        step.scale = scale_of(self.grad_scale, step.scaler)
        closure = kwargs["closure"] if "closure" in kwargs else args[1] if len(args) > 1 else None
        if closure is None:
            self._prepare(step)
            self._step = step
            if step.scaler is not None and step.overflows:
                skip(step.scaler, optimizer)
                return (idle(optimizer), *args[1:]), kwargs
            return None if step.twin is None else ((step.twin.optimizer, *args[1:]), kwargs)
        self._step = step
        closure = self._rounding(closure, step)
        if any(self._recipes[index].master is not None for index, _ in trained):
            step.twin = self._twin_of(optimizer)
        stepper = optimizer if step.twin is None else step.twin.optimizer
        if "closure" in kwargs:
            return (stepper, *args[1:]), kwargs | {"closure": closure}
        return (stepper, closure, *args[2:]), kwargs

    def _twin_of(self, optimizer: Optimizer) -> Twin:
        self._twin = self._twin or Twin(type(optimizer))
        self._twin.follow(optimizer)
        return self._twin

    def _agree(self, trained: list[tuple[int, nn.Parameter]]) -> None:
        """Give the ranks of a process group one seed, before the first step and the first of a loaded state."""
        if not self._has_agreed and trained:
            self._seed = agreed_seed(self._seed, self._steps, trained[0][1].device, self._group)
            self._has_agreed = True

    def _rounding(self, closure: Callable[[], Any], step: _Step) -> Callable[[], Any]:
        """``closure``, followed by ``_prepare``: gradients are rounded, and masters put in place."""

        def rounding_closure() -> Any:
            if step.ready:
                raise ValueError("the optimizer evaluated its closure twice in one step; attach one that does so once")
            loss = closure()
            self._prepare(step)
            return loss

        return rounding_closure

    def _prepare(self, step: _Step) -> None:
        """Round the gradients, and let copies of the masters stand in for the weights.

        A parameter without a gradient is left alone, as the optimizer leaves it.
        """
        step.parameters = [(index, parameter) for index, parameter in step.parameters if parameter.grad is not None]
        self._refuse_sparse(step)
        with torch.no_grad():
            if step.scale == 1.0 and step.scaler is None:
                self._step_in_one_pass(step)
            gradients = self._round_gradients(step)
            step.overflows = step.scaler is not None and not all(bool(each.isfinite().all()) for each in gradients)
            if not step.overflows:
                self._put_masters(step)
        step.ready = True

    def _round_gradients(self, step: _Step) -> list[Tensor]:
        """Round the gradients in the scale of the loss; returns the gradients that may overflow.

        Their format rounds beyond its largest number to infinity or NaN.
        """
        gradients = [
            (index, p.grad)
            for index, p in step.parameters
            if p.grad is not None and self._recipes[index].gradient.rounds
        ]
        tensors = list({id(gradient): gradient for _, gradient in gradients}.values())  # two parameters may share one
        if step.scale != 1.0 and tensors:
            torch._foreach_mul_(tensors, step.scale)
        self._round(self._in_role("gradient", gradients), step)
        if step.scale != 1.0 and tensors:
            torch._foreach_div_(tensors, step.scale)
        return [each for index, each in gradients if self._recipes[index].gradient.format.overflow != "saturate"]

    def _put_masters(self, step: _Step) -> None:
        masters = {p: self._master(index) for index, p in step.parameters if self._recipes[index].master is not None}
        if not masters:
            return
        assert self._optimizer is not None
        step.twin = self._twin_of(self._optimizer)
        narrow = step.twin.put(masters)
        if narrow and self._steps:  # an optimizer that trained before the pass has such states, and nothing was lost
            parameter, state = narrow[0]
            name = self._names[self._index[parameter]]
            warn(
                f"the optimizer's state {state!r} of {name!r} was in {parameter.dtype} and goes on in float32; "
                "if float32 was saved, load the optimizer's state after convert() or attach()"
            )

    def _step_in_one_pass(self, step: _Step) -> None:
        """Step and round parameters in one pass, if there is one for this optimizer's step."""
        if self._optimizer is None:
            return
        masters = {i: self._master(i) for i, _ in step.parameters if self._recipes[i].master is not None}
        parameters = ((parameter, self._recipes[i], i, masters.get(i)) for i, parameter in step.parameters)
        with uninterrupted():
            step.done = in_one_pass(self._optimizer, parameters, step.key)
            self._steps += bool(step.done)  # whatever happens from here on
        for parameter, _ in step.done.values():
            parameter.grad = None  # an optimizer skips a parameter without a gradient
        step.parameters = [each for each in step.parameters if id(each[1]) not in step.done]

    def _refuse_sparse(self, step: _Step) -> None:
        for index, parameter in step.parameters:
            if parameter.grad is None or parameter.grad.layout == torch.strided:
                continue
            recipe = self._recipes[index]
            # SGD's momentum buffer is sparse too.
            states = (recipe.momentum, recipe.second_moment, *(quantizer for _, quantizer in recipe.states))
            if any(quantizer.rounds for quantizer in (recipe.gradient, *states)):
                raise ValueError(
                    f"the gradient of {self._names[index]!r} is {parameter.grad.layout}, which has no rounding; "
                    "make it dense (sparse=False in nn.Embedding)"
                )

    @_AS_PYTHON
    def _after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        step = self._step
        if step is None or not step.is_running():
            return
        step.calls.pop()
        if step.calls:
            return
        if step.overflows:
            self._step = None
            return
        if not step.ready:
            raise ValueError(
                f"{type(optimizer).__name__} never evaluated the closure it was given; call step() without it"
            )
        with uninterrupted(), torch.no_grad():
            for parameter, gradient in step.done.values():
                parameter.grad = gradient
            self._round_weights(step)
            self._note_stored(step)
            if step.twin is not None:
                step.twin.give_back(optimizer)
                step.twin.rest()
            unknown = self._round_states(step, optimizer)
            self._step = None
            self._steps += not step.done
        for name, recipe in unknown.items():  # the step is whole, if a warning is an error
            self._warn_of_unknown(name, recipe, optimizer)

    def _round_weights(self, step: _Step) -> None:
        stand_ins = {} if step.twin is None else step.twin.stand_ins
        mastered = [(index, p) for index, p in step.parameters if p in stand_ins]
        self._round(self._in_role("master", [(index, stand_ins[p]) for index, p in mastered]), step)
        weights = [(index, p.detach()) for index, p in step.parameters if p not in stand_ins]
        narrow = []
        for index, parameter in mastered:
            before, master = self._masters[self._names[index]], stand_ins[parameter].detach()
            self._masters[self._names[index]] = master
            # Round in the master's dtype, where nothing else is needed any more.
            weight = (parameter.detach() if parameter.dtype == master.dtype else before).copy_(master)
            weights.append((index, weight))
            if parameter.dtype != master.dtype:
                narrow.append((parameter, weight))
        self._round(self._in_role("weight", weights), step)
        for parameter, weight in narrow:
            parameter.copy_(weight)

    def _note_stored(self, step: _Step) -> None:
        """Let the next forwards read the weights of this step as they are."""
        stepped = itertools.chain(step.parameters, ((self._index[p], p) for p, _ in step.done.values()))
        fingerprints.note((parameter, self._recipes[index].weight.format) for index, parameter in stepped)

    def _round_states(self, step: _Step, optimizer: Optimizer) -> dict[str, Recipe]:
        """Round the states; returns name -> recipe of a parameter, for each state without a known role."""
        states, unknown = [], {}
        for index, parameter in step.parameters:
            recipe = self._recipes[index]
            for slot, (name, tensor, quantizer) in enumerate(states_of(optimizer, parameter, recipe)):
                if not is_known(recipe, name) and tensor.shape == parameter.shape:
                    unknown[name] = recipe
                states.append((quantizer, ROLES["momentum"] + slot, index, tensor))
        self._round(states, step)
        return unknown

    def _warn_of_unknown(self, name: str, recipe: Recipe, optimizer: Optimizer) -> None:
        """Warns, once, that a state stays in float, if the recipe rounds states."""
        rounded = next((each for each in (recipe.momentum, recipe.second_moment) if each.rounds), None)
        if rounded is None or name in self._warned_of:
            return
        self._warned_of.add(name)
        how = f"; name it: state.{name}={rounded}, or state.{name}=float" if name.isidentifier() else ""
        warn(
            f"{type(optimizer).__name__}'s state {name!r} stays in float, since nothing says whether it is a mean of "
            f"gradients{how}"
        )

    def _in_role(
        self, role: str, tensors: Iterable[tuple[int, Tensor]]
    ) -> Iterator[tuple[Quantizer, int, int, Tensor]]:
        """The arguments of ``_round`` for ``tensors``, each given as (index of its parameter, tensor)."""
        for index, tensor in tensors:
            yield getattr(self._recipes[index], role), ROLES[role], index, tensor

    def _round(self, tensors: Iterable[tuple[Quantizer, int, int, Tensor]], step: _Step) -> None:
        """Round ``tensors``, each (how, number of its role, index of its parameter, tensor).

        One call for each quantizer, because a small tensor's rounding takes less time than the call.
        """
        calls: dict[int, tuple[Quantizer, list[Tensor], list[int]]] = {}  # by identity, which is quick to compare
        for quantizer, role, index, tensor in tensors:
            if id(quantizer) not in calls:
                calls[id(quantizer)] = quantizer, [], []
            _, xs, streams = calls[id(quantizer)]
            xs.append(tensor)
            streams.append(parameter_stream(role, index))
        for quantizer, xs, streams in calls.values():
            if quantizer.rounds:
                quantize_foreach_(xs, *quantizer.how(), key=step.key, streams=streams)

    def _has_master(self, parameter: Tensor) -> bool:
        """Whether a parameter has a master; False for one that is not the model's."""
        index = self._index.get(parameter)  # type: ignore[call-overload]
        return index is not None and self._recipes[index].master is not None

    def _mastered(self) -> list[str]:
        """The names of the parameters with masters: floating, of a recipe with a master."""
        return [
            name
            for name, parameter in self._parameters.items()
            if mean_dtype(parameter) is not None and self._has_master(parameter)
        ]

    def _master(self, index: int) -> Tensor:
        """The master of a parameter, by its index; it is kept. See ``_master_of``."""
        name = self._names[index]
        self._masters[name] = self._master_of(name)
        return self._masters[name]

    def _master_of(self, name: str) -> Tensor:
        """The parameter's master, on its device, in float32 or wider; at first a copy of the parameter."""
        parameter, master = self._parameters[name], self._masters.get(name)
        if master is None:
            master = parameter.detach().clone()
        return master.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32))

    def _trained(self, optimizer: Optimizer) -> list[tuple[int, nn.Parameter]]:
        """(index in the model, parameter) of each parameter that ``optimizer`` trains, without frozen ones.

        An optimizer steps every parameter with a gradient. So one that was frozen after its backward is still trained.

        Raises ValueError for a parameter that is complex or not the model's.
        """
        if any(held.get(name) is not value for held, name, value in self._places):
            self._read_model()
        trained = []
        for number, group in enumerate(optimizer.param_groups):
            for position, parameter in enumerate(group["params"]):
                index = self._index.get(parameter)
                if index is None:
                    self._follow_model()
                    index = self._index.get(parameter)
                if index is None:
                    if (shard := unwhole(self.model)) is not None:
                        raise ValueError(f"{type(optimizer).__name__} cannot train {shard}")
                    raise ValueError(
                        f"parameter {position} of group {number} of {type(optimizer).__name__}, of shape "
                        f"{tuple(parameter.shape)}, is not the model's; build the optimizer from model.parameters()"
                    )
                if not parameter.requires_grad and parameter.grad is None:
                    continue
                if parameter.is_complex():
                    raise ValueError(
                        f"parameter {self._names[index]!r} is {parameter.dtype}, which no format holds; freeze it"
                    )
                trained.append((index, parameter))
        return trained


class _RefusedLoad:
    """A hook that refuses to load weights into a module while it is on. A copy or a pickle of it is off."""

    def __init__(self, is_on: bool = False) -> None:
        self.is_on = is_on

    def __call__(self, *args: Any) -> None:
        if self.is_on:
            raise ValueError(f"load_state_dict() {IN_AVERAGED}")

    def __reduce__(self) -> Any:
        return _RefusedLoad, ()


def _refuse_unserved(optimizer: Optimizer, kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError if this step unscales gradients by itself, or is captured in a CUDA graph."""
    name = type(optimizer).__name__
    scaled = any(getattr(optimizer, attribute, None) is not None for attribute in ("grad_scale", "found_inf"))
    if scaled or kwargs.get("grad_scaler") is not None:
        raise ValueError(
            f"{name} unscales the gradients of a GradScaler inside its step, too late to round them; use fused=False"
        )
    if is_captured():
        raise ValueError(
            f"{name}.step() is being captured in a CUDA graph, whose replays would all round alike; step outside of it"
        )


def _attached_to(optimizer: Optimizer) -> SWALP | None:
    owners = (getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, SWALP)), None)


def _steps_low(recipe: Recipe) -> bool:
    """Whether a step in ``recipe`` rounds anything."""
    quantizers = (recipe.weight, recipe.gradient, recipe.momentum, recipe.master, *dict(recipe.states).values())
    return any(quantizer is not None and quantizer.rounds for quantizer in quantizers)


def _hooked_call() -> FrameType:
    """The frame of ``Optimizer.step`` that fired the calling hook, without the frames of torch.compiler.disable.

    It lasts until the step is over. A compiled step goes on in calls made by this frame.
    """
    frame = sys._getframe(2)
    while frame.f_globals.get("__name__", "").startswith("torch._dynamo") and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _is_running(frame: FrameType) -> bool:
    """Whether ``frame`` is on the stack of this thread (it may outlive its call in a traceback)."""
    caller: FrameType | None = sys._getframe()
    while caller is not None and caller is not frame:
        caller = caller.f_back
    return caller is not None
