"""The documentation builds strictly, and every link and picture in it leads somewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse

import pytest

ROOT = Path(__file__).parents[1]


class Page(HTMLParser):
    """What a page leads to, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.targets += [value for name in ("href", "src") if (value := found.get(name))]
        self.anchors |= {value for name in ("id", "name") if (value := found.get(name))}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[Path, Page]:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert built.returncode == 0, built.stderr[-2000:]
    return {path.resolve(): Page(path.read_text()) for path in folder.rglob("index.html")}


def test_links_lead_somewhere(site):
    checked = 0
    for path, page in site.items():
        for target in page.targets:
            address, anchor = urldefrag(target)
            if urlparse(address).scheme:
                continue
            place = (path.parent / unquote(address)).resolve() if address else path
            place = place / "index.html" if place.is_dir() else place
            assert place.exists(), f"{path} -> {target}"
            if anchor and place in site:
                assert unquote(anchor) in site[place].anchors, f"{path} -> {target}"
            checked += 1
    assert len(site) > 12 and checked > 500


def test_nothing_is_fetched_from_elsewhere(site):
    for path in site:
        text = path.read_text()
        assert "fonts.googleapis" not in text and "cdn." not in text, path


def test_the_reference_has_what_the_readme_calls(site):
    (anchors,) = (page.anchors for path, page in site.items() if path.parent.name == "api")
    for name in (
        "blm.app.pretrained.BLM.act",
        "blm.app.pretrained.BLM.answer",
        "blm.tasks.env.Env",
        "blm.types.Message",
    ):
        assert name in anchors
