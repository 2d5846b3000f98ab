"""Closed-loop validation during training: on which device, and what it leaves on disk."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blm.app import validation
from blm.app.validation import closed_loop_validation
from blm.evaluation import PhysicalProtocol


class Policy:
    """A policy in training; `saved` lists the folders to which it was written."""

    contract = None

    def __init__(self, device: str) -> None:
        self.device, self.saved = device, list[Path]()

    def save(self, folder: Path, provenance: dict[str, Any], *, proved: bool) -> None:
        assert proved, "the weights are hashed here and again in each worker"
        self.saved.append(folder)


@pytest.mark.parametrize("device", ["cuda:3", "cpu"])
def test_a_gpu_drives_with_the_policy_in_training(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = list[Any]()

    def evaluate(make: Any, protocol: Any, folder: Path, **options: Any) -> Any:
        made.append((make() if device != "cpu" else make.args, folder, options["workers"]))
        rate = SimpleNamespace(success_once=SimpleNamespace(rate=0.25))
        return SimpleNamespace(summary=SimpleNamespace(overall=rate))

    monkeypatch.setattr(validation, "evaluate_physical", evaluate)
    monkeypatch.setattr(PhysicalProtocol, "for_validation", lambda contract, **options: None)
    policy: Any = Policy(device)
    validate = closed_loop_validation(tmp_path, ["push_cube"], 2, 5)
    assert validate(500, policy) == {"success": 0.25}
    weights = tmp_path / "driven/.weights/policy"
    expected = policy if device != "cpu" else (weights,)
    assert made == [(expected, tmp_path / "driven/00000500", 5)]
    assert policy.saved == ([] if device != "cpu" else [weights])
    assert not weights.parent.exists(), "temporary weights stay"
