"""The model's parameters as the optimizer pass sees them: each has an index, a name, a recipe, and perhaps a master."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..recipe import Recipe
from ..whole import unwhole
from .averaging import mean_dtype

__all__ = ["Parameters"]


class Parameters:
    """The parameters of ``model``, which may come and go: a new head, assigned weights.

    A tied parameter is one parameter, under its first name.

    recipe: of every parameter but those of ``local``, which maps names to recipes; or a function that gives such a
        mapping, and is called again when the model has other parameters.
    on_new_layer: called with (name, parameter) where another layer has taken the place of one with that name.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        local: Mapping[str, Recipe] | Callable[[], Mapping[str, Recipe]],
        on_new_layer: Callable[[str, nn.Parameter], None],
    ) -> None:
        self.model = model
        self._recipe = recipe
        self._local = local if callable(local) else functools.partial(dict, local)
        self._on_new_layer = on_new_layer
        self.masters: dict[str, Tensor] = {}
        self.by_name: dict[str, nn.Parameter] = {}
        self._owners: dict[str, nn.Module] = {}
        self.read()

    def read(self) -> None:
        """Read the model's present parameters. If a name has a new parameter, its master starts again from that."""
        before, self.by_name = self.by_name, dict(self.model.named_parameters())
        self._places = [
            (held, name, value)
            for module in self.model.modules()
            for held in (module._modules, module._parameters)
            for name, value in held.items()
        ]
        for name in before:
            if before[name] is not self.by_name.get(name):
                self.masters.pop(name, None)
        owners = {name: self.model.get_submodule(name.rpartition(".")[0]) for name in self.by_name}
        for name, owner in self._owners.items():
            if name in owners and owners[name] is not owner:
                self._on_new_layer(name, self.by_name[name])
        self._owners = owners
        self.names = list(self.by_name)
        local = self._local()
        recipes = [local.get(name, self._recipe).resolved() for name in self.names]
        # Equal recipes become one object, as in_one_pass needs.
        self.recipes = [recipes[recipes.index(each)] for each in recipes]
        self.index = {parameter: index for index, parameter in enumerate(self.by_name.values())}

    def follow(self) -> None:
        """``read``, if the model has other parameters than before."""
        now = dict(self.model.named_parameters())
        if now.keys() != self.by_name.keys() or any(now[name] is not p for name, p in self.by_name.items()):
            self.read()

    def described(self) -> Iterator[tuple[str, nn.Parameter, Recipe]]:
        """(name, parameter, recipe) of each parameter, in order."""
        return zip(self.names, self.by_name.values(), self.recipes, strict=True)

    def described_at(self, pairs: Iterable[tuple[int, nn.Parameter]]) -> Iterator[tuple[str, nn.Parameter, Recipe]]:
        """(name, parameter, recipe) of each of ``pairs``: (index, parameter)."""
        return ((self.names[index], parameter, self.recipes[index]) for index, parameter in pairs)

    def name_of(self, parameter: nn.Parameter) -> str:
        return self.names[self.index[parameter]]

    def recipe_of(self, parameter: nn.Parameter) -> Recipe:
        return self.recipes[self.index[parameter]]

    # Masters

    def has_master(self, parameter: Tensor) -> bool:
        """Whether a parameter has a master; False for one that is not the model's."""
        index = self.index.get(parameter)  # type: ignore[call-overload]
        return index is not None and self.recipes[index].master is not None

    def mastered(self) -> list[str]:
        """The names of the parameters with masters: floating, of a recipe with a master."""
        return [name for name, p in self.by_name.items() if mean_dtype(p) is not None and self.has_master(p)]

    def master(self, index: int) -> Tensor:
        """The master of a parameter, by its index; it is kept. See ``master_of``."""
        name = self.names[index]
        self.masters[name] = self.master_of(name)
        return self.masters[name]

    def master_of(self, name: str) -> Tensor:
        """The parameter's master, on its device, in float32 or wider; at first a copy of the parameter."""
        parameter, master = self.by_name[name], self.masters.get(name)
        if master is None:
            master = parameter.detach().clone()
        return master.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32))

    # An optimizer's

    def trained(self, optimizer: Optimizer) -> list[tuple[int, nn.Parameter]]:
        """(index in the model, parameter) of each parameter that ``optimizer`` trains, without frozen ones.

        An optimizer steps every parameter with a gradient. So one that was frozen after its backward is still trained.

        Raises ValueError for a parameter that is complex or not the model's.
        """
        if any(held.get(name) is not value for held, name, value in self._places):
            self.read()
        trained = []
        for number, group in enumerate(optimizer.param_groups):
            for position, parameter in enumerate(group["params"]):
                index = self.index.get(parameter)
                if index is None:
                    self.follow()
                    index = self.index.get(parameter)
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
                        f"parameter {self.names[index]!r} is {parameter.dtype}, which no format holds; freeze it"
                    )
                trained.append((index, parameter))
        return trained
