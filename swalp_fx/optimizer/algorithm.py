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

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .. import fingerprints
from ..ops import quantize_foreach_
from ..random import ROLES, fold_in, parameter_stream
from ..recipe import Quantizer, Recipe
from ..warn import warn
from .calls import hooked_call, is_running
from .interrupts import uninterrupted
from .lost import warn_of_lost_updates
from .moments import warn_of_moments
from .one_pass import in_one_pass
from .parameters import Parameters
from .ranks import agreed_seed
from .refusals import refuse_optimizer, refuse_sparse, refuse_step
from .scaling import scale_of, scaler_of, skip
from .seeds import drawn_seed, refuse_seed
from .states import is_known, refuse_misnamed, states_of
from .swapped import IN_AVERAGED
from .twin import Loading, Twin, idle, is_half, kept_elsewhere, narrow_states

__all__ = ["AS_PYTHON", "LowPrecision", "attached_to"]

# Compiled, the number of a step would be a symbol, and its key be computed in 64 bits that are too few.
AS_PYTHON = torch.compiler.disable(reason="swalp_fx rounds a step between graphs; leave out fullgraph=True")


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
        self.calls = [call for call in self.calls if is_running(call)]
        return bool(self.calls)


class LowPrecision:
    """Low-precision steps of an optimizer: SGD-LP, in the paper's words, for any optimizer.

    model, recipe, local, seed: see SWALP. Random words come from key (seed, step) and stream (role, index of the
    parameter in the model).
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: str | Recipe,
        local: Mapping[str, Recipe] | Callable[[], Mapping[str, Recipe]],
        seed: int | None,
    ) -> None:
        if seed is not None:
            refuse_seed(seed)
        self.model = model
        self.recipe = Recipe.parse(recipe)
        self._parameters = Parameters(model, self.recipe, local, self._forget_layer)
        #: The factor that the loss is multiplied by; gradients are divided by it before the step. A number, or a
        #: function that returns it. None: the scale of the GradScaler that calls the step, or 1.
        self.grad_scale: float | Callable[[], float] | None = None
        self._is_averaged = False  # the model has the weights of an average
        self._has_agreed = False  # with the other ranks on the seed
        self._group: ProcessGroup | None = None
        self._steps = 0
        self._optimizer: Optimizer | None = None
        self._handles: list[RemovableHandle] = []
        self._step: _Step | None = None
        self._twin: Twin | None = None
        self._n_groups = 0  # groups of the optimizer that the warnings have seen
        self._warned_of: set[str] = set()  # names of states without a known role
        if seed is None:
            self.draw_seed()
        else:
            self._seed = int(seed) % 2**64

    def draw_seed(self) -> None:
        """Take a new seed from torch's default CPU generator.

        Where neither steps nor the recipe's average round at random, nothing is drawn, and the seed is torch's own.
        """
        draws = any(recipe.draws_in_steps for recipe in (self.recipe, *self._parameters.recipes))
        self._seed = drawn_seed() if draws else torch.initial_seed()
        self._has_agreed = False

    def _forget_layer(self, name: str, parameter: nn.Parameter) -> None:
        """Called where a new layer takes the place of the one that has this parameter."""

    def _refuse_averaged(self, what: str) -> None:
        if self._is_averaged:
            raise ValueError(f"{what} {IN_AVERAGED}")

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
        if attached_to(optimizer) is not None:
            raise ValueError(
                f"{type(optimizer).__name__} is already attached to another SWALP; call that one's detach() first, "
                "or convert its model again with this optimizer, which does"
            )
        self._group = group
        self._hook(optimizer)
        self._warn_of_groups(optimizer)

    def refuse(self, optimizer: Optimizer) -> None:
        """Raises the errors of ``attach``, and changes nothing."""
        refuse_optimizer(optimizer, self.model)
        if self._optimizer is not None:
            raise ValueError(f"this SWALP is already attached to {type(self._optimizer).__name__}; call detach() first")
        trained = list(self._parameters.described_at(self._parameters.trained(optimizer)))
        refuse_misnamed(optimizer, trained)
        mastered = {parameter for _, parameter, recipe in trained if recipe.master is not None}
        if (elsewhere := kept_elsewhere(optimizer, mastered)) is not None:
            raise ValueError(
                f"{type(optimizer).__name__} keeps parameters in its attribute {elsewhere!r} too, where no master can "
                "stand in for them; leave master out"
            )

    def _hook(self, optimizer: Optimizer) -> None:
        self._optimizer, self._has_agreed = optimizer, False
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        if any(recipe.master is not None for recipe in self._parameters.recipes):
            # The optimizer steps masters, so others see the weights of the step only after this hook.
            hooks: Any = optimizer._optimizer_step_post_hooks
            hooks.move_to_end(self._handles[-1].id, last=False)
            loading = Loading(self._parameters.has_master)
            self._handles += [
                optimizer.register_load_state_dict_pre_hook(loading.before),
                optimizer.register_load_state_dict_post_hook(loading.after),
            ]

    def _warn_of_groups(self, optimizer: Optimizer) -> None:
        """Warns of what ``attach`` warns of; a later step calls it again if there are more groups."""
        self._n_groups = len(optimizer.param_groups)
        warn_of_moments(optimizer, self._parameters)
        warn_of_lost_updates(optimizer, self._parameters)

    def detach(self) -> None:
        """Take the hooks off, if they are on; the weights stay as they are.

        The masters are dropped, so a later attach() starts from the weights of that moment. Beside a master, states of
        half-precision parameters are float32; they go back to their parameter's dtype.
        """
        if self._optimizer is None:
            return
        for handle in self._handles:
            handle.remove()
        if any(is_half(parameter) and self._parameters.has_master(parameter) for parameter in self._parameters.index):
            narrow_states(self._optimizer)
        self._optimizer, self._handles, self._twin = None, [], None
        self._parameters.masters.clear()

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_averaged("a copy of swalp")
        return self.__dict__ | {"_handles": [], "_step": None, "_twin": None, "_group": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        optimizer = state["_optimizer"]
        self.__dict__.update(state, _optimizer=None)
        if optimizer is not None:
            self._hook(optimizer)
            self._has_agreed = state["_has_agreed"]

    # One step

    @AS_PYTHON
    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        call = hooked_call()
        # A subclass's step() calls super().step(), which fires the hooks again: only the outermost
        # call counts. A step that raised never reached its post-hook, and must not count as running.
        if self._step is not None and self._step.is_running():
            self._step.calls.append(call)
            return None
        self._refuse_averaged(f"{type(optimizer).__name__}.step()")
        refuse_step(optimizer, kwargs)
        trained = self._parameters.trained(optimizer)
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
        if any(self._parameters.recipes[index].master is not None for index, _ in trained):
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
        refuse_sparse(self._parameters.described_at(step.parameters))
        with uninterrupted(), torch.no_grad():  # a Ctrl-C at the end of a block would leave gradients switched off
            if step.scale == 1.0 and step.scaler is None:
                self._step_in_one_pass(step)
            gradients = self._round_gradients(step)
            step.overflows = step.scaler is not None and not all(bool(each.isfinite().all()) for each in gradients)
            if not step.overflows:
                self._put_masters(step)
        for parameter, _ in step.done.values():
            parameter.grad = None  # an optimizer skips a parameter without a gradient
        step.ready = True

    def _round_gradients(self, step: _Step) -> list[Tensor]:
        """Round the gradients in the scale of the loss; returns the gradients that may overflow.

        Their format rounds beyond its largest number to infinity or NaN.
        """
        gradients = [
            (index, p.grad)
            for index, p in step.parameters
            if p.grad is not None and self._parameters.recipes[index].gradient.rounds
        ]
        tensors = list({id(gradient): gradient for _, gradient in gradients}.values())  # two parameters may share one
        if step.scale != 1.0 and tensors:
            torch._foreach_mul_(tensors, step.scale)
        self._round(self._in_role("gradient", gradients), step)
        if step.scale != 1.0 and tensors:
            torch._foreach_div_(tensors, step.scale)
        return [
            each for index, each in gradients if self._parameters.recipes[index].gradient.format.overflow != "saturate"
        ]

    def _put_masters(self, step: _Step) -> None:
        masters = {
            p: self._parameters.master(index)
            for index, p in step.parameters
            if self._parameters.recipes[index].master is not None
        }
        if not masters:
            return
        assert self._optimizer is not None
        step.twin = self._twin_of(self._optimizer)
        narrow = step.twin.put(masters)
        if narrow and self._steps:  # an optimizer that trained before the pass has such states, and nothing was lost
            parameter, state = narrow[0]
            name = self._parameters.name_of(parameter)
            warn(
                f"the optimizer's state {state!r} of {name!r} was in {parameter.dtype} and goes on in float32; "
                "if float32 was saved, load the optimizer's state after convert() or attach()"
            )

    def _step_in_one_pass(self, step: _Step) -> None:
        """Step and round parameters in one pass, if there is one for this optimizer's step."""
        if self._optimizer is None:
            return
        of = self._parameters
        parameters = (
            (parameter, of.recipes[i], i, of.master(i) if of.recipes[i].master is not None else None)
            for i, parameter in step.parameters
        )  # lazy: most optimizers have no such pass, and no master is made for them here
        step.done = in_one_pass(self._optimizer, parameters, step.key)
        self._steps += bool(step.done)  # whatever happens from here on
        self._note_stored((self._parameters.index[parameter], parameter) for parameter, _ in step.done.values())
        step.parameters = [each for each in step.parameters if id(each[1]) not in step.done]

    @AS_PYTHON
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
            self._note_stored(step.parameters)
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
            before, master = self._parameters.masters[self._parameters.names[index]], stand_ins[parameter].detach()
            self._parameters.masters[self._parameters.names[index]] = master
            # Round in the master's dtype, where nothing else is needed any more.
            weight = (parameter.detach() if parameter.dtype == master.dtype else before).copy_(master)
            weights.append((index, weight))
            if parameter.dtype != master.dtype:
                narrow.append((parameter, weight))
        self._round(self._in_role("weight", weights), step)
        for parameter, weight in narrow:
            parameter.copy_(weight)

    def _note_stored(self, parameters: Iterable[tuple[int, nn.Parameter]]) -> None:
        """Let the next forwards read these weights, stored rounded just now, as they are."""
        recipes = self._parameters.recipes
        fingerprints.note((parameter, recipes[index].weight.format) for index, parameter in parameters)

    def _round_states(self, step: _Step, optimizer: Optimizer) -> dict[str, Recipe]:
        """Round the states; returns name -> recipe of a parameter, for each state without a known role."""
        states, unknown = [], {}
        for index, parameter in step.parameters:
            recipe = self._parameters.recipes[index]
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
            yield getattr(self._parameters.recipes[index], role), ROLES[role], index, tensor

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


def attached_to(optimizer: Optimizer) -> LowPrecision | None:
    owners = (getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, LowPrecision)), None)
