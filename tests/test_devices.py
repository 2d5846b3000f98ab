"""Device, precision and attention implementation reach every place that loads a model; no GPU is needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from blm.app.recipe import load_options
from blm.app.recipes import RECIPES
from blm.app.stages import run_eval_digital, run_eval_physical, run_stage1
from blm.backbone import Backbone
from blm.backbone.precision import frozen_dtype, place_weights
from blm.cli import main
from blm.policy.checkpoint import checkpoint_folder, read_contract
from blm.policy.policy import CheckpointPolicy
from blm.training.loop import distributed
from blm.training.loop.distributed import Processes, process_timeout
from blm.training.loop.loop import LoopConfig
from blm.training.policy import train
from blm.training.policy.config import PolicyTrainingConfig
from blm.training.policy.hidden_states import HiddenStateConfig
from blm.types import BlmError, UnknownNameError
from tests.support.backbones import tiny_qwen

FLAGS = ["--device", "cuda:3", "--attn-implementation", "eager"]


class LoadingStarted(BaseException):
    """A model would be loaded with these arguments. No handler of errors catches it."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(str(options))
        self.options = options


@pytest.fixture(autouse=True)
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*given: Any, **options: Any) -> None:
        raise LoadingStarted(*given, **options)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr("blm.backbone.precision._supports_bfloat16", lambda device: True)
    monkeypatch.setattr(Backbone, "load", load)
    monkeypatch.setattr(CheckpointPolicy, "load", load)


@pytest.mark.parametrize(
    ("command", "actions_only"),
    [
        ("chat blm-nano --question hello", False),
        ("serve blm-nano", False),
        ("serve blm-nano --actions-only", True),
        ("eval physical --model blm-nano --out OUT", True),
        ("eval digital --benchmark scene --data DATA --model blm-nano --out OUT", False),
    ],
)
def test_commands_load_a_checkpoint_as_asked(
    command: str, actions_only: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blm.cli.digital.load_questions", lambda *given: [])
    line = command.replace("OUT", str(tmp_path / "out")).replace("DATA", str(tmp_path))
    with pytest.raises(LoadingStarted) as loading:
        main([*line.split(), *FLAGS, "--dtype", "float32"])
    expected = {"device": "cuda:3", "dtype": "float32", "attn_implementation": "eager"}
    assert loading.value.options == {**expected, "actions_only": actions_only, "compile": "none"}


@pytest.mark.parametrize(
    "command",
    [
        "chat blm-nano --question hello",
        "serve blm-nano",
        "eval physical --model blm-nano --out OUT",
        "eval digital --benchmark scene --data DATA --model blm-nano --out OUT",
        "train stage1 OUT --corpus DATA --backbone smol --loop.steps 1 --loop.batch-size 1",
        "train stage2 OUT --datasets DATA --backbone smol --intents.layer 1 --intents.cameras base "
        "--loop.steps 1 --loop.batch-size 1",
        "demo --recipe ci --run OUT",
    ],
)
def test_commands_refuse_an_unknown_attention_implementation_before_they_load(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("blm.cli.digital.load_questions", lambda *given: [])
    line = command.replace("OUT", str(tmp_path / "out")).replace("DATA", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        main([*line.split(), "--attn-implementation", "flash"])
    shown = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 2 and "unknown attention implementation 'flash'" in shown and "eager" in shown
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_backbone_that_only_answers_is_bfloat16_on_a_gpu() -> None:
    with pytest.raises(LoadingStarted) as loading:
        main(["chat", "smolvlm_256m", "--question", "hello", *FLAGS])
    expected = {"device": "cuda:3", "dtype": torch.bfloat16, "attn_implementation": "eager"}
    assert loading.value.options == expected


@pytest.mark.parametrize(("more", "frozen"), [("", torch.bfloat16), ("--dtype float32", torch.float32)])
def test_stage_one_trains_float32_weights(more: str, frozen: torch.dtype, tmp_path: Path) -> None:
    line = f"train stage1 {tmp_path} --corpus {tmp_path} --backbone smol --loop.steps 1 --loop.batch-size 1"
    with pytest.raises(LoadingStarted) as loading:
        main([*line.split(), "--vision-scale", "0", *more.split(), *FLAGS])
    trains = loading.value.options.pop("float32")
    assert loading.value.options == {"device": "cuda:3", "dtype": frozen, "attn_implementation": "eager"}
    names = ("model.vision_tower.a", "model.multi_modal_projector.b", "model.language_model.c", "lm_head.d")
    assert [*map(trains, names)] == [False, True, True, True]


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.bfloat16), ("float32", torch.float32)])
def test_stage_two_freezes_a_bfloat16_backbone_on_a_gpu(dtype: Any, expected: torch.dtype) -> None:
    config = PolicyTrainingConfig(
        datasets=(),
        backbone="smol",
        intents=HiddenStateConfig(layer=1, cameras=("base",)),
        loop=LoopConfig(steps=1, batch_size=1),
        device="cuda:3",
        dtype=dtype,
        attn_implementation="eager",
    )
    with pytest.raises(LoadingStarted) as loading:
        train.train_stage2(config, Path("unused"), {})
    wanted = {"device": "cuda:3", "dtype": expected, "attn_implementation": "eager", "blocks": 1}
    assert loading.value.options == wanted


def test_a_recipe_passes_its_device_to_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(RECIPES["ci"](), device="cuda:3", dtype="float32", attn_implementation="eager")
    recipe = replace(recipe, stage1=replace(recipe.stage1, backbone="smol"))
    options = {"device": "cuda:3", "dtype": "float32", "attn_implementation": "eager"}
    assert load_options(recipe) == options
    contract = read_contract(checkpoint_folder("blm-nano"))
    monkeypatch.setattr("blm.app.stages.read_contract", lambda folder: contract)
    with pytest.raises(LoadingStarted) as loading:
        run_eval_physical(recipe, tmp_path)
    assert loading.value.options == options | {"actions_only": True}
    monkeypatch.setattr("blm.app.stages.BLM.from_pretrained", CheckpointPolicy.load)
    with pytest.raises(LoadingStarted) as loading:
        run_eval_digital(recipe, tmp_path)
    assert loading.value.options == options
    monkeypatch.setattr("blm.app.stages.read_corpus", lambda folder: [])
    monkeypatch.setattr("blm.app.stages.curate", lambda *given, **options: ([], None))
    with pytest.raises(LoadingStarted) as loading:
        run_stage1(recipe, tmp_path)
    assert loading.value.options.pop("float32") == recipe.stage1.training.trains
    assert loading.value.options == options | {"dtype": torch.float32}


def test_a_device_that_is_missing_ends_a_run_before_it_writes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(SystemExit):
        main(["demo", "--recipe", "ci", "--run", str(run), "--device", "cuda:4"])
    assert not run.exists()


def test_default_precision() -> None:
    assert frozen_dtype("cpu") == frozen_dtype("mps") == torch.float32
    assert frozen_dtype("cuda") == frozen_dtype("cuda:3") == frozen_dtype("cpu", "bfloat16") == torch.bfloat16
    assert frozen_dtype("cuda:3", "float32") == torch.float32


def test_bfloat16_is_refused_where_a_gpu_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blm.backbone.precision._supports_bfloat16", lambda device: False)
    with pytest.raises(BlmError, match="GPU 'cuda:1' does not support bfloat16; give --dtype float32"):
        frozen_dtype("cuda:1")
    assert frozen_dtype("cuda:1", "float32") == torch.float32


def test_weights_are_converted_and_computed_buffers_are_not() -> None:
    model = tiny_qwen("2_5").model
    place_weights(model, "meta", torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {value.device.type for value in model.buffers()} == {"meta"}
    frequencies = {value.dtype for name, value in model.named_buffers() if "inv_freq" in name}
    assert frequencies == {torch.float32}


def test_tf32_is_allowed_for_matrix_products_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    moved = list[dict[str, Any]]()
    model = nn.Linear(2, 2)
    monkeypatch.setattr(model, "to", lambda **options: moved.append(options))
    place_weights(model, "cpu", torch.float32)
    assert torch.backends.cuda.matmul.allow_tf32 == before
    place_weights(model, "cuda:3", torch.bfloat16)
    assert torch.backends.cuda.matmul.allow_tf32 is True
    torch.backends.cuda.matmul.allow_tf32 = before
    assert moved[-1] == {"device": "cuda:3", "dtype": torch.bfloat16}


def test_an_unknown_attention_implementation_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnknownNameError, match=r"flash_attention_2.*sdpa"):
        replace(RECIPES["ci"](), attn_implementation="flash")
    with pytest.raises(SystemExit):
        main(
            [
                "train",
                "stage1",
                "out",
                "--corpus",
                "c",
                "--loop.steps",
                "1",
                "--loop.batch-size",
                "1",
                "--attn-implementation",
                "flash",
            ]
        )
    assert "eager" in capsys.readouterr().err


def pretend(monkeypatch: pytest.MonkeyPatch, count: int, device: str) -> list[dict[str, Any]]:
    """Pretend that a launcher started `count` processes, of which this one, the second, has a device."""
    calls = list[dict[str, Any]]()

    def state(**options: Any) -> SimpleNamespace:
        calls.append(options)
        return SimpleNamespace(num_processes=count, process_index=count - 1, device=torch.device(device))

    monkeypatch.setattr(distributed, "PartialState", state)
    return calls


def test_one_process_keeps_the_gpu_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pretend(monkeypatch, 1, "cuda:0")
    assert Processes.join("cuda:3").device == torch.device("cuda:3")
    assert Processes.join(torch.device("cuda:3")).device == torch.device("cuda:3")
    assert calls == [{"cpu": False}] * 2
    assert Processes.join("cpu").device == torch.device("cpu") and calls[-1] == {"cpu": True}


def test_several_processes_use_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 2, "cuda:1")
    assert Processes.join("cuda").device == Processes.join("cuda:1").device == torch.device("cuda:1")
    with pytest.raises(BlmError, match="'cuda:3' was given, but process 1 of 2 uses 'cuda:1'"):
        Processes.join("cuda:3")


def test_the_timeout_of_the_process_group_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pretend(monkeypatch, 2, "cuda:1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("BLM_PROCESS_TIMEOUT", "7200")
    Processes.join("cuda")
    assert calls[-1]["timeout"].total_seconds() == 7200
    monkeypatch.delenv("BLM_PROCESS_TIMEOUT")
    assert process_timeout() is None
    for wrong in ("soon", "0", "inf", "-1"):
        monkeypatch.setenv("BLM_PROCESS_TIMEOUT", wrong)
        with pytest.raises(BlmError, match=f"BLM_PROCESS_TIMEOUT is '{wrong}'; give a positive number"):
            Processes.join("cuda")
