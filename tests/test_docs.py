"""The documentation: every block runs, every link leads somewhere, and the site builds."""

import re
import subprocess
import sys
from pathlib import Path

import blocks
import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT / "docs").as_posix())
def test_every_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from orthoact.interp import FAMILIES

    monkeypatch.setattr("orthoact.interp.families.FAMILIES", FAMILIES)
    before = dict(FAMILIES)
    try:
        blocks.run(page.read_text(), page.name, tmp_path)
    finally:
        FAMILIES.clear()
        FAMILIES.update(before)


def test_there_are_blocks():
    count = sum(len(blocks.blocks(page.read_text())) for page in PAGES)
    assert count >= 25, count


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", blocks.FENCE.sub("", page.read_text()))
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    for page in PAGES:
        assert page.relative_to(ROOT / "docs").as_posix() in nav, page


def test_every_public_name_is_in_the_reference():
    import orthoact

    reference = (ROOT / "docs" / "reference" / "python.md").read_text()
    for name, module in orthoact._PUBLIC.items():
        assert f"orthoact.{module}.{name}\n" in reference, name


def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install -e .[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    pages = {path: path.read_text() for path in (tmp_path / "site").rglob("*.html")}
    assert len(pages) > len(PAGES)
    everything = "".join(pages.values())
    assert 'class="arithmatex"' not in everything and "<math" in everything, "formulas are MathML"
    assert "--degree" in (tmp_path / "site" / "reference" / "cli" / "index.html").read_text()
    fetched = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', everything)
    assert not [url for url in fetched if "localhost" not in url], "nothing is fetched from elsewhere"


def test_the_notebook_runs(tmp_path):
    """Its stored outputs are those of a run without an error, and it runs again."""
    pytest.importorskip("nbclient", reason="pip install -e .[dev]")
    nbformat = pytest.importorskip("nbformat")
    import notebook

    stored = nbformat.read(notebook.NOTEBOOK, as_version=4)
    cells = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run python tests/notebook.py"
    assert notebook.NOTEBOOK.stat().st_size < 2e5
    done = notebook.execute(tmp_path)
    for cell in done.cells:
        assert not [out for out in cell.get("outputs", ()) if out.output_type == "error"]
