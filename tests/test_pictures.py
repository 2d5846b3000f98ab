"""Pictures become the squares of a policy in one way, in training and on the wire."""

from __future__ import annotations

import json

import numpy as np
import pytest

from blm.action_space import StateSpace
from blm.pictures import fit_picture, joint_fit
from blm.serving.protocols.openpi import wire
from blm.types import ActionSpace, BlmError, ContractError, Observation, PolicyContract

RNG = np.random.default_rng(0)
SPACE = ActionSpace(
    robot="arm",
    names=("x", "gripper"),
    units=("m", "opening"),
    low=(-np.inf, 0.0),
    high=(0.5, 1.0),
    kind="per_dimension",
    kinds=("delta_eef_position", "gripper"),
    rotation="euler_xyz",
    state=StateSpace(
        names=("a", "b", "c"), units=("rad",) * 3, kinds=("absolute_joint_position",) * 3, origins=(-1, 2)
    ),
)
CONTRACT = PolicyContract(
    action_spaces={"arm": SPACE},
    cameras=("top",),
    image_size=32,
    horizon=4,
    execute=2,
    picture_fit="letterbox",
)


@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 48), (480, 640), (20, 31)])
def test_a_letterbox_keeps_the_whole_picture_and_its_proportions(height, width):
    square = fit_picture(np.full((height, width, 3), 200, np.uint8), "letterbox", 32, "it")
    rows, columns = (np.flatnonzero(square.any(axis=(axis, 2))) for axis in (1, 0))
    assert (np.ptp(rows) + 1) / (np.ptp(columns) + 1) == pytest.approx(height / width, rel=0.05)
    assert square[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].min() == 200
    assert abs(rows[0] - (31 - rows[-1])) <= 1 and abs(columns[0] - (31 - columns[-1])) <= 1, "it is central"


def test_a_crop_is_the_central_square():
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:, 16:48] = RNG.integers(0, 256, (32, 32, 3))
    np.testing.assert_array_equal(fit_picture(picture, "crop", 32, "it"), picture[:, 16:48])
    mirrored = fit_picture(picture[:, ::-1], "crop", 32, "it")
    np.testing.assert_array_equal(mirrored, picture[:, 16:48][:, ::-1])


@pytest.mark.parametrize("fit", ["exact", "letterbox", "crop"])
def test_squares_of_the_right_size_stay_as_they_are(fit):
    square = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert fit_picture(square, fit, 32, "it") is square
    other = fit_picture(RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8), "letterbox", 32, "it")
    assert fit_picture(other, fit, 32, "it") is other, "a client that fits pictures changes nothing"


@pytest.mark.parametrize("picture", [np.zeros((40, 50), np.uint8), np.zeros((40, 50, 3), np.float32)])
def test_what_is_no_colour_picture_is_refused(picture):
    with pytest.raises(ContractError, match=r"it is .*, needed: uint8 \(height, width, 3\)"):
        fit_picture(picture, "crop", 32, "it")
    with pytest.raises(ContractError, match=r"needed: uint8 \(32, 32, 3\)"):
        fit_picture(np.zeros((40, 50, 3), np.uint8), "exact", 32, "it")


def test_one_policy_fits_pictures_in_one_way():
    assert joint_fit({"exact"}) == "exact" and joint_fit({"exact", "crop"}) == "crop"
    with pytest.raises(BlmError, match="crop and letterbox"):
        joint_fit({"letterbox", "crop"})


def test_the_contract_fits_pictures_and_checks_the_state_apart_from_the_action():
    picture = RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    seen = Observation(images={"top": picture}, state=np.zeros(3), instruction="go", robot="arm")
    checked = CONTRACT.check(seen)
    np.testing.assert_array_equal(checked.images["top"], fit_picture(picture, "letterbox", 32, "it"))
    assert checked.state.shape == (3,) and CONTRACT.check(checked).images["top"] is checked.images["top"]
    with pytest.raises(ContractError, match=r"state has shape \(2,\), 'arm' needs \(3,\): a, b, c"):
        CONTRACT.check(Observation(images={"top": picture}, state=np.zeros(2), instruction="", robot="arm"))


def test_a_contract_with_all_of_it_survives_strict_json_and_an_old_one_stays_the_same():
    text = json.dumps(CONTRACT.to_json(), allow_nan=False)
    assert PolicyContract.from_json(json.loads(text)) == CONTRACT
    plain = ActionSpace(
        robot="a", names=("j", "gripper"), units=("rad", "opening"), low=(-1.0, 0.0), high=(1.0, 1.0)
    )
    assert not {"state", "rotation", "kinds"} & plain.to_json().keys()
    old = PolicyContract(action_spaces={"a": plain}, cameras=("top",), image_size=32, horizon=4, execute=2)
    assert "picture_fit" not in old.to_json()


def test_the_middle_state_is_finite_where_limits_are_unknown():
    assert SPACE.middle_state().tolist() == [0.0, 0.0, 0.5]
    assert SPACE.offsets_allowed == (False, False)


def test_clients_send_the_pictures_of_their_cameras_as_they_are():
    picture = RNG.integers(0, 256, (480, 640, 3), dtype=np.uint8)
    request = {"observation/images/top": picture, "observation/state": [0.0, 0.1, 0.2], "prompt": "go"}
    message = wire.pack(request)
    assert len(message) < wire.frame_limit(CONTRACT)
    observed = wire.to_observation(wire.unpack(message, wire.item_limit(CONTRACT)), CONTRACT)
    np.testing.assert_array_equal(observed.images["top"], fit_picture(picture, "letterbox", 32, "it"))
    with pytest.raises(ContractError, match="uint8 height x width x 3"):
        wire.to_observation({"prompt": "go"}, CONTRACT)
