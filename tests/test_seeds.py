"""Scenes that are reserved: their ranges, and who says that they were trained on."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blm.datasets.lerobot import finalize_dataset, open_dataset, stage_episode
from blm.policy.card import model_card
from blm.seeds import RESERVED, TRAINING_SEEDS, count_reserved_seeds, reserved_seeds_warning
from blm.training.policy.sampler import warn_of_reserved
from tests.support.episodes import EPISODES, SIDE, SPACE


def test_ranges_are_disjoint():
    for one, other in itertools.combinations([*RESERVED.values(), TRAINING_SEEDS], 2):
        assert one.stop <= other.start or other.stop <= one.start


@given(st.lists(st.integers(0, 3_000_000), max_size=20))
def test_every_seed_is_counted_once_at_most(seeds):
    counts = count_reserved_seeds(seeds)
    assert sum(counts.values()) == sum(any(seed in kept for kept in RESERVED.values()) for seed in seeds)
    assert all(counts.values()) and count_reserved_seeds(TRAINING_SEEDS[:: 10**5]) == {}


@pytest.mark.parametrize(
    ("seed", "purpose"), [(0, "evaluation"), (1_000_000, "held-out questions"), (2_000_000, "validation")]
)
def test_training_on_reserved_scenes_warns_and_is_stated_in_the_card(tmp_path, capsys, seed, purpose):
    episodes = [replace(episode, seed=seed + i) for i, episode in enumerate(EPISODES)]
    staged = [stage_episode(tmp_path / "staging", f"{e.task}/{e.seed}", e) for e in episodes]
    layout = {"space": SPACE, "cameras": ("base",), "image_size": SIDE, "provenance": {}}
    data = open_dataset(finalize_dataset(staged, tmp_path / "arm", **layout))
    assert data.info["blm"]["reserved_seeds"] == {purpose: 3}
    facts = warn_of_reserved([data])
    assert f"3 for {purpose}" in capsys.readouterr().err
    assert facts == {"reserved_seeds": {str(data.folder): {purpose: 3}}}
    contract = {
        "cameras": ["base"],
        "image_size": 8,
        "rate_hz": 20,
        "horizon": 4,
        "execute": 2,
        "action_spaces": {},
    }
    card = model_card({"kind": "diffusion_policy", "contract": contract, "provenance": facts})
    assert f"**Trained on reserved scenes** (3 episodes for {purpose})" in card
    assert "reserved" not in model_card({"kind": "diffusion_policy", "contract": contract, "provenance": {}})


def test_free_scenes_are_not_warned_of(tmp_path, capsys):
    episodes = [replace(episode, seed=10_000 + i) for i, episode in enumerate(EPISODES)]
    staged = [stage_episode(tmp_path / "staging", f"{e.task}/{e.seed}", e) for e in episodes]
    layout = {"space": SPACE, "cameras": ("base",), "image_size": SIDE, "provenance": {}}
    assert warn_of_reserved([open_dataset(finalize_dataset(staged, tmp_path / "arm", **layout))]) == {}
    assert capsys.readouterr().err == "" and "10,000 to 999,999" in reserved_seeds_warning(
        "it", {"evaluation": 1}
    )
