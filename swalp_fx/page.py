"""A report as one page of HTML: a table, lists, and a few lines of style."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .reported import Report

__all__ = ["page"]

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


def page(report: Report) -> str:
    """The page, whole: it loads nothing."""
    title = f"{report.model} in {report.recipe}"
    totals = "".join(f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>\n" for label, text in report.totals.items())
    lists = "".join(f"<h2>{escape(_capital(name))}</h2>\n{_list(lines)}" for name, lines in report.lists())
    parameters = [
        [each.name, "x".join(map(str, each.shape)), each.format, f"{each.values:,}", f"{each.bits:,}"]
        for each in report.parameters
    ]
    header = ["parameter", "shape", "format", "values", "bits"]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(report.model)} <code>{escape(report.recipe)}</code></h1>
<dl>
{totals}</dl>
{_table(report.header, report.rows(), report.numbers)}{lists}<details>
<summary>{len(parameters)} parameters, each by itself</summary>
{_table(header, parameters, 2)}</details>
</body>
</html>
"""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _list(lines: Iterable[str]) -> str:
    return "<ul>\n" + "".join(f"<li>{escape(line)}</li>\n" for line in lines) + "</ul>\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: int) -> str:
    """The last ``numbers`` columns are flush right."""

    def line(tag: str, cells: Sequence[str]) -> str:
        first_number = len(cells) - numbers
        classes = ("" if i < first_number else ' class="number"' for i in range(len(cells)))
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(classes, cells, strict=True))

    body = "".join(f"<tr>{line('td', row)}</tr>\n" for row in rows)
    return f"<div><table>\n<thead><tr>{line('th', header)}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>\n"
