"""Our own scene questions as a benchmark: they come from a corpus, which the command reads."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from blm.evaluation.digital.benchmarks.benchmark import Benchmark
from blm.types import BlmError

GET = (
    "Make a corpus with `blm corpus build` and name its folder: its questions are read by the command "
    "`blm eval digital`, or with blm.corpora.read_corpus(FOLDER) and Conversation.questions()."
)


def _load(folder: Path) -> NoReturn:
    raise BlmError(f"the questions of benchmark 'scene' come from a corpus, not from '{folder}'. {GET}")


SCENE = Benchmark(
    name="scene",
    title="scene questions",
    get=GET,
    licence="Apache-2.0, as this package",
    load=_load,
    max_tokens=128,
)
