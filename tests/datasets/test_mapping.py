"""Mappings: units, kinds, files; what `blm doctor --suggest` proposes; what training refuses without."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from blm.datasets.lerobot import open_dataset, open_mapped
from blm.datasets.mapping import DataMapping, Dimension, mappings_for, read_mapping, write_mapping
from blm.datasets.suggestion import suggest_mapping
from blm.datasets.transforms import action_chunks, fit_transforms
from blm.training.policy.sampler import joint_contract
from blm.types import BlmError, Observation
from tests.support.commands import run_command
from tests.support.lerobot_forms import (
    ARM7,
    DEGREES,
    FORMS,
    LENGTHS,
    POSE,
    Form,
    motion,
    pictures,
    write_form,
)
from tests.support.policy_training import POLICY

JOINT = Dimension(name="a", feature="action", kind="absolute_joint_position", unit="deg", origin="a")
GRIPPER = Dimension(
    name="grip", feature="action", index=1, kind="gripper", unit="opening", zero=100.0, one=20.0
)
MAPPING = DataMapping(
    robot="toy",
    rate_hz=10.0,
    cameras={"top": "observation.images.top"},
    state=(replace(JOINT, feature="state", origin=""),),
    action=(JOINT, GRIPPER),
    picture_fit="letterbox",
    image_size=32,
)


def suggested(folder, form):
    return suggest_mapping(write_form(folder, form), image_size=32)


def kinds(part):
    return [one.kind for one in part]


def pose(form):
    return [f"{form}_eef_position"] * 3 + [f"{form}_eef_rotation"] * 3


def test_values_become_si_units_and_openings_and_back():
    stored = np.array([[90.0, 100.0], [-45.0, 20.0], [0.0, 60.0]])
    states, actions = MAPPING.read({"state": stored[:, :1], "action": stored})
    np.testing.assert_allclose(states[:, 0], np.radians([90, -45, 0]), rtol=1e-6)
    np.testing.assert_allclose(actions, [[np.pi / 2, 0], [-np.pi / 4, 1], [0, 0.5]], atol=1e-6)
    np.testing.assert_allclose(MAPPING.to_stored(actions), stored, atol=1e-4)


def test_a_file_holds_the_whole_mapping_in_lines_that_people_can_edit(tmp_path):
    write_mapping(tmp_path / "m.json", MAPPING)
    assert read_mapping(tmp_path / "m.json") == MAPPING
    lines = (tmp_path / "m.json").read_text().splitlines()
    assert sum('"kind"' in line for line in lines) == 3 and json.loads("\n".join(lines))["format"] == 1


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda m: m.update(camera={}), "unknown key of the mapping 'camera'. Did you mean 'cameras'"),
        (lambda m: m.pop("robot"), "the mapping lacks robot"),
        (lambda m: m.update(format=2), "a mapping has 'format': 1"),
        (lambda m: m["action"][0].update(kind="joint"), "unknown kind of 'a' 'joint'"),
        (lambda m: m["action"][0].update(unit="turns"), "unknown unit of 'a' 'turns'"),
        (lambda m: m["action"][0].update(origin="b"), "has the origin 'b'; only an absolute position"),
        (lambda m: m["action"][0].update(low=1, high=-1), "low must be below high"),
        (lambda m: m["action"][0].update(name="grip"), "have the names grip, grip; each only once"),
        (lambda m: m["action"][1].update(one=100.0), "must be two different numbers"),
        (lambda m: m["action"][1].update(unit="deg"), "only a gripper, has the unit 'opening'"),
        (lambda m: m.update(image_size=None), "letterbox and crop need a size"),
        (lambda m: m.update(action=[]), "no dimension of the action"),
    ],
)
def test_wrong_mappings_are_refused_by_key_and_value(tmp_path, edit, said):
    value = json.loads(json.dumps(MAPPING.to_json()))
    edit(value)
    (tmp_path / "m.json").write_text(json.dumps(value))
    with pytest.raises(BlmError, match=said) as told:
        read_mapping(tmp_path / "m.json")
    assert "m.json" in str(told.value)


def test_one_mapping_serves_all_datasets_or_each_has_its_own(tmp_path):
    write_mapping(tmp_path / "m.json", MAPPING)
    file, none = tmp_path / "m.json", type(tmp_path)("-")
    assert mappings_for([tmp_path] * 3, ()) == (None,) * 3
    assert mappings_for([tmp_path] * 3, [file]) == (MAPPING,) * 3
    assert mappings_for([tmp_path] * 2, [none, file]) == (None, MAPPING)
    with pytest.raises(BlmError, match="2 mappings for 3 datasets"):
        mappings_for([tmp_path] * 3, [file, file])


@pytest.mark.parametrize("name", ["degrees", "servo ticks"])
def test_units_are_told_from_values_and_give_the_same_motion(tmp_path, name):
    form = FORMS[name]
    data = open_dataset(write_form(tmp_path / "a", form), suggest_mapping(tmp_path / "a").mapping)
    plain = replace(form, units=Form().units)
    for i in range(len(LENGTHS)):
        rows = slice(data.starts[i], data.starts[i + 1])
        for found, due in zip((data.states[rows], data.actions[rows]), motion(plain, i), strict=True):
            np.testing.assert_allclose(found[:, :-1], due[:, :-1], atol=2e-3)
    assert data.space.kind == "absolute_joint_position" and data.states[:, -1].min() >= 0


def test_a_joint_that_hardly_turns_has_the_unit_of_the_others(tmp_path):
    def units(values, is_action):
        return np.concatenate([values[:, :1] * DEGREES, values[:, 1:2], values[:, 2:] * 100], axis=1)

    found = suggested(tmp_path / "a", Form(units=units)).mapping
    assert [one.unit for one in found.action] == ["deg", "deg", "opening"]


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (Form(delta=True, state=("shoulder", "elbow", "gripper"), action=("shoulder", "elbow", "gripper")),
         ["delta_joint_position"] * 2 + ["gripper"]),
        (Form(delta=True, state=POSE, action=POSE), [*pose("delta"), "gripper"]),
        (Form(state=POSE, action=POSE), [*pose("absolute"), "gripper"]),
        (Form(state=ARM7, action=ARM7), ["absolute_joint_position"] * 7),
        (FORMS["bimanual"], (["absolute_joint_position"] * 2 + ["gripper"]) * 2),
        (FORMS["GR00T"], ["absolute_joint_position"] * 2 + ["gripper"]),
        (Form(names=lambda names: {"motors": [f"motor_{i}" for i in range(len(names))]}),
         ["absolute_joint_position"] * 2 + ["gripper"]),
    ],
)  # fmt: skip
def test_kinds_are_told_from_names_groups_and_values(tmp_path, form, expected):
    found = suggested(tmp_path / "a", form).mapping
    assert kinds(found.action) == expected
    absolute = [one.kind in ("absolute_joint_position", "absolute_eef_position") for one in found.action]
    assert [bool(one.origin) for one in found.action] == absolute


def test_actions_that_nothing_tells_are_left_to_the_user(tmp_path):
    def noise(values, is_action):
        return np.random.default_rng(is_action).normal(size=values.shape)

    found = suggested(tmp_path / "a", Form(units=noise, state=("p", "q"), action=("p", "q")))
    assert found.mapping.undecided == ("p", "q") and "training refuses 'unknown'" in found.notes[-1]
    data = open_dataset(tmp_path / "a", found.mapping)
    with pytest.raises(BlmError, match="leaves the kind of p, q unknown; write one of absolute_joint"):
        joint_contract([data], POLICY, cameras=("top",), execute=3)


def test_deltas_are_not_made_relative_and_keep_their_spread(tmp_path):
    data = open_dataset(
        write_form(tmp_path / "a", FORMS["steps of the end effector"]),
        suggest_mapping(tmp_path / "a").mapping,
    )
    rows = np.arange(data.num_frames)
    ends = data.starts[data.episode_index + 1]
    chunks, inside = action_chunks(data.actions, rows, ends, 4)
    fitted = fit_transforms(data.space, data.states, chunks, inside, relative=True)
    assert fitted.relative == (False,) * 7
    spread = np.ptp(fitted.actions.forward(chunks, data.states)[:, 0], axis=0)
    assert (spread[:6] > 1.5).all(), "each fills -1..1"


def test_targets_are_relative_to_the_state_that_they_command_wherever_it_is(tmp_path):
    form = FORMS["state longer than the action"]
    mapping = suggested(tmp_path / "a", form).mapping
    turned = replace(mapping, state=mapping.state[::-1])
    found = []
    for one in (mapping, turned):
        data = open_dataset(tmp_path / "a", one)
        rows, ends = np.arange(data.num_frames), data.starts[data.episode_index + 1]
        chunks, inside = action_chunks(data.actions, rows, ends, 4)
        fitted = fit_transforms(data.space, data.states, chunks, inside, relative=True)
        assert fitted.relative == (True, True, False)
        there = fitted.actions.forward(chunks, data.states)
        np.testing.assert_allclose(fitted.actions.inverse(there, data.states), chunks, atol=1e-6)
        again = type(fitted).from_json(json.loads(json.dumps(fitted.to_json())))
        np.testing.assert_array_equal(again.actions.forward(chunks, data.states), there)
        found.append(there)
    np.testing.assert_allclose(*found, atol=1e-6)


def test_two_sessions_of_a_robot_go_together_and_limits_are_those_of_the_mapping(tmp_path):
    mapping = suggested(tmp_path / "a", Form()).mapping
    other = write_form(tmp_path / "b", Form(units=lambda values, is_action: 0.7 * values))
    limited = replace(mapping, action=(replace(mapping.action[0], low=-2.0, high=2.0), *mapping.action[1:]))
    write_mapping(tmp_path / "m.json", limited)
    data = open_mapped([tmp_path / "a", other], [tmp_path / "m.json"])
    contract = joint_contract(data, POLICY, cameras=("top",), execute=3)
    space = contract.action_spaces["toy"]
    assert space == data[1].space and (space.low, space.high) == ((-2.0, -np.inf, 0.0), (2.0, np.inf, 1.0))
    assert (contract.picture_fit, contract.image_size) == ("letterbox", 32)


@pytest.mark.parametrize("name", ["wide pictures, v2.0, MPEG-4", "pictures in the data files, v3.0"])
def test_training_and_the_wire_see_the_same_picture(tmp_path, name):
    mapping = suggested(tmp_path / "a", FORMS[name]).mapping
    data, raw = open_dataset(tmp_path / "a", mapping), open_dataset(tmp_path / "a")
    contract = joint_contract([data], POLICY, cameras=("top",), execute=3)
    for frame in (0, 20, 13):
        stored = raw.frames([frame], "top")[0]
        assert stored.shape == (48, 64, 3)
        seen = Observation(images={"top": stored}, state=data.states[frame], instruction="", robot="toy")
        np.testing.assert_array_equal(contract.check(seen).images["top"], data.frames([frame], "top")[0])


@pytest.mark.parametrize("name", FORMS)
def test_frames_are_those_of_their_rows(tmp_path, name):
    form = FORMS[name]
    mapping = suggested(tmp_path / "a", form).mapping
    data = open_dataset(tmp_path / "a", replace(mapping, picture_fit="exact", image_size=None))
    camera, key = next(iter(mapping.cameras.items()))
    due = np.concatenate([pictures(form, key, i) for i in range(len(LENGTHS))])
    order = np.random.default_rng(0).permutation(data.num_frames)
    assert np.abs(data.frames(order, camera).astype(int) - due[order]).mean() < 4
    wrong = np.abs(data.frames(order, camera).astype(int) - due[(order + 1) % len(due)]).mean()
    assert wrong > 1.5 * np.abs(data.frames(order, camera).astype(int) - due[order]).mean()


def test_caches_and_checkpoints_know_the_mapping(tmp_path):
    mapping = suggested(tmp_path / "a", Form()).mapping
    cropped = replace(mapping, picture_fit="crop")
    hashes = {open_dataset(tmp_path / "a", one).content_hash for one in (None, mapping, cropped)}
    assert len(hashes) == 3
    assert open_dataset(tmp_path / "a", mapping).content_hash in hashes


def test_training_without_a_mapping_names_the_one_thing_to_do(tmp_path):
    data = open_dataset(write_form(tmp_path / "a", Form()))
    with pytest.raises(BlmError, match=r"run `blm doctor .*a --suggest`, check the mapping"):
        joint_contract([data], POLICY, cameras=("top",), execute=3)


def test_jittering_clocks_are_refused_with_the_option_and_read_with_it(tmp_path):
    folder = write_form(tmp_path / "a", FORMS["clock jitter"])
    with pytest.raises(BlmError, match='state "clock": "frame_index" in a mapping'):
        open_dataset(folder)
    data = open_dataset(folder, suggest_mapping(folder).mapping)
    np.testing.assert_allclose(np.diff(data.timestamps[: LENGTHS[0]]), 0.1)


def test_doctor_writes_a_mapping_once_and_checks_through_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_form(tmp_path / "data", FORMS["bimanual"])
    with pytest.raises(SystemExit):
        run_command("doctor", ["data", "--suggest", "--image-size", "32", "--fit", "crop"])
    said = capsys.readouterr().out
    assert "wrote data.mapping.json" in said and "check: gripper 'left_gripper'" in said
    mapping = read_mapping(tmp_path / "data.mapping.json")
    assert (mapping.picture_fit, mapping.image_size) == ("crop", 32)
    with pytest.raises(BlmError, match="exists; move it away"):
        run_command("doctor", ["data", "--suggest"])
    with pytest.raises(SystemExit):
        run_command("doctor", ["--suggest"])
    assert "--suggest needs a dataset" in capsys.readouterr().err
