"""A hook of mkdocs: the README is the home page, the reports of `results/` are pages, other files are named.

Links of those pages are relative to the repository; here they lead to the pages of the site, and what is no
page stays as the path that it is.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
REPORTS = {
    f"results/{path.parent.name}/README.md": f"results/{path.parent.name}.md"
    for path in sorted(ROOT.glob("results/*/README.md"))
}
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)]*)?\)")
FIGURE = re.compile(r'src="docs/')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in `docs/`."""
    for source, page in {"README.md": "index.md", **REPORTS}.items():
        text = FIGURE.sub('src="', (ROOT / source).read_text())
        files.append(File.generated(config, page, content=relink(text, source, page)))
    for page in files.documentation_pages():
        source = posixpath.join("docs", page.src_uri)
        if page.generated_by is None:
            page.content_string = relink(page.content_string, source, page.src_uri)
    return files


def relink(text: str, source: str, page: str) -> str:
    """Return `text` of the file `source` with links that hold on `page`; both are posix paths."""

    def link(match: re.Match[str]) -> str:
        words, target, anchor = match[1], match[2], match[3] or ""
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / target).exists():
            raise ValueError(f"{source} links to '{target}', which is not there")
        here = REPORTS.get(target, target.removeprefix("docs/") if target.startswith("docs/") else "")
        if not here:
            return f"{words} (`{target}`)" if target not in words else f"`{target}`"
        return f"[{words}]({posixpath.relpath(here, posixpath.dirname(page) or '.')}{anchor})"

    return LINK.sub(link, text)
