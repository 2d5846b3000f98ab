"""The paper's LLaVA-OneVision and InternVL rows run, with tiny models of the same classes."""

from __future__ import annotations

from pathlib import Path

import pytest

from blm.evaluation.digital.benchmarks import published
from blm.evaluation.result_files import load_result
from tests.support.benchmarks import make_fixture
from tests.support.commands import run_command
from tests.support.families import FAMILIES


@pytest.mark.parametrize("family", ["LLaVA-OneVision", "InternVL"])
def test_a_row_of_the_paper_runs_on_all_six_benchmarks(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    FAMILIES[family]().save(tmp_path / "model")
    for name in published.SIX:
        make_fixture(name, tmp_path / "data" / name)
        where = ["--benchmark", name, "--data", str(tmp_path / "data" / name), "--out", str(tmp_path / name)]
        run_command("eval digital", [*where, "--model", str(tmp_path / "model"), "--judge", "match"])
        predictions = load_result(tmp_path / name).predictions
        assert predictions and all(one.failure is None for one in predictions)
    capsys.readouterr()
    folders = [f"tiny={tmp_path / name}" for name in published.SIX]
    run_command("eval table", [*folders, "--out", str(tmp_path / "table.md")])
    lines = (tmp_path / "table.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith("| tiny | "))
    assert row.count("(") == 7, "six scores and their average, each with an interval"
    assert any(line.startswith("| tiny | judge | EgoThink") for line in lines)
