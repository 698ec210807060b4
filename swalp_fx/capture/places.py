"""The names of a model's modules, parameters and buffers."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..passes.names import parameter_subject, parameter_subjects
from ..recipe import Subject

__all__ = ["Places", "within"]

_BARE = vars(nn.Module()).keys()


def within(root: nn.Module, apart: nn.Module | None = None) -> Iterator[nn.Module]:
    """``root.modules()`` in a quarter of the time, since every call needs it. A shared module comes twice.

    A module that is being copied may have no ``_modules`` yet. ``apart`` and what is in it alone do not come.
    """
    waiting = [root]
    for module in waiting:
        if module is not None and module is not apart:
            yield module
            waiting.extend(module.__dict__.get("_modules", {}).values())


class Places:
    """The names in a model, by identity. Surgery changes them, so they are read anew for each graph.

    foreigners: the parameters, by name, of modules outside of the model that graphs have met.
    """

    def __init__(self, root: nn.Module, foreigners: dict[str, Subject]) -> None:
        self.foreigners = foreigners
        self.type = type(root)
        self._modules = _Names(root.named_modules())
        self._parameters = _Names(root.named_parameters())
        self._buffers = _Names(root.named_buffers())
        loose = [*_loose(root)]
        self._loose = _Names((name, tensor) for name, tensor, _ in loose)
        self.loose = [name for name, _, _ in loose]  # trained tensors that are no parameters of the model
        self.subjects: dict[str, tuple[Subject, ...]] = {
            **parameter_subjects(root),
            **{name: (parameter_subject(name, owner),) for name, _, owner in loose},
            **{name: (subject,) for name, subject in foreigners.items()},
        }

    def modules(self) -> Iterator[nn.Module]:
        return self._modules.objects()

    def path(self, module: nn.Module) -> str | None:
        return self._modules.of(module)

    def module(self, key: str) -> tuple[str, nn.Module] | None:
        """(path, module) of an entry of nn_module_stack; its key is ``ID`` or ``ID@CALL``."""
        ident = key.partition("@")[0]
        return self._modules[int(ident)] if ident.isdigit() else None

    def parameter(self, value: Tensor) -> str | None:
        """The first name of a parameter, or the name of another trained tensor."""
        name = self._parameters.of(value)
        return self.loose_name(value) if name is None else name

    def loose_name(self, value: Tensor) -> str | None:
        return self._loose.of(value)

    def foreign(self, name: str, owner: nn.Module) -> str:
        """The name of a parameter of a module outside of the model, such as an argument of a forward."""
        while name in self.subjects and name not in self.foreigners:
            name = f"{name}@0"
        self.foreigners[name] = subject = parameter_subject(name, owner)
        self.subjects[name] = (subject,)
        return name

    def buffer(self, value: Tensor) -> str | None:
        return self._buffers.of(value)


class _Names:
    """The names of objects, by identity. It keeps no object alive."""

    def __init__(self, named: Iterable[tuple[str, Any]]) -> None:
        self._known = {id(each): (name, weakref.ref(each)) for name, each in named}

    def __getitem__(self, ident: int) -> tuple[str, Any] | None:
        """(name, object) of the object with the id ``ident``."""
        name, reference = self._known.get(ident, ("", None))
        known = reference() if reference is not None else None
        return None if known is None else (name, known)

    def objects(self) -> Iterator[Any]:
        return (each for _, reference in self._known.values() if (each := reference()) is not None)

    def of(self, value: Any) -> str | None:
        name, reference = self._known.get(id(value), ("", None))
        return name if reference is not None and reference() is value else None


def _loose(root: nn.Module) -> Iterator[tuple[str, Tensor, nn.Module]]:
    """(name, tensor, module that holds it) of trained tensors that are no parameters of the model.

    Such a tensor is a plain one that requires grad, or a parameter of an unregistered module, as in a plain list.
    """
    known = {id(parameter) for parameter in root.parameters()}
    for path, module in root.named_modules():
        for attribute, value in vars(module).items():
            if attribute in _BARE or not isinstance(value, Tensor | list | tuple | dict):
                continue
            for keys, leaf in pytree.tree_flatten_with_path(value)[0]:
                name = ".".join(filter(None, (path, f"{attribute}{pytree.keystr(keys)}")))
                named = leaf.named_parameters() if isinstance(leaf, nn.Module) else [("", leaf)]
                for own, each in named:
                    if _is_trained(each) and id(each) not in known:
                        owner = leaf.get_submodule(own.rpartition(".")[0]) if own else module
                        yield (f"{name}.{own}" if own else name), each, owner


def _is_trained(value: Any) -> bool:
    return isinstance(value, nn.Parameter) or (isinstance(value, Tensor) and value.requires_grad and value.is_leaf)
