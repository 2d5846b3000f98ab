"""Commands of the digital space: put a benchmark to any model, and lay results beside the paper's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from blm.io import write_text
from blm.types import BlmError, Question, lookup, require_numbers

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
    from blm.evaluation.digital.benchmarks.pointing import asked_in
    from blm.evaluation.digital.endpoint import Endpoint, Settings
    from blm.evaluation.digital.runner import Asking, evaluate_digital
    from blm.evaluation.digital.subset import evenly_spaced
    from blm.evaluation.digital.table import paper_tables
    from blm.evaluation.report import ReportData, build_report

    chosen = parse_evaluate(command, arguments)
    benchmark = lookup("benchmark", chosen.benchmark, BENCHMARKS)
    convention = chosen.coordinates.partition(":")[0]
    questions = [
        asked_in(question, convention) if question.scorer == "points" else question
        for question in evenly_spaced(load_questions(chosen.benchmark, chosen.data), chosen.limit)
    ]
    known = load_questions("scene", chosen.baseline_corpus) if chosen.baseline_corpus else []
    judge = find_judge(chosen)
    asking = Asking(
        root=chosen.data, coordinates=chosen.coordinates, compat=chosen.compat, batch=chosen.batch
    )
    found = find_chat(
        chosen.model,
        device=chosen.device,
        api_key=chosen.api_key,
        cache=chosen.out / "answers",
        settings=Settings(concurrency=chosen.concurrency),
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
            asking=asking,
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


def print_result(result: Mapping[str, Any]) -> None:
    """Print the scores of every kind, beside the baselines, and what could not be read or judged."""
    baselines = result["baselines"]
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
    for name, part in [*result["kinds"].items(), ("all", result["overall"])]:
        sides = [(b["kinds"][name] if name != "all" else b["overall"])["rate"] for b in baselines.values()]
        median, cm = part["median_error"], part["median_error_cm"]
        error = f"{median:.0f} ‰" if median is not None else f"{cm:.1f} cm" if cm is not None else "-"
        counts = (str(part[what]) for what in ("unread", "refused", "unjudged"))
        interval = f"{part['low']:.1%} to {part['high']:.1%}"
        shares = (f"{rate:.1%}" for rate in sides)
        table.add_row(name, str(part["n"]), f"{part['rate']:.1%}", interval, *shares, *counts, error)
    Console(width=max(console.width, 130)).print(table)
    headline, protocol = result["headline"], result["protocol"]
    over = "over kinds" if headline["average"] == "kinds" else "over questions"
    interval = f"({headline['low']:.1%} to {headline['high']:.1%})"
    console.print(
        f"{protocol['benchmark']}: {headline['rate']:.1%} {interval}, mean {over}, n = {headline['n']}"
    )
    for name, part in result["balanced"].items():
        console.print(
            f"balanced accuracy, {name}: {part['rate']:.1%} ({part['low']:.1%} to {part['high']:.1%}); "
            f"right on yes {part['yes']['rate']:.0%}, on no {part['no']['rate']:.0%}; "
            f"says yes to {part['said_yes']:.0%}"
        )
    for name, part in baselines.items():
        gain = part["model_minus_baseline"]
        points = [100 * gain[key] for key in ("difference", "low", "high")]
        text = f"{points[0]:+.1f} points ({points[1]:+.1f} to {points[2]:+.1f})"
        console.print(f"model minus {name.replace('_', ' ')}: {text}")
    if judge := result["judge"]:
        known = judge["calibration"]
        console.print(
            f"judge {judge['model']}: agrees on {known['agree']} of {known['n']} answers with known grades "
            f"({known['failed']} failed)",
            markup=False,
            soft_wrap=True,
        )


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
    result: Mapping[str, Any]


def _labelled(entry: str) -> _Labelled:
    from blm.evaluation.results import load_result

    label, _, folder = entry.rpartition("=")
    path = Path(folder) / "result.json" if Path(folder).is_dir() else Path(folder)
    result = load_result(path)
    if result["kind"] != "digital":
        raise BlmError(f"'{folder}' is a result of the {result['kind']} space; these tables are digital")
    return _Labelled(label or result["model"], path, result)


def show_tables(results: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Print the paper's tables with these results in them; nothing for other benchmarks."""
    from blm.evaluation.digital.table import NOTE, paper_tables

    for paper in paper_tables(results):
        shown = Table(title=paper.title, caption=f"dim: {NOTE}; in brackets: 95 % interval")
        shown.add_column("model")
        for column in paper.columns:
            shown.add_column(column.replace("_", " "), justify="right")
        for line in paper.lines:
            cells = (cell.text() if cell else "-" for cell in line.cells)
            shown.add_row(escape(line.model), *cells, style="dim" if line.published else "bold")
        Console(width=max(console.width, 130)).print(shown)


def _write_tables(found: Sequence[_Labelled], out: Path) -> None:
    from blm.evaluation.digital.table import paper_tables, to_markdown
    from blm.evaluation.report import ReportData, build_report

    papers = paper_tables([(entry.label, entry.result) for entry in found])
    if out.suffix == ".md":
        write_text(out, "\n".join(map(to_markdown, papers)))
        return
    digital = {f"{entry.label}: {entry.result['protocol']['benchmark']}": entry.path for entry in found}
    build_report(ReportData(title="Digital space", digital=digital, papers=papers), out)
