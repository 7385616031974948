"""What README.md and docs/ say about the code is what the code says."""

import re
from pathlib import Path

import pytest

from docs.settings import metrics_table, settings_table

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def table_after(heading: str) -> str:
    """The first table of the section with this heading."""
    lines = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    return "\n".join(lines[start:end])


@pytest.mark.parametrize(("heading", "table"), [("Settings", settings_table()), ("Metrics", metrics_table())])
def test_readme_has_the_table_that_the_code_gives(heading, table):
    assert table_after(heading) == table, "run `python docs/settings.py` and put its tables into README.md"


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_links_lead_somewhere(page):
    path = ROOT / page
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    assert targets and [t for t in targets if not (path.parent / t).exists()] == []


def test_every_file_that_the_architecture_names_is_there():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`((?:vllm_lsa|tests|docs|csrc)/[\w/.]+)`", text))
    assert names and [name for name in names if not (ROOT / name).exists()] == []
