"""An mkdocs hook that makes README.md the home page and adds the reports in `results/` as pages.

Links between these files are relative to the repository. The hook rewrites them to links between pages of the
site; links to files that are not pages become the path of the file.
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
    """Add the pages that are not in `docs/`, and rewrite the links of all pages."""
    for source, page in {"README.md": "index.md", **REPORTS}.items():
        text = FIGURE.sub('src="', (ROOT / source).read_text())
        files.append(File.generated(config, page, content=relink(text, source, page)))
    for page in files.documentation_pages():
        source = posixpath.join("docs", page.src_uri)
        if page.generated_by is None:
            page.content_string = relink(page.content_string, source, page.src_uri)
    return files


def relink(text: str, source: str, page: str) -> str:
    """Return the `text` of the file `source` with its links rewritten for `page`; both are POSIX paths."""

    def link(match: re.Match[str]) -> str:
        words, target, anchor = match[1], match[2], match[3] or ""
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / target).exists():
            raise ValueError(f"{source} links to '{target}', which does not exist")
        here = REPORTS.get(target, target.removeprefix("docs/") if target.startswith("docs/") else "")
        if not here:
            return f"{words} (`{target}`)" if target not in words else f"`{target}`"
        return f"[{words}]({posixpath.relpath(here, posixpath.dirname(page) or '.')}{anchor})"

    return LINK.sub(link, text)
