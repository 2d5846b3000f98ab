"""Typed results: published files come back from them as they are, key order included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blm.app.study_result import StudyResult
from blm.evaluation import DigitalResult, PhysicalResult, load_result
from blm.types import BlmError

ROOT = Path(__file__).parents[2] / "results"
KINDS = {"physical": PhysicalResult, "digital": DigitalResult}
PUBLISHED = {
    str(file.relative_to(ROOT)): value
    for file in sorted(ROOT.rglob("*.json"))
    if isinstance(value := json.loads(file.read_text()), dict)
}
EVALUATIONS = [name for name, value in PUBLISHED.items() if value.get("kind") in KINDS]
STUDIES = [name for name, value in PUBLISHED.items() if "variants" in value]


def test_there_are_files_of_all_kinds() -> None:
    assert len(EVALUATIONS) >= 9 and len(STUDIES) >= 9
    assert {PUBLISHED[name]["kind"] for name in EVALUATIONS} == {*KINDS}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_published_results_survive_a_round_trip(name: str) -> None:
    value = PUBLISHED[name]
    result = KINDS[value["kind"]].from_json(value)
    assert json.dumps(result.to_json()) == json.dumps(value)
    assert result.protocol_hash == value["protocol_hash"]


@pytest.mark.parametrize("name", STUDIES)
def test_published_studies_survive_a_round_trip(name: str) -> None:
    """As objects: the order of the keys has changed since they were written."""
    study = StudyResult.from_json(PUBLISHED[name])
    assert json.loads(json.dumps(study.to_json())) == PUBLISHED[name]
    assert study.variants[0].gap is None and all(variant.gap for variant in study.variants[1:])


def test_unknown_fields_are_refused(tmp_path: Path) -> None:
    value = PUBLISHED["physical/blm_nano.json"]
    damaged = {**value, "protocol": {**value["protocol"], "speed": 1}}
    with pytest.raises(TypeError, match="speed"):
        PhysicalResult.from_json(damaged)
    (tmp_path / "result.json").write_text(json.dumps(value))
    with pytest.raises(BlmError, match=r"damaged \(KeyError\('rows'\)\)"):
        load_result(tmp_path)  # a published summary holds no episodes to compare
