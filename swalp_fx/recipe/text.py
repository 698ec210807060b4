"""The text of a recipe."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from ..formats import FormatError
from .errors import RecipeError
from .quantizer import Quantizer
from .roles import ROLES, once

__all__ = ["read"]


def read(text: str, fields: Collection[str]) -> dict[str, Any]:
    """Field -> value, of a recipe's text."""
    text = text.strip()
    where = f"recipe {text!r}"
    if re.search(r"(^|[\s;])rules\s*=", text):
        raise RecipeError("rules are not read from text; pass them: Recipe.parse(text, rules=(Rule(...),))")
    if (spaced := re.sub(r",\s*(?=\w+\s*=)", " ", text)) != text:
        raise RecipeError(f"{where} has a comma between words; write {spaced!r}")
    if (tight := re.sub(r"\s*=\s*|(?<=,)\s+|\s+(?=[\[(])", lambda gap: gap[0].strip(), text)) != text:
        raise RecipeError(f"{where} has a space within a word; write {tight!r}")
    words = re.split(r"[\s;]+", text.strip(";"))
    everywhere, named = (words[:1], words[1:]) if "=" not in words[0] else ([], words)
    if (bare := next((word for word in named if "=" not in word), None)) is not None:
        if ROLES.get(bare, bare) in fields:
            raise RecipeError(f"{where}: {bare!r} lacks its value; write {bare}=...")
        remedy = _with_role(bare, fields) if everywhere else "put it first"
        raise RecipeError(f"{where}: {bare!r} would undo what stands before it; {remedy}")
    values: dict[str, Any] = {role: spec for spec in everywhere for role in ROLES.values()}
    given = once((word.split("=", 1) for word in named), where, fields)
    values |= {field: _READ[field](value) if field in _READ else value for field, value in given.items()}
    return values


def _with_role(bare: str, fields: Collection[str]) -> str:
    """How a word without a role, which stands behind a format for all, may have been meant."""
    name, separator, spec = bare.partition(":")
    if separator and ROLES.get(name, name) in fields:
        return f"write {name}={spec}"
    try:
        return f"name its role, such as M={Quantizer.parse(bare)}"
    except (FormatError, RecipeError):
        return "write ROLE=FORMAT, such as M=float"


def _read_globs(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _read_bool(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text, text)


_READ = {
    "include": _read_globs,
    "exclude": _read_globs,
    "quantize_input": _read_bool,
    "quantize_logits": _read_bool,
    "in_place": _read_bool,
}  # field -> what its text means
