"""The commands in README.md."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]

README = (ROOT / "README.md").read_text()

PAGES = [
    README,
    *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))),
]

COMMANDS = [
    line.replace("\\\n", " ")
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    for line in re.findall(r"(?:[^\\\n]|\\\n)+", block)
    if line and not line.startswith("#")
]
