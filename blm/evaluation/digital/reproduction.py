"""What is missing to reproduce a row of the paper's tables, and where to get it.

Facts about the paper are from its project page; what it does not state is called so. Sources that
we have not seen ourselves (weights of other authors, gated clips) are marked in `docs/paper_table.md`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from blm.evaluation.digital import BENCHMARKS
from blm.evaluation.digital.benchmarks import published
from blm.evaluation.digital.benchmarks.benchmark import Benchmark
from blm.evaluation.digital.judge import MatchJudge
from blm.evaluation.digital.result import DigitalResult

Part = Literal["data", "split", "judge", "prompt", "model family"]

COLUMNS: Mapping[str, tuple[Benchmark, int]] = {
    name: (BENCHMARKS[name], count) for name, count in zip(published.SIX, published.COUNTS, strict=True)
}
"""Column of the paper's table -> benchmark and number of questions."""
JUDGED = published.SIX[published.EXACT :]
PAPER_JUDGE = "gpt-4o"
"""The judge that EgoThink's authors use; the paper does not name the version of its own."""


@dataclass(frozen=True, kw_only=True)
class Missing:
    """One thing that is missing to reproduce a row."""

    part: Part
    what: str
    source: str
    """Where to get it, or what to do; "nobody has published it" where there is no source."""


@dataclass(frozen=True, kw_only=True)
class RowGaps:
    """What is missing to reproduce one row of the table."""

    row: str
    published: bool
    missing: tuple[Missing, ...]


def _serve(weights: str, why: str) -> Missing:
    return Missing(
        part="model family",
        what=why,
        source=f"serve {weights} with its authors' code or vLLM and name it openai:MODEL@URL",
    )


def _run(weights: str, family: str) -> Missing:
    return Missing(
        part="model family",
        what=f"weights of about 16 GB; the family {family} runs here",
        source=f"--model {weights} --device cuda",
    )


MODELS: Mapping[str, Missing] = {
    "GPT-4o": Missing(
        part="model family",
        what="closed; the version that the paper asked is not stated",
        source="--model openai:gpt-4o@https://api.openai.com/v1, with a key",
    ),
    "Claude-3.5 Sonnet": Missing(
        part="model family",
        what="closed and retired by its vendor; the version is not stated",
        source="an OpenAI-compatible endpoint that still serves it",
    ),
    "LLaVA-OneVision-7B": _run("llava-hf/llava-onevision-qwen2-7b-ov-hf", "LLaVA-OneVision"),
    "InternVL2.5-8B": _serve(
        "OpenGVLab/InternVL2_5-8B",
        "the family InternVL runs here from folders in transformers' own format; the hub's folder of "
        "this model needs its authors' code (trust_remote_code), which this project never runs",
    ),
    "Qwen2.5-VL-7B-Instruct": _run("qwen2_5_vl_7b", "Qwen2.5-VL"),
    "Cosmos-7B": _run("nvidia/Cosmos-Reason1-7B", "Qwen2.5-VL"),
    "Magma-8B": _serve("microsoft/Magma-8B", "not a family of transformers; it needs its authors' code"),
    "VeBrain-7B": _serve("VeBrain", "we have not seen where its authors publish the weights"),
    "ChatVLA-2B": _serve("ChatVLA", "not a family of transformers; it needs its authors' code"),
    "RoboBrain2-7B": _run("BAAI/RoboBrain2.0-7B", "Qwen2.5-VL"),
    "BLM1": Missing(
        part="model family",
        what="weights of about 16 GB, Stage I only; the family Qwen2.5-VL runs here",
        source="--model FOLDER; github.com/boundless-large-model/BLM-Inference names the chat checkpoint",
    ),
}
"""Published row -> its model."""

UNSTATED = (
    Missing(
        part="prompt",
        what="prompts, frames per clip, resolution, and whether models reason before they answer",
        source="nobody has published it; here each benchmark's own prompt, at most 8 frames",
    ),
    Missing(
        part="judge",
        what="name, version and prompt of the judge of EgoThink and ShareRobot",
        source=f"nobody has published it; here EgoThink's own prompt, e.g. with {PAPER_JUDGE}",
    ),
    Missing(
        part="split",
        what="which 205 episodes of ShareRobot give the 4,100 questions",
        source="nobody has published it; `blm corpus sharerobot DATA` draws a held-out split of that size",
    ),
)
"""What is missing for every published row, because the paper does not state it."""

DATA = tuple(
    Missing(part="data", what=f"{benchmark.title}: {count:,} questions", source=benchmark.get)
    for benchmark, count in COLUMNS.values()
)
"""What every row needs on disk."""


def gaps(results: Sequence[tuple[str, DigitalResult]]) -> list[RowGaps]:
    """Return what is missing for each row: those of `results` (label, result), then the published."""
    rows: dict[str, dict[str, DigitalResult]] = {}
    for label, result in results:
        if result.protocol.benchmark in COLUMNS:
            rows.setdefault(label, {})[result.protocol.benchmark] = result
    measured = [
        RowGaps(row=label, published=False, missing=tuple(_measured(of))) for label, of in rows.items()
    ]
    for_all = (*DATA, *UNSTATED)
    models = [
        RowGaps(row=name, published=True, missing=(MODELS[name], *for_all)) for name in published.DIGITAL
    ]
    return measured + models


def _measured(results: Mapping[str, DigitalResult]) -> list[Missing]:
    """Return what keeps our own row from being one of the paper's table."""
    found = list[Missing]()
    for name, (benchmark, count) in COLUMNS.items():
        if name not in results:
            found.append(Missing(part="data", what=f"{benchmark.title} was not run", source=benchmark.get))
            continue
        protocol = results[name].protocol
        if protocol.count != count:
            found.append(
                Missing(
                    part="split",
                    what=f"{benchmark.title}: {protocol.count} of {count} questions",
                    source="run it again without --limit, on the whole of the benchmark's data",
                )
            )
        if name in JUDGED and protocol.judge in ("", MatchJudge.name):
            found.append(
                Missing(
                    part="judge",
                    what=f"{benchmark.title}: words were compared, no language model judged",
                    source=f"--judge openai:{PAPER_JUDGE}@https://api.openai.com/v1",
                )
            )
        if protocol.compat:
            found.append(
                Missing(
                    part="prompt",
                    what=f"{benchmark.title}: answers were read with --compat {protocol.compat}",
                    source="run it again without --compat; the paper does not state its parser",
                )
            )
    if "sharerobot" in results:
        found.append(UNSTATED[-1])
    return found


def gaps_to_markdown(rows: Sequence[RowGaps]) -> str:
    """Format what is missing; what no published row has is listed once, behind the models."""
    lines = ["### What is missing to reproduce each row", "", "| row | part | missing | source |"]
    lines.append("| --- | --- | --- | --- |")
    lines += [f"| {' | '.join(cells)} |" for cells in gap_cells(rows)]
    return "\n".join(lines) + "\n"


def gap_cells(rows: Sequence[RowGaps]) -> list[tuple[str, str, str, str]]:
    """Return the lines of the table (row, part, missing, source); those that all published rows
    share appear once."""
    shared_parts = (*DATA, *UNSTATED)
    cells = [
        (row.row, one.part, one.what, one.source)
        for row in rows
        for one in row.missing
        if not (row.published and one in shared_parts)
    ]
    whole = [(row.row, "", "nothing", "") for row in rows if not row.missing]
    shared = [("all published rows", one.part, one.what, one.source) for one in shared_parts]
    return cells + whole + shared
