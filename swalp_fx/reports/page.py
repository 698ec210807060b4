"""One page of HTML: terms, tables, lists, and a few lines of style."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Table", "page"]

STYLE = """
:root { color-scheme: light dark; --line: #d0d7de; --head: #f6f8fa; --soft: #59636e; }
@media (prefers-color-scheme: dark) { :root { --line: #3d444d; --head: #151b23; --soft: #9198a1; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 90rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
code, td { font-family: ui-monospace, monospace; font-size: 13px; }
div { overflow-x: auto; } table { border-collapse: collapse; }
th, td { padding: 0.2rem 0.8rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { position: sticky; top: 0; background: var(--head); } .number { text-align: right; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.2rem 1rem; } dd { margin: 0; }
dt, summary { color: var(--soft); }
"""


@dataclass(frozen=True)
class Table:
    """A header, and rows with as many cells; the last ``numbers`` columns are flush right."""

    header: Sequence[str]
    rows: Iterable[Sequence[str]]
    numbers: int


def page(
    title: str, code: str, terms: Mapping[str, str], table: Table, lists: Iterable[tuple[str, list[str]]], more: Table
) -> str:
    """The whole page; it loads no other file. From the top: a heading with ``code`` beside it, ``terms``, ``table``,
    ``lists`` with their titles, and ``more``, a table that is folded at first."""
    described = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>\n" for term, text in terms.items())
    listed = "".join(f"<h2>{escape(_capital(name))}</h2>\n{_list(lines)}" for name, lines in lists)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(f"{title} in {code}")}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)} <code>{escape(code)}</code></h1>
<dl>
{described}</dl>
{_table(table)}{listed}<details>
<summary>Each {escape(more.header[0])} by itself</summary>
{_table(more)}</details>
</body>
</html>
"""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _list(lines: Iterable[str]) -> str:
    return "<ul>\n" + "".join(f"<li>{escape(line)}</li>\n" for line in lines) + "</ul>\n"


def _table(table: Table) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        first_number = len(cells) - table.numbers
        classes = ("" if i < first_number else ' class="number"' for i in range(len(cells)))
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(classes, cells, strict=True))

    head, body = line("th", table.header), "".join(f"<tr>{line('td', row)}</tr>\n" for row in table.rows)
    return f"<div><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>\n"
