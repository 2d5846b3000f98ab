"""Scan a corpus file in parallel: where the rows are, which media they show, what is wrong with them.

A part of the file is a work unit, so a killed scan goes on where it stopped. Media are not opened.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from blm.backbone.prompt import PromptOrder, order_of
from blm.corpora.format.faults import Fault, RowError
from blm.corpora.format.messages import (
    CORPUS_FILE,
    Conversation,
    parse_json_line,
    parse_row,
    reserved_scenes,
)
from blm.corpora.format.row_index import PLACE, CorpusRows
from blm.io import read_json, write_array, write_json
from blm.jobs import Result, WorkUnit, run_units
from blm.seeds import count_reserved_seeds
from blm.types import Training

PART_BYTES = 8_000_000
"""Size of the part of a corpus file that is scanned as one work unit."""
KEPT_FAULTS = 100
"""Faults of one reason that are kept with their places; all are counted."""
_SCANNED = np.dtype([*PLACE.descr, ("identity", "<u8")])


@dataclass(frozen=True, kw_only=True)
class CorpusFacts:
    """What Stage I records of a corpus as a whole."""

    training: tuple[Training, ...] = ()
    """How its simulated scenes varied."""
    orders: tuple[PromptOrder, ...] = ()
    """Orders of its control prompts."""
    reserved: dict[str, int] | None = None
    """Purpose -> number of its scenes that are reserved for it."""

    @classmethod
    def of(cls, rows: Iterable[Conversation]) -> CorpusFacts:
        """Return the facts of conversations in memory."""
        return _joined([_facts(list(rows))])

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CorpusFacts:
        """Read what `asdict` gives, as JSON keeps it."""
        return cls(
            training=tuple(value["training"]), orders=tuple(value["orders"]), reserved=value["reserved"]
        )


@dataclass(frozen=True, kw_only=True)
class Scan:
    """The rows of a corpus file, and the media that they show."""

    folder: Path
    """Folder with places.npy (of the rows without faults), media.json (their references, sorted) and
    scan.json."""
    rows: int
    """Number of rows, with faults or without."""
    faults: tuple[Fault, ...]
    """At most `KEPT_FAULTS` of each reason."""
    counts: dict[str, int]
    """Reason -> number of rows with this fault."""
    facts: CorpusFacts

    def media(self) -> list[str]:
        """Return the references of all media, sorted."""
        names: list[str] = read_json(self.folder / "media.json")
        return names


def scan_in_parts(corpus: Path, folder: Path, *, workers: int) -> Scan:
    """Scan a corpus in worker processes, with 0 in this one; write the result to `folder`.

    `folder` is named after the content of the file, so a finished scan in it is returned.
    """
    done = folder / "scan.json"
    if not done.exists():
        file = corpus / CORPUS_FILE
        size = file.stat().st_size
        parts = [(begin, min(begin + PART_BYTES, size)) for begin in range(0, size, PART_BYTES)]
        units = [
            WorkUnit(f"{begin}", (file, begin, end, folder / f"scan-{number:05d}.npy"))
            for number, (begin, end) in enumerate(parts)
        ]
        journal = folder / "journal-scan.jsonl"
        workers = workers if len(units) > 1 else 0  # a process takes longer to start
        results = run_units(
            scan_part, units, journal=journal, workers=workers, title=f"scanning {corpus.name}"
        )
        _join(corpus, folder, list(results.values()), [unit.payload[3] for unit in units])
    found = read_json(done)
    return Scan(
        folder=folder,
        rows=found["rows"],
        faults=tuple(Fault(*fault) for fault in found["faults"]),
        counts=found["counts"],
        facts=CorpusFacts.from_json(found["facts"]),
    )


def scan_part(payload: tuple[Path, int, int, Path]) -> Result:
    """Scan the lines that begin in a part of the file; lines are numbered from the part's first."""
    file, begin, end, out = payload
    places, media, faults, rows = [], set[str](), list[tuple[int, str, str]](), list[Conversation]()
    number = -1
    for number, (offset, line) in enumerate(_lines(file, begin, end)):
        if not line.strip():
            continue
        try:
            parsed = parse_json_line(line)
            row = parse_row(parsed, number)
        except RowError as error:
            faults.append((number, error.reason, error.detail))
            continue
        named = "id" in parsed
        places.append((offset, len(line), number, key_of(row.id) if named else 0))
        media |= {str(image.path) for image in row.media}
        rows.append(row)
    write_array(out, np.array(places, dtype=_SCANNED))
    write_json(out.with_suffix(".json"), sorted(media))
    return {"lines": number + 1, "faults": faults, "facts": _facts(rows)}


def key_of(name: str) -> int:
    """Return a hash of 64 bits of an id or a reference, never 0."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") or 1


def limit_faults(faults: Iterable[Fault]) -> tuple[tuple[Fault, ...], dict[str, int]]:
    """Return the first faults of each reason, and the number of all by reason, most frequent first."""
    counts, kept = Counter[str](), list[Fault]()
    for fault in faults:
        counts[fault.reason] += 1
        if counts[fault.reason] <= KEPT_FAULTS:
            kept.append(fault)
    return tuple(kept), dict(counts.most_common())


def _lines(file: Path, begin: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Yield offset and bytes of each line that begins in [begin, end)."""
    with file.open("rb") as source:
        offset = begin
        if begin:
            source.seek(begin - 1)
            offset += len(source.readline()) - 1
        while offset < end and (line := source.readline()):
            yield offset, line
            offset += len(line)


def _facts(rows: Sequence[Conversation]) -> dict[str, list[str]]:
    taught = (row for row in rows if "control" in row.kinds)
    orders = {order_of(asked) for row in taught for kind, asked, _ in row.turns() if kind == "control"}
    return {
        "training": sorted({row.training for row in rows}),
        "orders": sorted(orders),
        "reserved": sorted({row.group for row in rows if reserved_scenes([row])}),
    }


def _joined(parts: Sequence[dict[str, list[str]]]) -> CorpusFacts:
    found = {name: {value for part in parts for value in part[name]} for name in ("training", "orders")}
    groups = {group for part in parts for group in part["reserved"]}
    training: Any = tuple(kind for kind in get_args(Training) if kind in found["training"])
    orders: Any = tuple(sorted(found["orders"]))
    seeds = (int(group.split("/")[3]) for group in groups)
    return CorpusFacts(training=training, orders=orders, reserved=count_reserved_seeds(seeds))


def _join(corpus: Path, folder: Path, results: Sequence[Result], files: Sequence[Path]) -> None:
    """Write places.npy, media.json and scan.json from the results of all parts; remove these."""
    places, faults, line = list[np.ndarray](), list[Fault](), 1
    for result, file in zip(results, files, strict=True):
        own = np.load(file)
        own["line"] += line
        places.append(own)
        faults += [
            Fault(f"{corpus / CORPUS_FILE}:{number + line}", reason, detail)
            for number, reason, detail in result["faults"]
        ]
        line += result["lines"]
    every = np.concatenate(places) if places else np.zeros(0, dtype=_SCANNED)
    unnamed = np.flatnonzero(every["identity"] == 0)
    every["identity"][unnamed] = [key_of(f"row-{every['line'][place]}") for place in unnamed.tolist()]
    _, first, inverse = np.unique(every["identity"], return_index=True, return_inverse=True)
    repeated = np.flatnonzero(first[inverse] != np.arange(len(every)))
    rows = len(every) + len(faults)
    write_array(folder / "places.npy", np.delete(every, repeated)[[*PLACE.names]].astype(PLACE))  # type: ignore[misc]
    faults += _repeated_ids(corpus, folder, every, repeated, first[inverse])
    faults.sort(key=lambda fault: int(fault.where.rpartition(":")[2]))
    media = sorted({name for file in files for name in read_json(file.with_suffix(".json"))})
    write_json(folder / "media.json", media)
    kept, counts = limit_faults(faults)
    write_json(
        folder / "scan.json",
        {
            "rows": rows,
            "faults": [[fault.where, fault.reason, fault.detail] for fault in kept],
            "counts": counts,
            "facts": asdict(_joined([result["facts"] for result in results])),
        },
    )
    for file in files:
        file.unlink(missing_ok=True)
        file.with_suffix(".json").unlink(missing_ok=True)


def _repeated_ids(
    corpus: Path, folder: Path, every: np.ndarray, repeated: np.ndarray, first: np.ndarray
) -> list[Fault]:
    """Return the faults of rows whose id an earlier row has."""
    if not len(repeated):
        return []
    path = folder / "repeated.npy"
    write_array(path, every[repeated][[*PLACE.names]].astype(PLACE))  # type: ignore[misc]
    rows = CorpusRows(corpus, path)
    return [
        Fault(
            rows.location(number),
            "duplicate id",
            f"'{rows[number].id}' is also line {every['line'][first[place]]}" if number < KEPT_FAULTS else "",
        )
        for number, place in enumerate(repeated.tolist())
    ]
