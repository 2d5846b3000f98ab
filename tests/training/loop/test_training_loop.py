from __future__ import annotations

import copy
import errno
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blm.training.loop import state as checkpoint
from blm.training.loop.batches import Microbatch
from blm.training.loop.distributed import DataShard, Processes
from blm.training.loop.ema import Ema
from blm.training.loop.loop import LoopConfig, run_loop
from blm.training.loop.optimizers import Optimizers
from blm.training.loop.state import CheckpointWriter, checkpoints
from blm.types import BlmError

CONFIG = LoopConfig(steps=12, batch_size=4, lr=1e-2, log_every=4, save_every=5, seed=3)


@dataclass
class Points:
    x: Tensor
    ids: tuple[int, ...]


def batch_of(step: int, part: DataShard) -> Microbatch[Points]:
    rng = np.random.default_rng((CONFIG.seed, step))
    points = part.of(torch.from_numpy(rng.normal(size=(4, 3)).astype(np.float32)))
    return Microbatch(Points(points, (step, step + 1)), (step, step + 1), weight=len(points))


class Noisy(nn.Module):
    """Dropout draws from the global generator, so an exact resume must restore it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.kill_at = -1

    def loss(self, batch: Points) -> tuple[Tensor, Mapping[str, float]]:
        if batch.ids[0] == self.kill_at:
            raise KeyboardInterrupt
        loss = (self.net(batch.x).sum(-1) - batch.x.sum(-1)).square().mean()
        return loss, {"twice": 2 * loss.item()}


def train(out: Path, config: LoopConfig = CONFIG, kill_at: int = -1) -> tuple[Noisy, Ema]:
    module = Noisy()
    ema = Ema(module, 0.9)
    module.kill_at = kill_at
    run_loop(module, module.loss, batch_of, config, out, ema=ema)
    return module, ema


def rows(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    whole, whole_ema = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", kill_at=9)  # the checkpoint is of step 5, the log goes to step 8
    with (tmp_path / "cut" / "log.jsonl").open("a") as log:
        log.write('{"step": 9, "lo')
    cut, cut_ema = train(tmp_path / "cut")
    pairs = ((whole, cut), (whole_ema.module, cut_ema.module))
    for one, other in pairs:
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
    assert [row["step"] for row in rows(tmp_path / "cut")] == [4, 8, 12]
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("whole", "cut")]
    assert losses[0][0] == losses[1][0]


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first, _ = train(tmp_path)
    again, _ = train(tmp_path, kill_at=0)
    assert torch.equal(first.net[0].weight, again.net[0].weight)


def test_log_rows_schedule_and_evaluation(tmp_path: Path) -> None:
    module = Noisy()
    config = replace(CONFIG, log_every=1, warmup_fraction=0.25, eval_every=6)
    seen: list[int] = []

    def evaluate(step: int) -> dict[str, float]:
        seen.append(step)
        return {"score": float(step)}

    run_loop(module, module.loss, batch_of, config, tmp_path, on_eval=evaluate)
    log = rows(tmp_path)
    assert seen == [6, 12]
    assert [row.get("score") for row in log if row["step"] % 6 == 0] == [6.0, 12.0]
    rates = [row["lr"] for row in log]
    assert rates[:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])
    assert sorted(rates[3:], reverse=True) == rates[3:]
    assert 0 < rates[-1] < 1e-3
    for row in log:
        assert row["twice"] == pytest.approx(2 * row["loss"], rel=1e-5)
        assert row["samples_per_s"] > 0 and 0 <= row["data_share"] <= 1


def test_first_step_is_adamw_by_the_textbook(tmp_path: Path) -> None:
    module = nn.Linear(2, 1, bias=True)
    weight, bias = module.weight.detach().clone(), module.bias.detach().clone()
    config = LoopConfig(steps=1, batch_size=1, lr=0.1, weight_decay=0.5, warmup_fraction=0.0, clip=1e9)
    batch = Points(torch.tensor([[1.0, -2.0]]), (0,))
    piece = Microbatch(batch, batch.ids)
    run_loop(module, lambda b: (module(b.x).sum(), {}), lambda step, part: piece, config, tmp_path)
    # Adam's first step is lr * sign(gradient); decay multiplies matrices by 1 - lr * decay, not biases.
    expected = weight * (1 - 0.1 * 0.5) - 0.1 * batch.x.sign()
    assert torch.allclose(module.weight, expected, atol=1e-5)
    assert torch.allclose(module.bias, bias - 0.1, atol=1e-5)


def test_own_rates_and_frozen_parameters(tmp_path: Path) -> None:
    module = nn.Sequential(
        nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 1, bias=False)
    )
    module[1].requires_grad_(False)
    before = [layer.weight.detach().clone() for layer in module]
    config = LoopConfig(steps=1, batch_size=4, lr=1.0, weight_decay=0.0, warmup_fraction=0.0)
    run_loop(
        module,
        lambda b: (module(b.x).square().mean(), {}),
        batch_of,
        config,
        tmp_path,
        learning_rate=lambda name: 1e-3 if name.startswith("0.") else 1e-2,
    )
    moved = [(layer.weight - old).abs().max().item() for layer, old in zip(module, before, strict=True)]
    assert moved == pytest.approx([1e-3, 0.0, 1e-2], rel=1e-3)
    with pytest.raises(BlmError, match="nothing to train"):
        run_loop(module.requires_grad_(False), lambda b: (b.x.sum(), {}), batch_of, config, tmp_path / "no")


MUON = replace(CONFIG, muon=0.02)
HIDDEN = ["blocks.0.weight", "blocks.1.weight"]
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is of torch 2.9")


class Deep(Noisy):
    """Two hidden layers in blocks, as in a transformer, between one before and one after."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 1)
        self.noise = nn.Dropout(0.1)

    def loss(self, batch: Points) -> tuple[Tensor, Mapping[str, float]]:
        if batch.ids[0] == self.kill_at:
            raise KeyboardInterrupt
        hidden = self.net(batch.x)
        for block in self.blocks:
            hidden = hidden + self.noise(block(hidden).relu())
        return (self.head(hidden).sum(-1) - batch.x.prod(-1)).square().mean(), {}


def deep(out: Path, config: LoopConfig, kill_at: int = -1) -> Deep:
    module = Deep()
    module.kill_at = kill_at
    run_loop(module, module.loss, batch_of, config, out)
    return module


@needs_muon
def test_a_killed_run_with_muon_resumes_to_the_same_weights(tmp_path: Path) -> None:
    whole = deep(tmp_path / "whole", MUON)
    with pytest.raises(KeyboardInterrupt):
        deep(tmp_path / "cut", MUON, kill_at=9)
    cut = deep(tmp_path / "cut", MUON)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, cut.state_dict()[name]), name
    assert not torch.equal(whole.blocks[0].weight, deep(tmp_path / "without", CONFIG).blocks[0].weight)


@needs_muon
def test_muon_gets_the_matrices_in_blocks_and_nothing_else() -> None:
    for muon, expected in ((0.02, HIDDEN), (0.0, [])):
        optimizers = Optimizers(
            Deep(), lambda name: 1e-3, lr=1e-2, muon=muon, betas=(0.9, 0.95), weight_decay=0.1
        )
        state = optimizers.state()
        assert sorted(key.rsplit("/")[0] for key in state if key.endswith("momentum_buffer")) == expected
        adam = {key.rsplit("/")[0] for key in state if key.endswith("exp_avg")}
        assert adam == optimizers.names.keys() - {*expected}
        peaks = {
            type(part).__name__: {g["peak"] for g in part.param_groups} for part in optimizers.optimizers
        }
        assert peaks == {"AdamW": {1e-3}} | ({"Muon": {0.02 * 1e-3 / 1e-2}} if muon else {})


@needs_muon
def test_the_first_step_of_muon_moves_in_all_directions_alike(tmp_path: Path) -> None:
    """The update is orthogonal: all singular values are about the rate, whatever the gradient's are."""
    module = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(6, 6, bias=False)])})
    weight = module["blocks"][0].weight
    before, slope = weight.detach().clone(), torch.diag(torch.tensor([1.0, 2, 4, 8, 16, 32]))
    config = LoopConfig(steps=1, batch_size=4, muon=0.02, weight_decay=0.0, warmup_fraction=0.0, clip=1e9)
    run_loop(module, lambda b: ((weight * slope).sum(), {}), batch_of, config, tmp_path)
    moved = torch.linalg.svdvals(before - weight.detach()) / 0.02
    assert moved.min() > 0.5 and moved.max() < 1.5


@needs_muon
def test_a_run_with_muon_learns(tmp_path: Path) -> None:
    deep(tmp_path, replace(MUON, steps=150, log_every=1))
    losses = [row["loss"] for row in rows(tmp_path)]
    assert np.mean(losses[-30:]) < 0.5 * np.mean(losses[:10])


def test_muon_needs_a_torch_that_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(BlmError, match="muon needs torch"):
        deep(tmp_path / "a", MUON)
    deep(tmp_path / "b", CONFIG)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_the_run_untouched(tmp_path: Path, bad: str) -> None:
    module = nn.Linear(3, 1)
    nn.init.zeros_(module.bias)
    weight = module.weight.detach().clone()

    def loss(batch: Points) -> tuple[Tensor, dict[str, float]]:
        # the square root has an infinite slope at 0
        return (module(batch.x).sum() * torch.nan if bad == "loss" else module.bias.sum().sqrt()), {}

    with pytest.raises(BlmError, match=r"step 0, samples \[0, 1\]"):
        run_loop(module, loss, batch_of, CONFIG, tmp_path)
    assert torch.equal(module.weight, weight)


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(BlmError, match="another config"):
        train(tmp_path, replace(CONFIG, lr=1e-4))
    train(tmp_path, replace(CONFIG, log_every=1))
    other = nn.Linear(3, 1)
    with pytest.raises(BlmError, match="another module"):
        run_loop(other, lambda b: (other(b.x).sum(), {}), batch_of, CONFIG, tmp_path)
    with pytest.raises(BlmError, match="steps is 0"):
        LoopConfig(steps=0, batch_size=1)


def test_an_error_in_a_batch_reaches_the_caller(tmp_path: Path) -> None:
    def broken(step: int, part: DataShard) -> Microbatch[Points]:
        if step == 2:
            raise BlmError("corpus row 7 has no picture")
        return batch_of(step, part)

    module = Noisy()
    with pytest.raises(BlmError, match="row 7"):
        run_loop(module, module.loss, broken, CONFIG, tmp_path)


def test_a_step_in_parts_is_the_step_in_one(tmp_path: Path) -> None:
    """Parts of unlike weight: the loss is the mean over all samples, not the mean of means."""
    weights = []
    for accumulate in (1, 3):
        module = nn.Linear(3, 1)
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
        config = replace(CONFIG, accumulate=accumulate, log_every=1)

        def loss(batch: Points, module: nn.Module = module) -> tuple[Tensor, dict[str, float]]:
            return module(batch.x).square().mean(), {"half": 0.5}

        run_loop(module, loss, batch_of, config, tmp_path / str(accumulate))
        weights.append(torch.cat([value.flatten() for value in module.state_dict().values()]))
    for one, other in zip(rows(tmp_path / "1"), rows(tmp_path / "3"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
        assert other["half"] == pytest.approx(0.5)
    assert torch.allclose(*weights, atol=1e-6)
    with pytest.raises(BlmError, match="batch_size is 4, but a step has 1 processes x 5 parts"):
        run_loop(
            nn.Linear(3, 1), lambda b: (b.x.sum(), {}), batch_of, replace(CONFIG, accumulate=5), tmp_path
        )


def test_the_log_has_tokens_and_padding_and_old_checkpoints_are_removed(tmp_path: Path) -> None:
    def padded(step: int, part: DataShard) -> Microbatch[Points]:
        return replace(batch_of(step, part), tokens=30, positions=40)

    module = Noisy()
    run_loop(module, module.loss, padded, replace(CONFIG, save_every=2, keep=3), tmp_path)
    row = rows(tmp_path)[-1]
    assert row["padding_share"] == pytest.approx(0.25)
    assert row["tokens_per_s"] == pytest.approx(15 * row["samples_per_s"])
    assert [int(file.stem.removeprefix("state-")) for file in checkpoints(tmp_path)] == [8, 10, 12]


def test_trackers_get_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tracker:
        requires_logging_directory = True

        def __init__(self, name: str, logging_dir: str) -> None:
            calls.append((name, logging_dir))

        def start(self) -> None:
            calls.append("start")

        def store_init_configuration(self, values: dict[str, str]) -> None:
            calls.append(values["steps"])

        def log(self, values: dict[str, float], step: int) -> None:
            calls.append((step, values["loss"]))

        def finish(self) -> None:
            calls.append("finish")

    calls: list[object] = []
    config, module = replace(CONFIG, trackers=("trackio",)), Noisy()
    monkeypatch.setattr("blm.training.loop.metrics.get_available_trackers", lambda: ["trackio"])
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", Tracker)
    run_loop(module, module.loss, batch_of, config, tmp_path)
    logged = [(row["step"], row["loss"]) for row in rows(tmp_path)]
    assert calls == [(tmp_path.name, str(tmp_path)), "start", "12", *logged, "finish"]
    with pytest.raises(BlmError, match="'wandb' is not installed"):
        run_loop(module, module.loss, batch_of, replace(CONFIG, trackers=("wandb",)), tmp_path / "no")


def test_a_negative_rate_of_muon_is_refused():
    with pytest.raises(BlmError, match=r"muon is -0\.02"):
        LoopConfig(steps=1, batch_size=1, muon=-0.02)


# --- checkpoints in the background -------------------------------------------------------------------------


ALONE = Processes(0, 1, torch.device("cpu"))


def test_a_checkpoint_holds_the_values_of_its_step_while_training_goes_on(tmp_path, monkeypatch):
    matrix, begun, let = torch.arange(12.0).reshape(3, 4), threading.Event(), threading.Event()
    tensors = {"a": matrix, "again": matrix, "column": matrix[:, 1], "number": torch.tensor(7)}
    before = {name: value.clone() for name, value in tensors.items()}

    def slow(*given):
        begun.set()
        assert let.wait(20)
        save_file(*given)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    with CheckpointWriter(tmp_path, ALONE, keep=1) as writer:
        for done in (1, 2):
            writer.save({"done": done}, tensors)  # the second waits for the first
            assert begun.wait(20) and len(checkpoints(tmp_path)) == done - 1
            matrix += 1
            let.set()
    (file,) = checkpoints(tmp_path)
    saved = load_file(file)
    assert file.name == "state-00000002.safetensors"
    for name in before.keys() - {"number"}:
        assert torch.equal(saved[name], before[name] + 1), name
    assert saved["number"] == 7


def test_an_error_of_the_writer_ends_the_run_and_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        if int(json.loads(metadata["run"])["done"]) > 5:
            raise OSError(errno.ENOSPC, "no space left")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(BlmError, match="the disk is full"):
        train(tmp_path)
    assert [file.name for file in checkpoints(tmp_path)] == ["state-00000005.safetensors"]
    monkeypatch.undo()
    cut, whole = train(tmp_path)[0], train(tmp_path / "whole")[0]
    assert all(torch.equal(v, whole.state_dict()[name]) for name, v in cut.state_dict().items())


def test_an_average_by_foreach_has_the_bits_of_one_by_one() -> None:
    module = Noisy()
    ema, slow = Ema(module, 0.9), copy.deepcopy(module)
    for step in range(4):
        with torch.no_grad():
            for p in (*module.parameters(), module.net[1].running_mean):
                p.add_(torch.randn_like(p))
            for average, p in zip(slow.parameters(), module.parameters(), strict=True):
                average.lerp_(p, 1 - min(0.9, (1 + step) / (10 + step)))
        ema.update(module, step)
    slow.net[1].running_mean.copy_(module.net[1].running_mean)
    for name, value in slow.state_dict().items():
        assert torch.equal(ema.module.state_dict()[name], value), name


def test_products_in_bfloat16_change_little_and_weights_stay_float32(tmp_path: Path) -> None:
    module, _ = train(tmp_path / "a")
    rounded, _ = train(tmp_path / "b", replace(CONFIG, precision="bfloat16"))
    assert all(value.dtype is not torch.bfloat16 for value in rounded.state_dict().values())
    for row, other in zip(rows(tmp_path / "a"), rows(tmp_path / "b"), strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=0.05)
    assert not torch.equal(module.net[0].weight, rounded.net[0].weight)
    with pytest.raises(BlmError, match="another config"):
        train(tmp_path / "a", replace(CONFIG, precision="bfloat16"))


def test_a_run_of_a_version_without_precision_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, kill_at=9)
    (file,) = checkpoints(tmp_path)
    with safe_open(file, "pt") as saved:
        run = json.loads(saved.metadata()["run"])
        tensors = {name: saved.get_tensor(name) for name in set(saved.keys())}
    del run["config"]["precision"]
    save_file(tensors, file, {"run": json.dumps(run)})
    train(tmp_path)
    assert rows(tmp_path)[-1]["step"] == 12
