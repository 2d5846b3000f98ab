import numpy as np
import pytest

from blm.datasets.mixture import Mixture, kept_frames, split_episodes
from blm.types import BlmError


def make(**changes):
    return Mixture(**{"sizes": (10, 1000), "weights": (3.0, 1.0), "batch_size": 64, "seed": 5, **changes})


def test_a_batch_is_a_function_of_seed_and_step():
    one, two = make(), make()
    for step in (7, 0, 7):
        for a, b in zip(one.batch(step), two.batch(step), strict=True):
            np.testing.assert_array_equal(a, b)
    assert not np.array_equal(one.batch(0)[1], one.batch(1)[1])
    assert not np.array_equal(one.batch(0)[1], make(seed=6).batch(0)[1])


def test_weights_and_uniform_rows_are_met():
    datasets, rows = (np.concatenate(x) for x in zip(*(make().batch(s) for s in range(200)), strict=True))
    n = len(datasets)
    assert abs((datasets == 0).mean() - 0.75) < 4 * np.sqrt(0.75 * 0.25 / n)
    counts = np.bincount(rows[datasets == 0], minlength=10)
    assert len(counts) == 10 and np.abs(counts / counts.mean() - 1).max() < 0.2
    assert rows[datasets == 1].max() < 1000 and len(set(rows[datasets == 1])) > 900


def test_bad_mixtures_are_refused():
    with pytest.raises(BlmError, match="1 weights for 2 datasets"):
        make(weights=(1.0,))
    with pytest.raises(BlmError, match="positive"):
        make(sizes=(0, 5))


def test_split_is_by_episode_disjoint_and_complete():
    train, held = split_episodes(20, 0.1, 3)
    assert len(held) == 2 and sorted([*train, *held]) == list(range(20))
    assert len(split_episodes(5, 0.0, 3)[1]) == 0
    with pytest.raises(BlmError, match="none to train on"):
        split_episodes(1, 0.1, 3)


def test_kept_frames_are_every_nth_of_each_episode_and_its_last():
    starts = np.array([0, 3, 5, 9])
    np.testing.assert_array_equal(kept_frames(starts, 1), np.arange(9))
    np.testing.assert_array_equal(kept_frames(starts, 2), [0, 2, 3, 4, 5, 7, 8])
    np.testing.assert_array_equal(kept_frames(starts, 8), [0, 2, 3, 4, 5, 8])
