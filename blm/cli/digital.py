"""Commands for question benchmarks: evaluate models, show the paper's tables."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from blm.cli.command import CliCommand
from blm.io import write_text
from blm.types import BlmError, Question, lookup, require_numbers

if TYPE_CHECKING:
    from blm.evaluation.digital.judge import LanguageJudge, MatchJudge
    from blm.evaluation.digital.result import AnswerSummary, DigitalResult

console = Console()
MATCH = "match"


@dataclass(frozen=True, kw_only=True)
class EvaluateDigital(CliCommand):
    """Evaluate a model on a question benchmark; write OUT/result.json and OUT/report.html.

    Example: blm eval digital --benchmark scene --data runs/demo/corpora/held_out --model blm-nano
    --out results/scene
    """

    benchmark: str
    """Name of the benchmark; `scene` reads the closed questions of a corpus of scene questions, and
    `scene_free` its free ones."""
    data: Path
    """Folder of the benchmark's data in its published layout; for `scene` and `scene_free`, a
    corpus folder."""
    model: str
    """Folder of a checkpoint or backbone, the name of a backbone, or openai:MODEL@URL.
    The URL ends in /v1."""
    out: Path
    """Folder to write. Run the same command again to resume."""
    judge: str = ""
    """Judge of free-form answers: openai:MODEL@URL, or `match`, which compares words.
    The paper does not use `match`."""
    compat: str = ""
    """Parse answers as an upstream repository does, to reproduce its numbers.
    Our own parser is stricter."""
    coordinates: str = "thousandths"
    """How the model writes coordinates: thousandths, unit, yx1000, pixels (of the picture as the model
    saw it), pixels:original, pixels:qwen2_5_vl (for an endpoint) or pixels:WIDTHxHEIGHT."""
    limit: int | None = None
    """Ask only this number of questions, evenly spaced.
    The result is then only comparable with results of the same limit."""
    baseline_corpus: Path | None = None
    """Corpus whose answers train the two baselines that see no image."""
    max_tokens: int | None = None
    """Longest answer [tokens], thoughts included.
    By default that of the benchmark, and for a model that thinks as much more as its generation
    config says."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Whether the model thinks before it answers: auto, as its chat template has it; on; off.
    For an endpoint, on and off are sent as enable_thinking of its chat template."""
    batch: int = 16
    """Number of questions per batch of a local model."""
    concurrency: int = 8
    """Number of simultaneous requests to an endpoint."""
    api_key: str | None = None
    """API key of an endpoint; by default the environment variable OPENAI_API_KEY."""
    device: str = "cpu"
    """Torch device of a model that runs here: cpu, cuda, cuda:N or mps."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of a backbone that runs here; by default bfloat16 on CUDA, and the stored precision
    elsewhere."""
    attn_implementation: str | None = None
    """Attention implementation in transformers: eager, sdpa, flash_attention_2, ..; by default the
    model's own."""

    def __post_init__(self) -> None:
        require_numbers(self, limit=(1, 10**9), batch=(1, 100_000), concurrency=(1, 1024))
        require_numbers(self, max_tokens=(1, 10**6))

    def run(self, command_line: Sequence[str]) -> None:
        from blm.app.chats import load_chat
        from blm.evaluation.digital import BENCHMARKS
        from blm.evaluation.digital.benchmarks.pointing import with_convention
        from blm.evaluation.digital.benchmarks.scene_questions import SCENE, SCENE_FREE
        from blm.evaluation.digital.endpoint import Endpoint, EndpointSettings
        from blm.evaluation.digital.runner import DigitalEvalConfig, evaluate_digital
        from blm.evaluation.digital.subset import evenly_spaced

        benchmark = lookup("benchmark", self.benchmark, BENCHMARKS)
        convention = self.coordinates.partition(":")[0]
        questions = [
            with_convention(question, convention) if question.scorer == "points" else question
            for question in evenly_spaced(load_questions(self.benchmark, self.data), self.limit)
        ]
        kind = SCENE_FREE.name if benchmark is SCENE_FREE else SCENE.name
        known = load_questions(kind, self.baseline_corpus) if self.baseline_corpus else []
        judge = find_judge(self)
        config = DigitalEvalConfig(
            root=self.data,
            coordinates=self.coordinates,
            compat=self.compat,
            max_tokens=self.max_tokens,
            thinking=self.thinking,
            batch=self.batch,
        )
        loaded = load_chat(
            self.model,
            device=self.device,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            api_key=self.api_key,
            cache=self.out / "answers",
            settings=EndpointSettings(concurrency=self.concurrency, thinking=self.thinking),
        )
        with ExitStack() as endpoints:
            for chat in (loaded.chat, getattr(judge, "chat", None)):
                if isinstance(chat, Endpoint):
                    endpoints.callback(chat.close)
            result = evaluate_digital(
                loaded.chat,
                questions,
                self.out,
                model=loaded.revision,
                train_questions=known,
                benchmark=benchmark,
                judge=judge,
                config=config,
            )
        print_result(result)
        show_tables([(self.model, result)])
        self._report(f"{self.model}: {benchmark.title}", result)

    def _report(self, title: str, result: DigitalResult) -> None:
        from blm.evaluation.digital.table import paper_tables
        from blm.evaluation.report import ReportData, build_report

        file = self.out / "result.json"
        page = self.out / "report.html"
        papers = paper_tables([(self.model, result)])
        build_report(ReportData(title=title, digital={title: file}, papers=papers), page)
        console.print(f"result: {file}\nreport: {page}", soft_wrap=True, markup=False)


def load_questions(benchmark: str, folder: Path) -> list[Question]:
    """Return the questions of a benchmark; those of scenes are from a corpus.

    Raises BlmError, also for a corpus without such questions.
    """
    from blm.corpora import read_questions
    from blm.evaluation.digital import BENCHMARKS
    from blm.evaluation.digital.benchmarks.scene_questions import FROM_CORPUS, SCENE_FREE

    if benchmark in FROM_CORPUS:
        questions = read_questions(folder, free=benchmark == SCENE_FREE.name)
        if not questions:
            raise BlmError(
                f"corpus '{folder}' has no questions of '{benchmark}'. {BENCHMARKS[benchmark].get}"
            )
        return questions
    return lookup("benchmark", benchmark, BENCHMARKS).questions(folder)


def find_judge(chosen: EvaluateDigital) -> MatchJudge | LanguageJudge | None:
    """Return the judge that --judge names, or None without one."""
    from blm.app.chats import open_endpoint
    from blm.evaluation.digital.judge import LanguageJudge, MatchJudge
    from blm.evaluation.digital.parsers.compat import COMPAT

    if not chosen.judge or chosen.judge == MATCH:
        return MatchJudge() if chosen.judge else None
    endpoint = open_endpoint(chosen.judge, api_key=chosen.api_key)
    reads = chosen.compat in COMPAT and COMPAT[chosen.compat].rating is not None
    cache = chosen.out / "judgements"
    return LanguageJudge(endpoint, endpoint.name, cache=cache, compat=chosen.compat if reads else "")


def print_result(result: DigitalResult) -> None:
    """Print the scores of every kind, the baselines, and unparsed and unjudged counts."""
    baselines, summary = result.baselines, result.summary
    table = Table(box=None)
    for heading in (
        "kind",
        "n",
        "score",
        "95 %",
        *baselines,
        "unread",
        "truncated",
        "failed",
        "unjudged",
        "median error",
    ):
        table.add_column(heading.replace("_", " "), justify="left" if heading == "kind" else "right")
    for name, part in summary.kinds.items():
        table.add_row(name, *_cells(part, [b.summary.kinds[name] for b in baselines.values()]))
    table.add_row("all", *_cells(summary.overall, [b.summary.overall for b in baselines.values()]))
    Console(width=max(console.width, 130)).print(table)
    headline = summary.headline
    over = "over kinds" if headline.average == "kinds" else "over questions"
    interval = f"({headline.low:.1%} to {headline.high:.1%})"
    console.print(
        f"{result.protocol.benchmark}: {headline.rate:.1%} {interval}, mean {over}, n = {headline.n}"
    )
    if summary.overall.truncated:
        limit = result.protocol.max_tokens
        console.print(
            f"{summary.overall.truncated} of {summary.overall.n} answers were cut at their limit ({limit} "
            "tokens, or that of their kind): give more with --max-tokens, or --thinking on for a model that "
            "thinks first"
        )
    for failed in [one for one in result.predictions if one.failure][:5]:
        console.print(f"no answer to '{failed.id}': {failed.failure}", soft_wrap=True, markup=False)
    for name, balanced in summary.balanced.items():
        console.print(
            f"balanced accuracy, {name}: {balanced.rate:.1%} ({balanced.low:.1%} to {balanced.high:.1%}); "
            f"recall of yes {balanced.yes.rate:.0%}, of no {balanced.no.rate:.0%}; "
            f"answers yes to {balanced.said_yes:.0%}"
        )
    for name, baseline in baselines.items():
        gain = baseline.model_minus_baseline
        points = [100 * value for value in (gain.difference, gain.low, gain.high)]
        text = f"{points[0]:+.1f} points ({points[1]:+.1f} to {points[2]:+.1f})"
        console.print(f"model minus {name.replace('_', ' ')}: {text}")
    if result.judge is not None:
        known = result.judge.calibration
        console.print(
            f"judge {result.judge.model}: agrees on {known.agree} of {known.n} answers with known grades "
            f"({known.failed} failed)",
            markup=False,
            soft_wrap=True,
        )


def _cells(part: AnswerSummary, baselines: Sequence[AnswerSummary]) -> list[str]:
    """Return the cells of a row of scores, without its name."""
    median, cm = part.median_error, part.median_error_cm
    return [
        str(part.n),
        f"{part.rate:.1%}",
        f"{part.low:.1%} to {part.high:.1%}",
        *(f"{baseline.rate:.1%}" for baseline in baselines),
        str(part.unread),
        "-" if part.truncated is None else str(part.truncated),
        *(str(count) for count in (part.refused, part.unjudged)),
        f"{median:.0f} ‰" if median is not None else f"{cm:.1f} cm" if cm is not None else "-",
    ]


@dataclass(frozen=True, kw_only=True)
class ShowTable(CliCommand):
    """Show digital results next to the published rows of the paper's tables, and what is missing to
    reproduce each row.

    Example: blm eval table mine=results/robovqa --out table.md
    """

    results: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="[RESULT ...]"),
    ] = ()
    """Folders of digital evaluations, each as DIR or LABEL=DIR.
    Results with one label share a row. Without any, the published rows alone are shown."""
    out: Path | None = None
    """File to write the tables to, .md or .html."""

    def run(self, command_line: Sequence[str]) -> None:
        found = [_labelled(entry) for entry in self.results]
        if self.out and self.out.suffix not in (".md", ".html"):
            raise BlmError(f"'{self.out}': tables are written as .md or .html")
        results = [(entry.label, entry.result) for entry in found]
        show_tables(results)
        _show_gaps(results)
        for entry in found:
            console.print(f"\n[bold]{escape(entry.label)}[/bold]")
            print_result(entry.result)
        if self.out:
            _write_tables(found, self.out)
            console.print(f"wrote {self.out}", soft_wrap=True, markup=False)


@dataclass(frozen=True)
class _Labelled:
    label: str
    path: Path
    result: DigitalResult


def _labelled(entry: str) -> _Labelled:
    from blm.evaluation.digital.result import DigitalResult
    from blm.evaluation.result_files import load_result

    label, _, folder = entry.rpartition("=")
    path = Path(folder) / "result.json" if Path(folder).is_dir() else Path(folder)
    result = load_result(path)
    if not isinstance(result, DigitalResult):
        raise BlmError(f"'{folder}' is a {result.kind} result; these tables show digital results")
    return _Labelled(label or result.model, path, result)


def show_tables(results: Sequence[tuple[str, DigitalResult]]) -> None:
    """Print the paper's tables that these results belong to, with the results as further rows."""
    from blm.evaluation.digital.table import NOTE, paper_tables

    for paper in paper_tables(results):
        shown = Table(title=paper.title, caption=f"dim: {NOTE}; in brackets: 95 % interval")
        shown.add_column("model")
        for column in paper.columns:
            shown.add_column(column.replace("_", " "), justify="right")
        for row in paper.rows:
            scores = (score.text() if score else "-" for score in row.scores)
            shown.add_row(escape(row.model), *scores, style="dim" if row.published else "bold")
        Console(width=max(console.width, 130)).print(shown)


def _show_gaps(results: Sequence[tuple[str, DigitalResult]]) -> None:
    """Print what is missing to reproduce each row of the paper's table."""
    from blm.evaluation.digital.reproduction import gap_cells, gaps

    shown = Table(title="What is missing to reproduce each row", show_lines=True)
    for heading in ("row", "part", "missing", "source"):
        shown.add_column(heading, overflow="fold")
    for cells in gap_cells(gaps(results)):
        shown.add_row(*map(escape, cells))
    Console(width=max(console.width, 130)).print(shown)


def _write_tables(found: Sequence[_Labelled], out: Path) -> None:
    from blm.evaluation.digital.reproduction import gaps, gaps_to_markdown
    from blm.evaluation.digital.table import paper_tables, to_markdown
    from blm.evaluation.report import ReportData, build_report

    results = [(entry.label, entry.result) for entry in found]
    papers, missing = paper_tables(results), gaps(results)
    if out.suffix == ".md":
        write_text(out, "\n".join([*map(to_markdown, papers), gaps_to_markdown(missing)]))
        return
    digital = {f"{entry.label}: {entry.result.protocol.benchmark}": entry.path for entry in found}
    build_report(ReportData(title="Digital space", digital=digital, papers=papers, gaps=missing), out)
