"""Our own scene questions as two benchmarks: they come from a corpus, which the command reads.

`scene` asks the closed questions of the corpus, `scene_free` the free ones.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NoReturn

from blm.evaluation.digital.benchmarks.benchmark import Benchmark
from blm.types import BlmError

GET = (
    "Make a corpus with `blm corpus build` and name its folder: its questions are read by the command "
    "`blm eval digital`, or with blm.corpora.read_questions(FOLDER)."
)
GET_FREE = (
    "Make a corpus with `blm corpus build OUT --answers sentence --free 1 --no-teach --wording held_out ..` "
    "and name its folder: its free questions are read by the command `blm eval digital`, or with "
    "blm.corpora.read_questions(FOLDER, free=True)."
)


def _load(folder: Path, get: str) -> NoReturn:
    raise BlmError(f"scene questions come from a corpus, not from '{folder}'. {get}")


SCENE = Benchmark(
    name="scene",
    title="scene questions",
    get=GET,
    licence="Apache-2.0, as this package",
    load=partial(_load, get=GET),
    max_tokens=128,
)
SCENE_FREE = Benchmark(
    name="scene_free",
    title="free scene questions",
    get=GET_FREE,
    licence="Apache-2.0, as this package",
    load=partial(_load, get=GET_FREE),
    max_tokens=128,
    average="kinds",
)
FROM_CORPUS = (SCENE.name, SCENE_FREE.name)
"""Names of the benchmarks whose questions come from a corpus."""
