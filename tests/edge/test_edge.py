"""Exported policies: the actions of torch without torch, and refusals of what does not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blm.app.edge.export import ExportConfig, _to_openvino, export_policy, largest_difference
from blm.app.exported import load_exported
from blm.app.pretrained import BLM
from blm.cli import main
from blm.edge import graphs
from blm.edge.folder import CARD, MANIFEST, is_export, read_manifest, write_manifest
from blm.edge.noise import seeded_noise
from blm.edge.policy import ExportedPolicy
from blm.policy import flow
from blm.policy.policy import CheckpointPolicy
from blm.types import BlmError, ContractError
from tests.support.policies import CONFIG, make_observation, make_policy

needs_onnx = pytest.mark.skipif(
    not all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="the packages of blm[edge] are not installed",
)
SMALL = replace(CONFIG, blocks=2, future_layer=1, sampler_steps=2)
TOLERANCE = 1e-4
"""Of actions [rad]; measured: 4e-7."""


def stop_torch() -> str:
    """Return code that makes an import of torch or transformers fail."""
    return (
        "import sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.split('.')[0] in ('torch', 'transformers', 'onnx', 'scipy'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Stop())\n"
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[CheckpointPolicy, Path]:
    policy, folder = make_policy(config=SMALL), tmp_path_factory.mktemp("policy") / "checkpoint"
    policy.save(folder, {"command": "test"})
    return policy, folder


@pytest.fixture(scope="module")
def exported(checkpoint: tuple[CheckpointPolicy, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "onnx"
    export_policy(str(checkpoint[1]), out, ExportConfig())
    return out


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "onnx"
    folder.mkdir()
    for path in exported.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("shape", [(16, 16), (5, 6), (1, 16), (3, 11)])
def test_noise_of_a_seed_is_that_of_torch(shape: tuple[int, int]) -> None:
    seeds = [0, 1, 2**32 - 1, 12_345_678_901, -1]
    ours, theirs = seeded_noise(seeds, shape), flow.seeded_noise(seeds, shape).numpy()
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_noise_of_few_numbers_is_refused() -> None:
    with pytest.raises(BlmError, match="at least 16"):
        seeded_noise([0], (3, 4))


@needs_onnx
def test_graphs_choose_the_actions_of_torch(
    checkpoint: tuple[CheckpointPolicy, Path], exported: Path
) -> None:
    policy = checkpoint[0]
    observations = [make_observation(("arm", "leg")[seed % 2], seed) for seed in range(5)]
    assert largest_difference(policy, ExportedPolicy.load(exported), observations) < TOLERANCE


@needs_onnx
def test_fewer_denoising_steps_are_those_of_torch_with_as_many(
    checkpoint: tuple[CheckpointPolicy, Path], tmp_path: Path
) -> None:
    export_policy(str(checkpoint[1]), tmp_path / "one", ExportConfig(sampler_steps=1))
    policy, observations = CheckpointPolicy.load(checkpoint[1]), [make_observation("arm", 1)]
    exported = ExportedPolicy.load(tmp_path / "one")
    assert largest_difference(policy, exported, observations) > TOLERANCE
    policy.network.config = replace(policy.network.config, sampler_steps=1)
    assert largest_difference(policy, exported, observations) < TOLERANCE
    assert read_manifest(tmp_path / "one").provenance["sampler_steps"] == 1


@needs_onnx
def test_a_batch_of_unlike_prompts_gives_the_actions_of_each_alone(exported: Path) -> None:
    policy = ExportedPolicy.load(exported)
    observations = [make_observation(("arm", "leg")[seed % 2], seed) for seed in range(3)]
    for one, chunk in zip(observations, policy.act_batch(observations), strict=True):
        np.testing.assert_allclose(chunk.actions, policy.act(one).actions, atol=TOLERANCE)
    first, again = (policy.act(observations[0]).actions for _ in range(2))
    np.testing.assert_array_equal(first, again)


@needs_onnx
def test_it_is_loaded_and_acts_without_torch(exported: Path) -> None:
    code = stop_torch() + (
        "import numpy as np\nfrom blm import BLM, Observation\n"
        f"model = BLM.from_pretrained({str(exported)!r}, runtime='onnx')\n"
        "images = {name: np.zeros((32, 32, 3), np.uint8) for name in ('base', 'wrist')}\n"
        "chunk = model.act(Observation(images=images, state=np.zeros(4), instruction='go', robot='arm'))\n"
        "assert chunk.actions.shape == (5, 4), chunk.actions.shape\n"
        "import blm.cli.serve, blm.cli.physical, blm.serving.app\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_onnx
def test_the_contract_is_that_of_the_checkpoint_with_its_own_revision(
    checkpoint: tuple[CheckpointPolicy, Path], exported: Path
) -> None:
    theirs, ours = checkpoint[0].contract, ExportedPolicy.load(exported).contract
    assert ours == replace(theirs, revision=f"{theirs.revision}+onnx")


@needs_onnx
@pytest.mark.parametrize("name", ["eye.onnx", "actor.onnx", "tokenizer.json", "stats.json", MANIFEST])
def test_an_altered_file_is_named(copied: Path, name: str) -> None:
    content = bytearray((copied / name).read_bytes())
    where = content.index(b'"horizon": 5') + 11 if name == MANIFEST else len(content) // 2
    content[where] ^= 1
    (copied / name).write_bytes(content)
    with pytest.raises(BlmError, match=f"{name} is altered"):
        ExportedPolicy.load(copied)


@needs_onnx
def test_a_missing_file_another_format_and_another_program_are_named(copied: Path) -> None:
    (copied / CARD).write_text("people may add to the card")
    read_manifest(copied)
    (copied / "reader.onnx").rename(copied.parent / "reader.onnx")
    with pytest.raises(BlmError, match=r"reader\.onnx is missing"):
        read_manifest(copied)
    rewrite(copied, lambda value: value | {"format": 99})
    with pytest.raises(BlmError, match="format 99, this program reads 1"):
        read_manifest(copied)
    rewrite(copied, lambda value: {"kind": "another"})
    with pytest.raises(BlmError, match="another program"):
        read_manifest(copied)
    (copied / MANIFEST).unlink()
    with pytest.raises(BlmError, match="blm export onnx"):
        ExportedPolicy.load(copied)


@needs_onnx
def test_statistics_of_another_contract_are_refused(copied: Path) -> None:
    stats = json.loads((copied / "stats.json").read_text())
    stats["arm"]["state"]["low"][0] = -2.0
    (copied / "stats.json").write_text(json.dumps(stats))
    manifest = read_manifest_unchecked(copied)
    write_manifest(copied, manifest)
    with pytest.raises(BlmError, match="another contract"):
        ExportedPolicy.load(copied)


@needs_onnx
def test_a_missing_operator_set_is_refused_by_name(copied: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(str(copied / "eye.onnx"))
    for one in model.opset_import:
        one.version = 999
    onnx.save(model, str(copied / "eye.onnx"))
    write_manifest(copied, read_manifest_unchecked(copied))
    with pytest.raises(BlmError, match=r"cannot load '.*eye\.onnx', whose operators"):
        ExportedPolicy.load(copied)


@needs_onnx
def test_a_missing_runtime_is_named(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(graphs.PACKAGES, "onnx", "no_such_package")
    with pytest.raises(BlmError, match="pip install no_such_package"):
        ExportedPolicy.load(exported)


@needs_onnx
def test_observations_that_do_not_fit_are_refused(exported: Path) -> None:
    policy, good = ExportedPolicy.load(exported), make_observation()
    for bad, what in (
        (replace(good, instruction="put <image> there"), "reserved"),
        (replace(good, instruction="x" * 500), "400 bytes"),
        (replace(good, robot="nobody"), "unknown robot"),
        (replace(good, chunk=np.zeros((2, 4), np.float32)), "cannot continue a chunk"),
    ):
        with pytest.raises(BlmError, match=what):
            policy.act(bad)
    with pytest.raises(ContractError):
        policy.act(replace(good, images={}))


@needs_onnx
def test_the_wrong_way_to_load_a_folder_is_refused(
    checkpoint: tuple[CheckpointPolicy, Path], exported: Path
) -> None:
    assert is_export(exported) and not is_export(checkpoint[1])
    with pytest.raises(BlmError, match="blm export onnx CHECKPOINT OUT"):
        BLM.from_pretrained(checkpoint[1], runtime="onnx")
    with pytest.raises(BlmError, match="exported for onnx, not for openvino"):
        load_exported(exported, "openvino")
    with pytest.raises(BlmError, match="torch runs checkpoints"):
        BLM.from_pretrained(exported, runtime="torch")
    with pytest.raises(BlmError, match="does not chat"):
        BLM.from_pretrained(exported).answer([])


@needs_onnx
@pytest.mark.parametrize(
    "words",
    [
        ["serve", "{}", "--compile", "default"],
        ["serve", "{}", "--dtype", "bfloat16"],
        ["eval", "physical", "--model", "{}", "--out", "x", "--continued"],
    ],
)
def test_flags_of_torch_are_refused(
    exported: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([word.format(exported) for word in words])
    assert "a setting of checkpoints" in " ".join(capsys.readouterr().err.split())


@needs_onnx
@pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
def test_openvino_chooses_the_actions_of_onnxruntime(exported: Path, copied: Path) -> None:
    _to_openvino(copied)
    write_manifest(copied, replace(read_manifest_unchecked(copied), runtime="openvino"))
    ours, theirs = ExportedPolicy.load(exported), load_exported(copied, "openvino")
    assert theirs.contract.revision.endswith("+openvino")
    for seed in range(2):
        one = make_observation("leg", seed)
        np.testing.assert_allclose(ours.act(one).actions, theirs.act(one).actions, atol=TOLERANCE)


@needs_onnx
@pytest.mark.slow  # a second export
def test_static_graphs_take_batches_of_every_size(
    checkpoint: tuple[CheckpointPolicy, Path], tmp_path: Path
) -> None:
    policy, folder = checkpoint
    config = ExportConfig(batch=2, length=420)
    export_policy(str(folder), tmp_path / "static", config)
    static = ExportedPolicy.load(tmp_path / "static")
    observations = [make_observation("leg", seed) for seed in range(3)]
    assert largest_difference(policy, static, observations) < TOLERANCE
    with pytest.raises(BlmError, match="this exported policy reads 420"):
        static.act(replace(observations[0], instruction="ä" * 200))


@needs_onnx
def test_bad_settings_of_an_export_are_refused(
    checkpoint: tuple[CheckpointPolicy, Path], tmp_path: Path
) -> None:
    for bad in ({"batch": 0}, {"length": 5000}, {"precision": "bfloat16"}, {"sampler_steps": 0}):
        with pytest.raises(BlmError):
            ExportConfig(**bad)  # type: ignore[arg-type]
    with pytest.raises(BlmError, match="length is 5; a short prompt"):
        export_policy(str(checkpoint[1]), tmp_path / "x", ExportConfig(length=5))
    with pytest.raises(BlmError, match="no checkpoint"):
        export_policy(str(tmp_path), tmp_path / "x", ExportConfig())
    assert not (tmp_path / "x").exists()


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    value = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    (folder / MANIFEST).write_text(json.dumps(change(value)), encoding="utf-8")


def read_manifest_unchecked(folder: Path) -> Any:
    from blm.edge.folder import ExportManifest

    return ExportManifest.from_json(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
