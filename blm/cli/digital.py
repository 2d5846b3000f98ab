"""Commands of the digital space: put a benchmark to any model, and lay results beside the paper's tables."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from blm.io import write_text
from blm.types import BlmError, Question, lookup, require_numbers

if TYPE_CHECKING:
    from blm.evaluation.digital.result import AnswerSummary, DigitalResult

console = Console()
MATCH = "match"


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Put a benchmark to one model; write OUT/result.json and OUT/report.html."""

    benchmark: str
    """Name of a benchmark; `scene` for a corpus of our own questions."""
    data: Path
    """Folder with the benchmark's data, in the layout that it publishes; a corpus folder for `scene`."""
    model: str
    """A checkpoint or backbone folder, a backbone's name, or openai:MODEL@URL (URL ends in /v1)."""
    out: Path
    """Folder to write; the same command again continues what was interrupted."""
    judge: str = ""
    """Grades free-form answers: openai:MODEL@URL, or match: compare words (not the paper's metric)."""
    compat: str = ""
    """Read the answers with an upstream parser, to reproduce its numbers; ours is stricter and fairer."""
    coordinates: str = "thousandths"
    """How the model writes places: thousandths, unit, yx1000, pixels or pixels:WIDTHxHEIGHT."""
    limit: int | None = None
    """So many questions, evenly spread; it is then not the benchmark, and its protocol says so."""
    baseline_corpus: Path | None = None
    """Corpus whose answers feed the two baselines that see no picture."""
    batch: int = 16
    """Questions asked together."""
    concurrency: int = 8
    """Requests to an endpoint at the same time."""
    api_key: str | None = None
    """For endpoints; else OPENAI_API_KEY."""
    device: str = "cpu"
    """Torch device of a model that runs here."""

    def __post_init__(self) -> None:
        require_numbers(self, limit=(1, 10**9), batch=(1, 100_000), concurrency=(1, 1024))


def parse_evaluate(command: str, arguments: list[str]) -> Evaluate:
    return tyro.cli(Evaluate, args=arguments, prog=f"blm {command}")


def evaluate(command: str, arguments: list[str]) -> None:
    """`blm eval digital`: any model on any benchmark."""
    from blm.app.chats import find_chat
    from blm.evaluation.digital import BENCHMARKS
    from blm.evaluation.digital.benchmarks.pointing import with_convention
    from blm.evaluation.digital.endpoint import Endpoint, EndpointSettings
    from blm.evaluation.digital.runner import DigitalEvalConfig, evaluate_digital
    from blm.evaluation.digital.subset import evenly_spaced
    from blm.evaluation.digital.table import paper_tables
    from blm.evaluation.report import ReportData, build_report

    chosen = parse_evaluate(command, arguments)
    benchmark = lookup("benchmark", chosen.benchmark, BENCHMARKS)
    convention = chosen.coordinates.partition(":")[0]
    questions = [
        with_convention(question, convention) if question.scorer == "points" else question
        for question in evenly_spaced(load_questions(chosen.benchmark, chosen.data), chosen.limit)
    ]
    known = load_questions("scene", chosen.baseline_corpus) if chosen.baseline_corpus else []
    judge = find_judge(chosen)
    config = DigitalEvalConfig(
        root=chosen.data, coordinates=chosen.coordinates, compat=chosen.compat, batch=chosen.batch
    )
    found = find_chat(
        chosen.model,
        device=chosen.device,
        api_key=chosen.api_key,
        cache=chosen.out / "answers",
        settings=EndpointSettings(concurrency=chosen.concurrency),
    )
    with ExitStack() as open_now:
        for chat in (found.chat, getattr(judge, "chat", None)):
            if isinstance(chat, Endpoint):
                open_now.callback(chat.close)
        result = evaluate_digital(
            found.chat,
            questions,
            chosen.out,
            model=found.name,
            train_questions=known,
            benchmark=benchmark,
            judge=judge,
            config=config,
        )
    print_result(result)
    show_tables([(chosen.model, result)])
    file, page = chosen.out / "result.json", chosen.out / "report.html"
    title, papers = f"{chosen.model}: {benchmark.title}", paper_tables([(chosen.model, result)])
    build_report(ReportData(title=title, digital={title: file}, papers=papers), page)
    console.print(f"result: {file}\nreport: {page}", soft_wrap=True, markup=False)


def load_questions(benchmark: str, folder: Path) -> list[Question]:
    """The questions of a benchmark's folder; those of `scene` come from a corpus. Raises BlmError."""
    from blm.corpora import read_questions
    from blm.evaluation.digital import BENCHMARKS

    if benchmark == "scene":
        return read_questions(folder)
    return lookup("benchmark", benchmark, BENCHMARKS).questions(folder)


def find_judge(chosen: Evaluate) -> Any:
    """The judge that was named, or None."""
    from blm.app.chats import find_endpoint
    from blm.evaluation.digital.judge import LanguageJudge, MatchJudge
    from blm.evaluation.digital.parsers.compat import COMPAT

    if not chosen.judge or chosen.judge == MATCH:
        return MatchJudge() if chosen.judge else None
    endpoint = find_endpoint(chosen.judge, api_key=chosen.api_key)
    reads = chosen.compat in COMPAT and COMPAT[chosen.compat].rating is not None
    cache = chosen.out / "judgements"
    return LanguageJudge(endpoint, endpoint.name, cache=cache, compat=chosen.compat if reads else "")


def print_result(result: DigitalResult) -> None:
    """Print the score of every kind beside the baselines, and counts of unread and unjudged answers."""
    baselines, summary = result.baselines, result.summary
    table = Table(box=None)
    for heading in (
        "kind",
        "n",
        "score",
        "95 %",
        *baselines,
        "unread",
        "refused",
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
    """The cells of a row of scores, after its name."""
    median, cm = part.median_error, part.median_error_cm
    return [
        str(part.n),
        f"{part.rate:.1%}",
        f"{part.low:.1%} to {part.high:.1%}",
        *(f"{baseline.rate:.1%}" for baseline in baselines),
        *(str(count) for count in (part.unread, part.refused, part.unjudged)),
        f"{median:.0f} ‰" if median is not None else f"{cm:.1f} cm" if cm is not None else "-",
    ]


def table(command: str, arguments: list[str]) -> None:
    """`blm eval table DIR...`: results in the paper's tables, beside the published rows."""

    def run(results: tyro.conf.Positional[tuple[str, ...]], out: Path | None = None) -> None:
        """Lay digital results beside the tables of the paper.

        Args:
            results: Folders of evaluations, each DIR or LABEL=DIR; one label is one line.
            out: File to write as well, .md or .html.
        """
        found = [_labelled(entry) for entry in results]
        if not found:
            raise BlmError(f"name the folders of digital evaluations: blm {command} DIR... or LABEL=DIR...")
        if out and out.suffix not in (".md", ".html"):
            raise BlmError(f"'{out}': tables are written as .md or .html")
        show_tables([(entry.label, entry.result) for entry in found])
        for entry in found:
            console.print(f"\n[bold]{escape(entry.label)}[/bold]")
            print_result(entry.result)
        if out:
            _write_tables(found, out)
            console.print(f"wrote {out}", soft_wrap=True, markup=False)

    tyro.cli(run, args=arguments, prog=f"blm {command}")


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
        raise BlmError(f"'{folder}' is a {result.kind} result; these tables are of digital results")
    return _Labelled(label or result.model, path, result)


def show_tables(results: Sequence[tuple[str, DigitalResult]]) -> None:
    """Print the paper's tables with these results in them; nothing for other benchmarks."""
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


def _write_tables(found: Sequence[_Labelled], out: Path) -> None:
    from blm.evaluation.digital.table import paper_tables, to_markdown
    from blm.evaluation.report import ReportData, build_report

    papers = paper_tables([(entry.label, entry.result) for entry in found])
    if out.suffix == ".md":
        write_text(out, "\n".join(map(to_markdown, papers)))
        return
    digital = {f"{entry.label}: {entry.result.protocol.benchmark}": entry.path for entry in found}
    build_report(ReportData(title="Digital space", digital=digital, papers=papers), out)
