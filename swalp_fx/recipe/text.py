"""The text of a recipe: ``bfp8[0] M=float rules=[fc W=float; "a b" kind=Conv2d A=bfp4~up]``.

Spaces or semicolons separate words. The first word may be a format for all roles, and so may the first behind a rule's
pattern: ``rules=[fc float]``. A pattern between quotes may hold anything; a quote in it is written twice.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from ..formats import FormatError
from .errors import RecipeError
from .patterns import GLOBS
from .quantizer import Quantizer
from .roles import ALL_ROLES, LETTERS, ROLES, STATE, once
from .rule import FIELDS_OF_RULE, Rule

if TYPE_CHECKING:
    from .recipe import Recipe

__all__ = ["read", "rule_text", "text"]

_QUOTED = re.compile(r'"((?:[^"]|"")*)"')
_PLAIN = re.compile(r"[\w.*?@:+!-](?:[\w.*?@:+-]|\[[\w!-]+\])*")  # a pattern that needs no quotes, such as c.?[01]
# Formats and globs in the list may have brackets.
_RULES = re.compile(r"(?:^|(?<=[\s;]))rules=\[((?:[^\[\]]|\[[^\[\]]*\])*)\](?=$|[\s;])")


# ---- recipe -> text --------------------------------------------------------------------------------------------------


def text(recipe: Recipe) -> str:
    """The text that ``read`` reads. Fields with their default value are left out."""
    quantizers = {getattr(recipe, role) for role in ROLES.values()}
    alike = len(quantizers) == 1
    words = (
        [str(quantizers.pop())] if alike else [f"{letter}={getattr(recipe, role)}" for letter, role in ROLES.items()]
    )
    default = type(recipe)
    for name in ("second_moment", "master", "average", "rounding", "placement"):
        if (value := getattr(recipe, name)) != getattr(default, name):
            words.append(f"{LETTERS.get(name, name)}={value}")
    words += _states(recipe.states)
    for name in GLOBS:
        if globs := getattr(recipe, name):
            words.append(f"{name}={','.join(map(_quoted, globs))}")
    for name in ("quantize_input", "quantize_logits", "in_place"):
        if (value := getattr(recipe, name)) != getattr(default, name):
            words.append(f"{name}={str(value).lower()}")
    words += [f"rules=[{'; '.join(map(rule_text, recipe.rules))}]"] if recipe.rules else []
    return " ".join(words)


def rule_text(rule: Rule) -> str:
    kind = [f"kind={_quoted(rule.kind)}"] if rule.kind is not None else []
    given = rule.roles()
    everywhere = [str(given[role]) for role in ROLES.values() if role in given]
    alike = len(everywhere) == len(ROLES) and len(set(everywhere)) == 1
    others = {role: value for role, value in given.items() if not (alike and role in ROLES.values())}
    named = (f"{LETTERS.get(role, role)}={value}" for role, value in others.items())
    return " ".join([_quoted(rule.match), *everywhere[: 1 if alike else 0], *kind, *named, *_states(rule.states)])


def _states(states: Any) -> list[str]:
    return [f"{STATE}{name}={quantizer}" for name, quantizer in states]


def _quoted(text: str) -> str:
    """``text``, between quotes if it needs them."""
    return text if _PLAIN.fullmatch(text) else '"' + text.replace('"', '""') + '"'


# ---- text -> fields --------------------------------------------------------------------------------------------------


class _Quotes:
    """Quoted strings, put aside while a text is split into words: ``"a b"`` is ``"0"`` until it is read."""

    def __init__(self, text: str) -> None:
        self._strings: list[str] = []
        self.text = _QUOTED.sub(self._keep, text)

    def _keep(self, match: re.Match[str]) -> str:
        self._strings.append(match[1].replace('""', '"'))
        return f'"{len(self._strings) - 1}"'

    def read(self, word: str) -> str:
        """``word`` with its quoted strings put back, without the quotes."""
        return _QUOTED.sub(lambda match: self._strings[int(match[1])], word)

    def shown(self, text: str) -> str:
        """``text`` as it was written, with its quotes."""
        return _QUOTED.sub(lambda match: '"' + self._strings[int(match[1])].replace('"', '""') + '"', text)


def read(text: str, fields: Collection[str]) -> dict[str, Any]:
    """Field -> value, from a recipe's text."""
    text = text.strip()
    where = f"recipe {text!r}"
    quotes = _Quotes(text)
    _refuse_misspelt(quotes, where)
    rules = _RULES.findall(quotes.text)
    words = list(filter(None, re.split(r"[\s;]+", _RULES.sub("", quotes.text))))
    if len(rules) > 1 or any(word.startswith("rules=") for word in words):
        example = 'rules=[fc W=float; "a b" kind=Conv2d A=bfp4]'
        raise RecipeError(f"{where}: rules are one list, such as {example}; quote a pattern that has brackets")
    if not words and not rules:
        words = [""]
    everywhere, named = (words[:1], words[1:]) if words and "=" not in words[0] else ([], words)
    _refuse_bare(named, everywhere, fields, where)
    values: dict[str, Any] = {role: quotes.read(spec) for spec in everywhere for role in ROLES.values()}
    values |= _valued(once(_pairs(named), where, fields), quotes)
    if rules:
        values["rules"] = tuple(_rules(rules[0], quotes, where))
    return values


def _refuse_misspelt(quotes: _Quotes, where: str) -> None:
    """Raises RecipeError for an open quote, a comma between words or a space within one; it has the corrected text."""
    text = quotes.text
    if text.count('"') % 2:
        raise RecipeError(f'{where} has a quote without its end; write a quote within quotes twice: "a""b"')
    if (spaced := re.sub(r",\s*(?=\w+\s*=)", " ", text)) != text:
        raise RecipeError(f"{where} has a comma between words; write {quotes.shown(spaced)!r}")
    if (tight := re.sub(r"\s*=\s*|(?<=,)\s+|\s+(?=[\[(])", lambda gap: gap[0].strip(), text)) != text:
        raise RecipeError(f"{where} has a space within a word; write {quotes.shown(tight)!r}")


def _refuse_bare(named: list[str], everywhere: list[str], fields: Collection[str], where: str) -> None:
    """Raises RecipeError for a word without ``=`` after the first."""
    bare = next((word for word in named if "=" not in word), None)
    if bare is None:
        return
    if ALL_ROLES.get(bare, bare) in fields:
        raise RecipeError(f"{where}: {bare!r} lacks its value; write {bare}=...")
    remedy = _with_role(bare, fields) if everywhere else "put it first"
    raise RecipeError(f"{where}: {bare!r} would override the words before it; {remedy}")


def _with_role(bare: str, fields: Collection[str]) -> str:
    """The remedy for a word without a role, after a format for all roles."""
    name, separator, spec = bare.partition(":")
    if separator and ALL_ROLES.get(name, name) in fields:
        return f"write {name}={spec}"
    try:
        return f"name its role, such as M={Quantizer.parse(bare)}"
    except (FormatError, RecipeError):
        return "write ROLE=FORMAT, such as M=float"


def _pairs(words: list[str]) -> Iterator[list[str]]:
    return (word.split("=", 1) for word in words)


def _valued(given: dict[str, Any], quotes: _Quotes) -> dict[str, Any]:
    """Field -> value, from the texts of fields."""
    values: dict[str, Any] = {}
    for field, value in given.items():
        if field in GLOBS:
            values[field] = tuple(map(quotes.read, value.split(",")))
        elif field in ("quantize_input", "quantize_logits", "in_place"):
            values[field] = {"true": True, "false": False}.get(value, value)
        elif field == "states":
            values[field] = {name: quotes.read(each) for name, each in value.items()}
        else:
            values[field] = quotes.read(value)
    return values


def _is_format(words: list[str], quotes: _Quotes) -> bool:
    """Whether the word, if there is one, is a format with or without its rounding."""
    try:
        return bool(words) and "=" not in words[0] and Quantizer.parse(quotes.read(words[0])) is not None
    except (FormatError, RecipeError):
        return False


def _rules(body: str, quotes: _Quotes, where: str) -> Iterator[Rule]:
    for text in body.split(";"):
        if not (words := text.split()):
            continue
        pattern, *named = words
        everywhere, named = (named[:1], named[1:]) if _is_format(named[:1], quotes) else ([], named)
        wrong = next((word for word in named if "=" not in word), None)
        if wrong is not None or "=" in pattern:
            shown = quotes.shown(text.strip())
            raise RecipeError(
                f"{where}: rule {shown!r} is no pattern with words behind it, such as fc float or fc W=float; quote a "
                "pattern that has spaces, semicolons or ="
            )
        match = quotes.read(pattern)
        given = {role: quotes.read(spec) for spec in everywhere for role in ROLES.values()}
        given |= _valued(once(_pairs(named), f"rule {match!r}", ("kind", *FIELDS_OF_RULE)), quotes)
        yield Rule(match, **given)
