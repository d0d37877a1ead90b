"""``make docs``: the site builds without a warning, and a page that is wrong stops it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOADED = re.compile(
    r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)"
)
UNRENDERED = re.compile(r"<p>(?:[^<]*\n)?(?:[-*] |\| |\d+\. |```)")


def build(docs: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "mkdocs", "build", "--strict"),
            *("-f", str(docs / "site/mkdocs.yml"), "-d", str(site)),
        ],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},  # of its future, on every build
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("site")
    run = build(ROOT / "docs", site)
    assert run.returncode == 0, run.stderr
    assert "WARNING" not in run.stderr
    return site


def test_every_page_is_built_with_its_lists_and_tables(site: Path) -> None:
    for page in (ROOT / "docs").glob("*.md"):
        html = (site / f"{page.stem}.html").read_text(encoding="utf-8")
        assert UNRENDERED.search(html) is None, UNRENDERED.search(html)
    assert (site / "images/run.png").exists()
    assert not (site / "site").exists(), "its own configuration is no part of it"


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert LOADED.findall(page.read_text(encoding="utf-8")) == []


def append(name: str, text: str) -> Callable[[Path], object]:
    def change(docs: Path) -> None:
        path = docs / name
        path.write_text((path.read_text() if path.exists() else "") + text)

    return change


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (append("limits.md", "\n[x](absent.md)\n"), "absent.md"),
        (append("limits.md", "\n[x](weights.md#absent)\n"), "anchor .*#absent|#absent.* anchor"),
        (append("limits.md", "\n[x](#absent)\n"), "anchor .*#absent|#absent.* anchor"),
        (append("limits.md", "\n[x](../absent.py)\n"), "absent.py, which is not there"),
        (append("forgotten.md", "# Forgotten\n"), "forgotten.md"),
    ],
    ids=["page", "anchor", "own anchor", "file", "navigation"],
)
def test_a_wrong_link_or_a_forgotten_page_stops_the_build(
    change: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    # Links out of docs/ need something to point at.
    docs = tmp_path / "repository" / "docs"
    shutil.copytree(ROOT / "docs", docs)
    example = docs.parent / "trainer/examples/bare_loop.py"
    example.parent.mkdir(parents=True)
    example.touch()
    change(docs)
    run = build(docs, tmp_path / "site")
    assert run.returncode != 0
    assert re.search(message, run.stderr), run.stderr
