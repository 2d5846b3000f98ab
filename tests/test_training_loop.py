from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from blm.training.loop import Ema, LoopConfig, run_loop
from blm.types import BlmError

CONFIG = LoopConfig(steps=12, batch_size=4, lr=1e-2, log_every=4, save_every=5, seed=3)


@dataclass
class Points:
    x: Tensor
    ids: tuple[int, ...]


def batch_of(step: int) -> Points:
    rng = np.random.default_rng((CONFIG.seed, step))
    return Points(torch.from_numpy(rng.normal(size=(4, 3)).astype(np.float32)), (step, step + 1))


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
    run_loop(module, lambda b: (module(b.x).sum(), {}), lambda step: batch, config, tmp_path)
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
    def broken(step: int) -> Points:
        if step == 2:
            raise BlmError("corpus row 7 has no picture")
        return batch_of(step)

    module = Noisy()
    with pytest.raises(BlmError, match="row 7"):
        run_loop(module, module.loss, broken, CONFIG, tmp_path)
