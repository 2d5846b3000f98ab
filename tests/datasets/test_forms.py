"""Datasets of other programs in the forms that people have: through doctor, view, Stage II, one action."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from blm.app.doctor import examine_path
from blm.datasets.lerobot import open_dataset
from blm.datasets.mapping import read_mapping, write_mapping
from blm.datasets.suggestion import suggest_mapping
from blm.policy.checkpoint import read_config
from blm.policy.policy import CheckpointPolicy
from blm.training.loop.loop import LoopConfig
from blm.training.policy.config import PolicyTrainingConfig
from blm.training.policy.hidden_states import HiddenStateConfig
from blm.training.policy.train import train_stage2
from blm.types import Observation
from tests.support.commands import run_command
from tests.support.hidden_states import make_backbone
from tests.support.lerobot_forms import FORMS, pictures, write_form
from tests.support.policy_training import POLICY


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    make_backbone(folder / "backbone")
    return folder / "backbone"


@pytest.mark.parametrize("name", FORMS)
def test_a_dataset_of_any_form_is_checked_viewed_trained_on_and_acted_for(name, backbone, tmp_path):
    folder, form = write_form(tmp_path / "data", FORMS[name]), FORMS[name]
    found = suggest_mapping(folder, image_size=32)
    assert not found.mapping.undecided, found.notes
    file = tmp_path / "mapping.json"
    write_mapping(file, found.mapping)
    assert read_mapping(file) == found.mapping
    (check,) = examine_path(folder, found.mapping)
    assert not check.fix, check

    sheet = ["--form", "sheet", "--out", str(tmp_path / "a.png")]
    run_command("view", [str(folder), "--mapping", str(file), *sheet])
    data = open_dataset(folder, found.mapping)
    config = PolicyTrainingConfig(
        datasets=(folder,),
        mappings=(file,),
        backbone=str(backbone),
        intents=HiddenStateConfig(layer=1, cameras=data.cameras, workers=0, stride=2),
        loop=LoopConfig(steps=20, batch_size=8, lr=1e-3, log_every=10),
        policy=replace(POLICY, max_dim=8),
        cache=tmp_path / "cache",
        execute=3,
        held_out=0.0,
    )
    made = train_stage2(config, tmp_path / "run", {})
    assert read_config(made)["provenance"]["mappings"] == {str(folder): found.mapping.to_json()}
    policy = CheckpointPolicy.load(made)
    seen = Observation(
        images={camera: pictures(form, key, 0)[3] for camera, key in found.mapping.cameras.items()},
        state=data.states[3],
        instruction="pick it up",
        robot="toy",
    )
    chunk = policy.act(seen).actions
    assert chunk.shape == (6, len(form.action)) and np.isfinite(chunk).all()
    fitted = replace(seen, images={camera: data.frames([3], camera)[0] for camera in data.cameras})
    assert policy.contract.check(fitted).images[data.cameras[0]].shape == (32, 32, 3)
