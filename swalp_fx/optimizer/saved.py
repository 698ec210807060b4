"""The state of ``SWALP.state_dict``, read back: all of it fits, or an error of one sentence says why not."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import FormatError
from ..recipe import Recipe, RecipeError
from .averaging import Average, mean_dtype

__all__ = ["SWA", "VERSION", "Saved", "read"]

VERSION = 6
COUNTED = ("seed", "step", "n_averaged")
KEYS = ("version", "recipe", "parameters", *COUNTED, "average", "averages", "masters", "waiting", "fingerprints")
COUNTS = ("n_seen", "n_averaged")  # of an average
SWA = ""  # the name of the paper's own average


@dataclass(frozen=True)
class Saved:
    """A state that fits; its tensors are copies."""

    seed: int
    step: int
    averages: list[tuple[int, int, dict[str, Tensor]]]  # (n_seen, n_averaged, means), in the order of ``averages``
    masters: dict[str, Tensor]
    fingerprints: dict[str, int]  # 0: no step has stored this parameter


def read(
    state: Any,
    recipe: Recipe,
    parameters: Mapping[str, nn.Parameter],
    mastered: Collection[str],
    averages: Mapping[str, Average],
) -> Saved:
    """``state``, read for a SWALP of this recipe and these parameters.

    mastered: the parameters with masters.
    averages: by name, the paper's own included.
    Raises ValueError if it is of another version, recipe or model, or is no state at all.
    """
    state = _of_this_version(state)
    if not isinstance(state, Mapping) or set(KEYS).isdisjoint(state):
        found = ", ".join(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"a SWALP state holds {', '.join(KEYS)}, not {found}; pass what state_dict() returned")
    if (version := state.get("version", VERSION)) != VERSION:
        raise ValueError(f"the state is of version {version!r}, and this SWALP reads version {VERSION}")
    if set(state) != set(KEYS):
        missing = [key for key in KEYS if key not in state]
        differs = f"lacks {missing[0]!r}" if missing else f"has {next(key for key in state if key not in KEYS)!r} too"
        raise ValueError(f"the state {differs}; pass what state_dict() returned")
    if not _is_text_of(recipe, state["recipe"]):
        raise ValueError(
            f"the state is of recipe {state['recipe']!r}, not {str(recipe)!r}; convert with the former to resume"
        )
    is_whole = state["parameters"] is not None
    if is_whole and (differs := _differing(state["parameters"], list(parameters))):
        raise ValueError(f"the state is of a model {differs}; load a state of this model")
    for key in COUNTED:
        if not isinstance(state[key], int) or state[key] < 0:
            raise ValueError(f"the state's {key} must be a whole number, not {state[key]!r}")
    of_state = _averages(state, {name: average for name, average in averages.items() if name != SWA})
    found_averages = [
        (*of_state[name][:2], _means(name, average, *of_state[name][1:], parameters, is_whole))
        for name, average in averages.items()
    ]
    masters = _masters(state["masters"], parameters, mastered, is_whole)
    fingerprints = _fingerprints(state["fingerprints"], parameters)
    # Until a step takes it, a master is the weight, and a load may still change that.
    begun = {name: master for name, master in masters.items() if name not in _waiting(state["waiting"], mastered)}
    return Saved(state["seed"], state["step"], found_averages, begun, fingerprints)


def _differing(names: Any, due: list[str]) -> str:
    """The difference of the parameter ``names`` in a state from ``due``, for an error; "" if there is none."""
    if names == due:
        return ""
    if not isinstance(names, list) or set(names) == set(due):
        return "whose parameters are in another order"
    missing, more = ([name for name in each if name not in other] for each, other in ((due, names), (names, due)))
    return f"without {missing[0]!r}" if missing else f"with {more[0]!r} too"


def _masters(
    masters: Any, parameters: Mapping[str, nn.Parameter], mastered: Collection[str], is_whole: bool
) -> dict[str, Tensor]:
    dtypes = {name: dtype for name, p in parameters.items() if (dtype := mean_dtype(p)) is not None}
    if isinstance(masters, Mapping):  # older states have masters in half precision
        masters = {
            name: master.to(dtypes[name])
            if isinstance(master, Tensor) and name in dtypes and master.dtype == parameters[name].dtype
            else master
            for name, master in masters.items()
        }
    due = {name: dtypes[name] for name in mastered}
    copied = _copied("masters", masters, due, parameters)
    if is_whole:
        _refuse_missing("masters", copied, due)
    return copied


def _fingerprints(found: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
    if not isinstance(found, Mapping) or not all(isinstance(number, int) for number in found.values()):
        raise ValueError("the state's fingerprints must map names to whole numbers; pass what state_dict() returned")
    if more := [name for name in found if name not in parameters]:
        raise ValueError(
            f"the state's fingerprints have {more[0]!r}, which this model does not; load a state of this model"
        )
    return dict(found)


def _waiting(names: Any, mastered: Collection[str]) -> list[str]:
    """The names of parameters whose masters no step has taken yet."""
    if not isinstance(names, list) or not all(name in mastered for name in names):
        raise ValueError(
            f"the state's waiting must be a list of parameters with masters, not {names!r}; pass what state_dict() "
            "returned"
        )
    return names


def _refuse_missing(what: str, found: Mapping[str, Tensor], due: Iterable[str]) -> None:
    if missing := [name for name in due if name not in found]:
        raise ValueError(
            f"the state's {what} lacks {missing[0]!r}, a parameter of the model; load a state of this model"
        )


def _averages(state: Mapping[str, Any], wanted: Mapping[str, Average]) -> dict[str, tuple[int, int, Any]]:
    """Name -> (n_seen, n_averaged, means) of each average of a state.

    Raises ValueError unless the state has exactly the ``wanted`` averages besides the paper's.
    """
    others = state["averages"]
    if not _are_averages(others):
        raise ValueError(
            "the state's averages map names to n_seen, n_averaged, means and settings; pass what state_dict() returned"
        )
    if set(others) != set(wanted):
        has, due = (", ".join(map(repr, each)) or "none" for each in (others, wanted))
        raise ValueError(f"the state's averages are {has}, and this SWALP's {due}; set swalp.averages to those first")
    for name, average in wanted.items():
        found = others[name]["settings"]
        if differs := next((key for key, value in average.settings.items() if found.get(key) != value), None):
            raise ValueError(
                f"the state's average {name!r} has {differs}={found.get(differs)!r}, and this SWALP's "
                f"{differs}={average.settings[differs]!r}; make swalp.averages[{name!r}] with the former to resume"
            )
    # Of the paper's average every update counts.
    found = {SWA: (state["n_averaged"], state["n_averaged"], state["average"])}
    return found | {name: (each["n_seen"], each["n_averaged"], each["means"]) for name, each in others.items()}


def _are_averages(averages: Any) -> bool:
    if not isinstance(averages, Mapping) or not all(isinstance(each, Mapping) for each in averages.values()):
        return False
    return all(
        set(each) == {*COUNTS, "means", "settings"}
        and isinstance(each["settings"], Mapping)
        and all(isinstance(each[name], int) and each[name] >= 0 for name in COUNTS)
        for each in averages.values()
    )


def _means(
    name: str, average: Average, count: int, means: Any, parameters: Mapping[str, nn.Parameter], is_whole: bool
) -> dict[str, Tensor]:
    what = f"average {name!r}" if name != SWA else "average"
    dtypes = {each: dtype for each, p in parameters.items() if (dtype := average.mean_dtype(p)) is not None}
    copied = _copied(what, means, dtypes, parameters, average.device)
    if is_whole or count:
        _refuse_missing(what, copied, dtypes)
    if not count and any(bool(mean.any()) for mean in copied.values()):
        raise ValueError(f"the state has an {what} of 0 models; pass what state_dict() returned")
    return copied if count else {}


def _copied(
    what: str,
    tensors: Any,
    dtypes: Mapping[str, torch.dtype],
    parameters: Mapping[str, nn.Parameter],
    device: str | torch.device | None = None,
) -> dict[str, Tensor]:
    """Copies of ``tensors`` on ``device``, or on their parameters' devices.

    Raises ValueError for a name outside of ``dtypes``, or another shape or dtype.
    """
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"the state's {what} must map names to tensors; pass what state_dict() returned")
    for name, tensor in tensors.items():
        if name not in dtypes:
            raise ValueError(f"the state's {what} has {name!r}, which this model does not; load a state of this model")
        expected = (tuple(parameters[name].shape), dtypes[name])
        if (found := (tuple(tensor.shape), tensor.dtype)) != expected:
            raise ValueError(
                f"the state's {what} has {name!r} as {found[0]} {found[1]}, and this model needs "
                f"{expected[0]} {expected[1]}; load a state of this model"
            )
    return {name: tensor.detach().to(device or parameters[name].device, copy=True) for name, tensor in tensors.items()}


def _of_this_version(state: Any) -> Any:
    """``state`` as one of this version.

    Version 1 had another word for masters. Version 2 had one average. Version 3 had no names of parameters, and only
    the tensors that were made so far. Version 4 had no fingerprints. Version 5 did not say which masters wait for their
    first step.
    """
    if isinstance(state, Mapping) and state.get("version") == 1 and "accumulators" in state:
        state = {**{("masters" if key == "accumulators" else key): state[key] for key in state}, "version": 2}
    if isinstance(state, Mapping) and state.get("version") == 2 and "average" in state:
        state = {**state, "averages": {}, "version": 3}
    if isinstance(state, Mapping) and state.get("version") == 3 and "parameters" not in state:
        state = {**state, "parameters": None, "version": 4}
    if isinstance(state, Mapping) and state.get("version") == 4 and "fingerprints" not in state:
        state = {**state, "fingerprints": {}, "version": 5}
    if isinstance(state, Mapping) and state.get("version") == 5 and "waiting" not in state:
        masters = state.get("masters")
        waiting = [] if state.get("step") or not isinstance(masters, Mapping) else list(masters)
        state = {**state, "waiting": waiting, "version": VERSION}
    return state


def _is_text_of(recipe: Recipe, text: Any) -> bool:
    """Whether ``text``, perhaps in the words of an older version, stands for the arithmetic of ``recipe``."""
    try:
        return replace(Recipe.parse(text), in_place=recipe.in_place) == recipe
    except (FormatError, RecipeError):
        return False
