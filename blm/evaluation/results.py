"""The form of a result file, and what two of them say about each other.

Both spaces write {"kind", "score", "model", "protocol", "protocol_hash", "rows", ...}. `score` names the
field of a row that is judged (success_once; score, from 0 to 1); rows of two results pair by their "id".
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from blm.evaluation.protocol import DigitalProtocol, PhysicalProtocol, digest, protocol_hash, require_equal
from blm.evaluation.statistics import Difference, holm, paired_difference
from blm.io import read_json, write_text
from blm.types import BlmError, ContractError

FORMAT = 2
"""Of result.json: written in it, and required when it is read."""
TIMES = ("act_ms", "seconds_policy", "seconds_physics", "seconds_rendering")
"""Fields of a physical row that differ from run to run."""


def write_result(
    out: Path, protocol: PhysicalProtocol | DigitalProtocol, start: float, **parts: Any
) -> dict[str, Any]:
    """Write `out`/result.json; return what reading it gives. `start` is when the run began (monotonic)."""
    head = {"format": FORMAT, "protocol": asdict(protocol), "protocol_hash": protocol_hash(protocol)}
    head |= {"machine": machine(), "seconds": time.monotonic() - start}
    text = json.dumps(head | parts, indent=1, allow_nan=False)
    write_text(out / "result.json", text)
    return json.loads(text)


def require_free(out: Path) -> None:
    """Raise BlmError, before anything is run, if `out` has a result.json of another program."""
    file = out / "result.json"
    if file.exists():
        result = read_json(file)
        if not isinstance(result, dict) or not {"protocol", "protocol_hash", "rows"} <= result.keys():
            raise BlmError(f"'{file}' is of another program; name another folder")


def machine() -> dict[str, Any]:
    """What the numbers were made on: processor, cores, system and package versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("blm", "numpy", "torch", "transformers", "mujoco")},
    }


def without_times(row: Mapping[str, Any]) -> dict[str, Any]:
    """What of a physical row has to be equal when the episode is run again."""
    return {name: value for name, value in row.items() if name not in TIMES}


def load_result(path: Path) -> dict[str, Any]:
    """Read a result: the file, or the folder that holds result.json. Raises BlmError for a damaged one."""
    file = path / "result.json" if path.is_dir() else path
    if not file.is_file():
        raise BlmError(f"no result at '{path}'; give the folder of an evaluation, or its result.json")
    try:
        result: dict[str, Any] = json.loads(file.read_text())
        if result["format"] != FORMAT:
            raise BlmError(
                f"result '{file}' has format {result['format']}, this program reads {FORMAT}; evaluate again"
            )
        score, rows, overall = result["score"], result["rows"], result["overall"]
        counted = [overall["n"], overall.get(score, overall)["hits"]]
        hits = math.fsum(row[score] for row in rows)
        found = [len({row["id"] for row in rows}), int(hits) if hits.is_integer() else hits]
        hashes = (result["protocol_hash"], digest(result["protocol"]))
        sums: dict[str, tuple[Any, Any]] = {"n and hits": (counted, found), "hash of the protocol": hashes}
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise BlmError(f"result '{file}' is damaged ({error!r}); evaluate again") from error
    for what, (stated, true) in sums.items():
        if stated != true:
            raise BlmError(
                f"result '{file}' is damaged or was edited: {what} is {stated} in its summary, "
                f"{true} from its content; evaluate again"
            )
    return result


def compare(first: Mapping[str, Any], second: Mapping[str, Any], *, but: Collection[str] = ()) -> Difference:
    """Paired difference of two results, first minus second.

    `but` names fields of the protocol that may differ, because they are what is compared.
    Raises ContractError that prints both sides for unlike protocols, items or scenes, and BlmError for a
    replay check or a validation: they are no scores.
    """
    return _difference(first["score"], _pairs(first, second, but))


def compare_cells(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Difference]:
    """The same for each phrasing, then each robot and task of a physical result, or each kind of question."""
    pairs = _pairs(first, second)
    parts: dict[str, list[Pair]] = {}
    if first["kind"] == "physical":
        for wording in ("seen", "held_out"):
            part = [pair for pair in pairs if pair[0]["phrasing"] == wording]
            if 0 < len(part) < len(pairs):
                parts[f"wording {wording}"] = part
    for pair in pairs:
        row = pair[0]
        name = f"{row['robot']} {row['task']}" if first["kind"] == "physical" else row["kind"]
        parts.setdefault(name, []).append(pair)
    return {name: _difference(first["score"], part) for name, part in parts.items()}


def format_comparison(
    first: Mapping[str, Any], second: Mapping[str, Any], names: tuple[str, str] = ("A", "B")
) -> str:
    """A table for people: overall, then in parts, with intervals; raises like `compare`.

    The p-values of the parts are corrected for their number (Holm 1979, Scand. J. Statistics 6:65).
    """
    whole, parts = compare(first, second), compare_cells(first, second)
    corrected = holm([part.p_value for part in parts.values()])
    rows = [
        ("all", whole, whole.p_value),
        *((n, d, p) for (n, d), p in zip(parts.items(), corrected, strict=True)),
    ]
    width = max(len(name) for name, _, _ in rows)
    lines = [
        f"A: {names[0]} (model {first['model']})",
        f"B: {names[1]} (model {second['model']})",
        f"{first['score']} on the same {whole.n} items, protocol {first['protocol_hash']}",
        "",
        f"{'':{width}}      n       A       B      A - B (95 % interval)  only A  only B  p",
    ]
    for name, part, p in rows:
        gap = f"{100 * part.difference:+.1f} ({100 * part.low:+.1f} to {100 * part.high:+.1f})"
        lines.append(
            f"{name:{width}}  {part.n:5d}  {100 * part.first:5.1f}%  {100 * part.second:5.1f}%  {gap:>25}"
            f"  {part.only_first:6d}  {part.only_second:6d}  {'-' if p is None else f'{p:.2g}'}"
        )
    tested = "p: McNemar's exact test; in all rows but the first corrected for their number (Holm)."
    clustered = "No p: items share scenes; the intervals are clustered by scene."
    return "\n".join([*lines, "", clustered if whole.p_value is None else tested])


Pair = tuple[Mapping[str, Any], Mapping[str, Any]]
"""The rows of two results about one item."""


def _pairs(first: Mapping[str, Any], second: Mapping[str, Any], but: Collection[str] = ()) -> list[Pair]:
    for side in (first, second):
        if side["protocol"].get("purpose", "evaluation") != "evaluation":
            raise BlmError(
                f"the result of '{side['model']}' is a {side['protocol']['purpose']}: it is no score; "
                "compare evaluations on evaluation seeds"
            )
    problem = "results of unlike protocols cannot be compared"
    ours, theirs = ({k: v for k, v in r["protocol"].items() if k not in but} for r in (first, second))
    require_equal(ours, theirs, problem, "there")
    others = {row["id"]: row for row in second["rows"]}
    if len(others) != len(first["rows"]):
        raise ContractError(f"{problem}: {len(first['rows'])} items here, {len(others)} there")
    pairs = [(row, others.get(row["id"], {})) for row in first["rows"]]
    for row, other in pairs:
        if not other or row.get("scene") != other.get("scene"):
            raise ContractError(
                f"item '{row['id']}' started from another scene ({row.get('scene')} here, "
                f"{other.get('scene')} there), or is missing; evaluate again"
            )
    return pairs


def _difference(score: str, pairs: Sequence[Pair]) -> Difference:
    names = [row["group"] for row, _ in pairs if "group" in row]
    groups = names if len(set(names)) < len(names) else None
    return paired_difference([row[score] for row, _ in pairs], [row[score] for _, row in pairs], groups)
