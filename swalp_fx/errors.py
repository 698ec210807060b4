"""Errors of models that cannot be converted, and of calls that would silently compute in float."""

from __future__ import annotations

__all__ = ["UNPACK", "ConvertError", "NotRewritten"]

UNPACK = "unpack what convert returns: lp, swalp = swalp_fx.convert(...)"


class ConvertError(ValueError):
    """A model that cannot be converted. The message names the module, the reason and the remedy."""


class NotRewritten(RuntimeError):
    """A call of a converted model that would have computed in float. The message names the cause and the remedy."""
