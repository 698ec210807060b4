"""SWALP: low-precision steps of an optimizer, and the higher-precision average of the weights that they give."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .. import fingerprints
from ..codes import packed_state, unpacked_state
from ..copied import deep_copy
from ..formats import FLOAT, Format
from ..random import fold_in, stream_of
from ..recipe import Recipe
from ..warn import warn
from .algorithm import AS_PYTHON, LowPrecision, attached_to
from .averaging import Average, mean_dtype
from .recalibration import recalibrate
from .saved import SWA, VERSION, read
from .swapped import own_weights_later

__all__ = ["SWALP"]


class SWALP(LowPrecision):
    """Low-precision steps of an optimizer, and the higher-precision average of the weights.

    model: the float model. attach() accepts, and the average holds, its parameters alone.
        A tied parameter is one parameter, under its first name.
    recipe: a role in ``float`` is not touched.
    local: parameter name -> its recipe, if rules make it differ; every other parameter has ``recipe``. Or a function
        that returns this mapping; it is called again when the model has other parameters.
    float_copy: a deep copy of the model that computes in float.

    seed: of the random words of steps and averages, a whole number as ``torch.manual_seed`` takes it. None: one that
        torch's default CPU generator draws now. So ``torch.manual_seed`` before this makes a run reproducible, and two
        models of one process round apart. Nothing is drawn for a recipe that rounds nothing of a step at random.

    Random words come from key (seed, step) and stream (role, index of the parameter in the model). In a process group
    the seed is rank 0's: the ranks agree on it in their first step. A loaded state brings its own.

    ``copy.deepcopy`` and pickle copy the model and the attached optimizer too, and attach the copies
    to each other. An optimizer copied without its SWALP is an ordinary optimizer, because torch does
    not copy hooks.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: str | Recipe,
        local: Mapping[str, Recipe] | Callable[[], Mapping[str, Recipe]] = dict,
        float_copy: Callable[[nn.Module], nn.Module] = deep_copy,
        *,
        seed: int | None = None,
    ) -> None:
        super().__init__(model, recipe, local, seed)
        self._float_copy = float_copy
        average = self.recipe.resolved().average
        self._average = Average(average.format, average.rounding or "nearest")
        #: Averages besides the paper's, by name: ``swalp.averages["ema"] = Average(decay=0.999)``.
        self.averages: dict[str, Average] = {}
        self._may_average_float = False  # update_average() has warned of float weights

    def __repr__(self) -> str:
        optimizer = "no optimizer" if self._optimizer is None else type(self._optimizer).__name__
        average = f"average of {self.n_averaged}" if self.n_averaged else "no average yet"
        return f"SWALP({self.recipe}, attached to {optimizer}, {self._steps} steps, {average})"

    def replace(self, optimizer: Optimizer) -> None:
        """``attach``, after the ``detach`` of an earlier SWALP of the same model.

        Warns if the earlier one had another recipe, or has taken a step or an average.
        """
        self.refuse(optimizer)
        earlier = attached_to(optimizer)
        if not isinstance(earlier, SWALP) or earlier.model is not self.model:
            return self.attach(optimizer)
        described = repr(earlier)
        earlier.detach()
        self._hook(optimizer)
        self._warn_of_groups(optimizer)
        if earlier.recipe != self.recipe or earlier._steps or earlier.n_averaged:
            warn(f"{described} is detached now, since its model and optimizer are converted again")

    # The average

    @property
    def average(self) -> Average:
        """The average itself; ``swalp.average.mean()`` has its tensors by name."""
        return self._average

    @property
    def n_averaged(self) -> int:
        """How many times update_average() was called."""
        return self._average.n_averaged

    @AS_PYTHON
    def update_average(self) -> None:
        """Add the weights of this moment to the average, and to each of ``averages``.

        Warns, once, if no low-precision step has been taken.
        """
        self._refuse_averaged("update_average()")
        if self._steps == 0 and not self._may_average_float and any(map(_steps_low, self._parameters.recipes)):
            self._may_average_float = True
            remedy = "call it after optimizer.step()" if self._optimizer else "call attach(optimizer) before training"
            warn(f"update_average() got float weights, since no low-precision step has been taken; {remedy}")
        self._refuse_misnamed_averages()
        self._parameters.follow()
        for name, each in self.averages.items():
            each.refuse_unfit(self._parameters.by_name, f"swalp.averages[{name!r}]")
            if each.n_averaged:
                each.refuse(self._parameters.by_name)
        quantizers = {name: recipe.average for name, _, recipe in self._parameters.described()}
        self._average.update(self._parameters.by_name, key=fold_in(self._seed, self.n_averaged), quantizers=quantizers)
        for name, each in self.averages.items():
            seed = fold_in(self._seed, stream_of("average", name))
            each.update(self._parameters.by_name, key=fold_in(seed, each.n_averaged))

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
        copied = deep_copy if low_precision else self._float_copy
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
        self._parameters.follow()
        of_name.refuse(self._parameters.by_name)
        with own_weights_later(self.model, self._parameters.by_name):
            self._is_averaged = True
            try:
                of_name.write(self._parameters.by_name, format)
                if loader is not None:
                    recalibrate(self.model, loader, forward=forward)
                yield self.model
            finally:
                self._is_averaged = False

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

    # The state

    def state_dict(self) -> dict[str, Any]:
        """Counters, seed, averages, masters and fingerprints of stored weights, to resume a run.

        A master of a parameter that never had a gradient is waiting: it is the weight, also if that is written.

        With the model's and the optimizer's own states, the resumed run gives the bits of a run that was not stopped.
        Tensors are references, as in the optimizer's state_dict: copy or save before the next step. Every tensor that
        a load needs is there, also before the first step and the first average.
        """
        self._parameters.follow()
        return {
            "version": VERSION,
            "recipe": str(self.recipe),
            "parameters": list(self._parameters.names),
            "seed": self._seed,
            "step": self._steps,
            "n_averaged": self.n_averaged,
            "average": self._average.saved_means(self._parameters.by_name),
            "averages": {
                name: {
                    "n_seen": each.n_seen,
                    "n_averaged": each.n_averaged,
                    "means": each.saved_means(self._parameters.by_name),
                    "settings": each.settings,
                }
                for name, each in self.averages.items()
            },
            "masters": {name: self._parameters.master_of(name) for name in self._parameters.mastered()},
            "waiting": [name for name in self._parameters.mastered() if name not in self._parameters.masters],
            "fingerprints": {
                name: fingerprints.number_of(parameter)
                for name, parameter, recipe in self._parameters.described()
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
        self._parameters.follow()
        averages = {SWA: self._average, **self.averages}
        found = read(state, self.recipe, self._parameters.by_name, self._parameters.mastered(), averages)
        self._seed, self._steps, self._parameters.masters = found.seed, found.step, found.masters
        self._has_agreed = False
        fingerprints.put((self._parameters.by_name[name], number) for name, number in found.fingerprints.items())
        for average, (n_seen, n_averaged, means) in zip(averages.values(), found.averages, strict=True):
            average.n_seen, average.n_averaged, average.means = n_seen, n_averaged, means

    # Packed checkpoints

    def packed_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """module's state_dict with its weights as codes of the recipe's weight format; docs/codes.md has an example.

        module: the model, or another with the same names: a copy, the averaged model. A weight off its format's grid
            stays as it is; so are all weights before the first step.
        """
        self._parameters.follow()
        formats = {name: recipe.weight.format for name, _, recipe in self._parameters.described()}
        return packed_state(module, formats)

    def load_packed_state_dict(self, module: nn.Module, state: Mapping[str, Any]) -> None:
        """Load the result of ``packed_state_dict`` into ``module``, bit for bit. Errors are as for load_state_dict."""
        module.load_state_dict(unpacked_state(state))

    def _forget_layer(self, name: str, parameter: nn.Parameter) -> None:
        """A new layer is none of the averages, which see one of another shape by that."""
        for each in (self._average, *self.averages.values()):
            if name in each.means and each.means[name].shape == parameter.shape:
                del each.means[name]


def _steps_low(recipe: Recipe) -> bool:
    """Whether a step in ``recipe`` rounds anything."""
    quantizers = (recipe.weight, recipe.gradient, recipe.momentum, recipe.master, *dict(recipe.states).values())
    return any(quantizer is not None and quantizer.rounds for quantizer in quantizers)
