"""The pages: every link within them leads to a file, and to a heading where it names one; their programs run."""

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "csrc").glob("*.md")]


def anchors(page):
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def programs():
    """(page, program) of each block of Python that imports what it needs; the README's is another test's."""
    for page in PAGES:
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            if block.startswith(("import ", "from ")) and page.name != "README.md":
                first = next(line for line in block.splitlines() if line and not line.startswith(("import ", "from ")))
                yield pytest.param(block, id=f"{page.name}: {first[:40]}")


@pytest.mark.parametrize("program", list(programs()))
def test_every_program_runs_as_pasted(program, tmp_path, monkeypatch):
    if ".draw(" in program and shutil.which("dot") is None:
        pytest.skip("Graphviz is not installed")
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "page", "exec"), {"__name__": "page"})
