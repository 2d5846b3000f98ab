"""result.json on disk: written atomically, and checked when it is read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from blm.evaluation.digital.result import DigitalResult
from blm.evaluation.physical.result import PhysicalResult
from blm.evaluation.protocol import digest
from blm.evaluation.results import FORMAT, EvaluationResult
from blm.io import read_json, write_text
from blm.types import BlmError

_KINDS: dict[str, type[PhysicalResult] | type[DigitalResult]] = {
    "physical": PhysicalResult,
    "digital": DigitalResult,
}
ResultT = TypeVar("ResultT", bound=EvaluationResult)


def write_result(out: Path, result: ResultT) -> ResultT:
    """Write `out`/result.json; return the result as read back from that file."""
    text = json.dumps(result.to_json(), indent=1, allow_nan=False)
    write_text(out / "result.json", text)
    return type(result).from_json(json.loads(text))


def require_free(out: Path) -> None:
    """Raise BlmError, before anything is run, if `out` has a result.json of another program."""
    file = out / "result.json"
    if file.exists():
        result = read_json(file)
        if not isinstance(result, dict) or not {"protocol", "protocol_hash", "rows"} <= result.keys():
            raise BlmError(f"'{file}' belongs to another program; name another folder")


def load_result(path: Path) -> PhysicalResult | DigitalResult:
    """Read a result: the file, or the folder that holds result.json.

    Raises BlmError for a missing, damaged or edited file, and for one of another format.
    """
    file = path / "result.json" if path.is_dir() else path
    if not file.is_file():
        raise BlmError(f"no result at '{path}'; give the folder of an evaluation, or its result.json")
    try:
        value: dict[str, Any] = json.loads(file.read_text())
        if value["format"] != FORMAT:
            raise BlmError(
                f"result '{file}' has format {value['format']}, this program reads {FORMAT}; evaluate again"
            )
        _require_intact(file, value)
        return _KINDS[value["kind"]].from_json(value)
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise BlmError(f"result '{file}' is damaged ({error!r}); evaluate again") from error


def _require_intact(file: Path, value: dict[str, Any]) -> None:
    """Raise BlmError if counts or the protocol's hash contradict the content: it was edited."""
    score, rows, overall = value["score"], value["rows"], value["overall"]
    varied = [row for row in rows if "condition" in row]
    plain = [row for row in rows if "condition" not in row]  # of which `overall` is the summary
    stated = [overall["n"], overall.get(score, overall)["hits"]]
    for quantity, there, true in (
        ("n and hits", stated, _counted(plain, score)),
        ("n and hits of the conditions", _stated(value.get("perturbed")), _counted(varied, score)),
        ("hash of the protocol", value["protocol_hash"], digest(value["protocol"])),
    ):
        if there != true:
            raise BlmError(
                f"result '{file}' is damaged or was edited: {quantity} is {there} in its summary, "
                f"{true} from its content; evaluate again"
            )


def _counted(rows: Sequence[Mapping[str, Any]], score: str) -> list[float]:
    """Return the number of different rows and the sum of their scores."""
    hits = math.fsum(row[score] for row in rows)
    return [len({row["id"] for row in rows}), int(hits) if hits.is_integer() else hits]


def _stated(perturbed: Mapping[str, Any] | None) -> list[float]:
    """Return the number of perturbed episodes and of their successes that a summary states."""
    if perturbed is None:
        return [0, 0]
    parts = [level for axis in perturbed["axes"] for level in axis["levels"]]
    parts += perturbed["dynamics"] + perturbed["controls"]
    return [sum(part["n"] for part in parts), sum(part["success_once"]["hits"] for part in parts)]
