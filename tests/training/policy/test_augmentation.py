import colorsys

import numpy as np
import PIL.Image
import pytest

from blm.training.policy import augmentation
from blm.training.policy.augmentation import augmented

PLAIN = dict.fromkeys(("BRIGHTNESS", "CONTRAST", "SATURATION", "HUE"), 0.0)


def changed_only(monkeypatch: pytest.MonkeyPatch, **kept: float) -> None:
    """Switch off all transforms but those that are given."""
    for name, value in {**PLAIN, "CROP": 1.0, **kept}.items():
        monkeypatch.setattr(augmentation, name, value)


def views_of(picture: np.ndarray, count: int) -> np.ndarray:
    """Return the first views of a picture [height, width, 3]."""
    pictures = {"base": np.stack([picture] * count)}
    return augmented(pictures, np.zeros(count, int), np.arange(1, count + 1))["base"]


def test_views_are_made_of_frame_and_number_alone():
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (4, 32, 32, 3), np.uint8) for name in ("base", "wrist")}
    frames, views = np.array([7, 8, 7, 9]), np.array([1, 1, 1, 0])
    before = {name: pictures.copy() for name, pictures in images.items()}
    made = augmented(images, frames, views)
    assert all(np.array_equal(images[name], before[name]) for name in images), "its input stays as it is"
    same = augmented(
        {name: pictures[[0, 0]] for name, pictures in images.items()}, frames[[0, 2]], views[[0, 2]]
    )
    for name, pictures in made.items():
        assert np.array_equal(pictures[3], images[name][3]) and not np.array_equal(
            pictures[0], images[name][0]
        )
        assert np.array_equal(same[name][0], same[name][1]) and np.array_equal(same[name][0], pictures[0])


def test_without_transforms_a_view_is_the_picture(monkeypatch):
    changed_only(monkeypatch)
    picture = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    difference = views_of(picture, 3).astype(int) - picture
    assert np.abs(difference).max() <= 6  # rounding of PIL's conversion to HSV and back


@pytest.mark.parametrize(("name", "most"), [("BRIGHTNESS", 0.3), ("CONTRAST", 0.4), ("SATURATION", 0.5)])
def test_jitter_covers_its_range_and_not_more(monkeypatch, name, most):
    changed_only(monkeypatch, **{name: most})
    dark, light = (90, 60, 90), (120, 80, 120)
    picture = np.array([[dark, light]], np.uint8)
    made = views_of(picture, 300).astype(float)
    grey = picture @ augmentation.LUMA
    measures = {
        "BRIGHTNESS": made.mean((1, 2, 3)) / picture.mean(),
        "CONTRAST": (made[:, 0, 1] - made[:, 0, 0]).mean(-1) / (np.subtract(light, dark).mean()),
        "SATURATION": (made[:, 0, 0, 0] - grey[0, 0]) / (dark[0] - grey[0, 0]),
    }
    factors = measures[name]
    assert 1 - most - 0.1 <= factors.min() < 1 - 0.8 * most
    assert 1 + 0.8 * most < factors.max() <= 1 + most + 0.1


def test_hue_turns_within_its_range_and_keeps_greys(monkeypatch):
    changed_only(monkeypatch, HUE=0.08)
    picture = np.array([[(200, 40, 40), (90, 90, 90)]], np.uint8)
    made = views_of(picture, 200)
    hues = np.array([colorsys.rgb_to_hsv(*(made[i, 0, 0] / 255))[0] for i in range(200)])
    turns = (hues + 0.5) % 1 - 0.5
    assert -0.09 < turns.min() < -0.06 and 0.06 < turns.max() < 0.09
    assert np.abs(made[:, 0, 1].astype(int) - 90).max() <= 1


def test_a_crop_shows_a_part_of_the_picture_at_its_size(monkeypatch):
    changed_only(monkeypatch, CROP=0.95)
    ramp = np.arange(200, dtype=np.uint8)[None, :, None].repeat(200, 0).repeat(3, 2)
    made = views_of(ramp, 60).astype(int)
    left, right = made[:, 100, 2, 0], made[:, 100, -3, 0]
    assert ((left >= 0) & (left <= 14)).all() and left.max() - left.min() >= 6
    np.testing.assert_allclose(right - left, 0.95 * 195, atol=3)


def test_cameras_share_the_colours_and_not_the_crop(monkeypatch):
    picture = np.array(PIL.Image.linear_gradient("L").resize((64, 64)).convert("RGB"))[None]
    monkeypatch.setattr(augmentation, "CROP", 1.0)
    made = augmented({"base": picture, "wrist": picture}, np.array([5]), np.array([2]))
    assert np.array_equal(made["base"], made["wrist"])
    monkeypatch.setattr(augmentation, "CROP", 0.5)
    made = augmented({"base": picture, "wrist": picture}, np.array([5]), np.array([2]))
    assert not np.array_equal(made["base"], made["wrist"])
