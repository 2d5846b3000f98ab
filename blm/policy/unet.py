"""Diffusion Policy's head: a U-Net over the action steps that predicts noise (Chi et al., RSS 2023,
arXiv 2303.04137), behind the same bridge and hidden states as our diffusion transformer.

It exists to compare the two heads on equal features. Noise schedule and sampler are those of
`diffusers` (extra `baselines`): 100 squared-cosine steps in training, DDIM in control.

Shape legend: B batch, C channels, H action steps, D padded action dimension, c condition width, L
prompt positions, d hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blm.bridge import Perceiver
from blm.policy.dit import sinusoid
from blm.policy.flow import ActionPrefix, time_quantile
from blm.policy.heads import IndexedMLP, Runs
from blm.policy.network import PolicyBatch, PolicyConfig, PolicyNetwork
from blm.types import BlmError

TRAIN_STEPS = 100
"""Number of diffusion steps in training, as in the paper."""


@cache
def noise_scheduler(train_steps: int = TRAIN_STEPS) -> Any:
    """Return the noise scheduler, which must be copied before its steps are set.

    Raises BlmError if `diffusers` is not installed.
    """
    try:
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    except ImportError as error:
        raise BlmError(
            "the Diffusion Policy baseline needs diffusers: pip install 'blm[baselines]'"
        ) from error
    with torch.device("cpu"):  # also while a network is made without values, on the meta device
        return DDIMScheduler(
            num_train_timesteps=train_steps,
            beta_schedule="squaredcos_cap_v2",
            prediction_type="epsilon",
            clip_sample=True,
            clip_sample_range=1.5,  # actions are normalised to about -1 .. 1, outliers beyond
        )


def denoise(
    predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor, scheduler: Any, sampler_steps: int
) -> Tensor:
    """Return actions [B, H, D] from `noise` by DDIM steps.

    `predict` returns the noise of noisy actions [B, H, D] at the diffusion steps [B].
    """
    scheduler, x = copy.deepcopy(scheduler), noise
    scheduler.set_timesteps(sampler_steps)
    for step in scheduler.timesteps.tolist():
        predicted = predict(x, torch.full((len(x),), float(step), device=x.device))
        x = scheduler.step(predicted, step, x).prev_sample
    return x


class FilmBlock(nn.Module):
    """Two convolutions over action steps; the condition scales and shifts activations (FiLM)."""

    def __init__(self, inputs: int, outputs: int, condition: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv1d(inputs, outputs, 5, padding=2), nn.GroupNorm(8, outputs), nn.Mish()
        )
        self.second = nn.Sequential(
            nn.Conv1d(outputs, outputs, 5, padding=2), nn.GroupNorm(8, outputs), nn.Mish()
        )
        self.film = nn.Linear(condition, 2 * outputs)
        self.skip = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x_BCH: Tensor, condition_Bc: Tensor) -> Tensor:
        scale, shift = self.film(F.mish(condition_Bc))[..., None].chunk(2, dim=1)
        made = self.second(self.first(x_BCH) * (1 + scale) + shift)
        return made + self.skip(x_BCH)


class UNet(nn.Module):
    """Denoiser: noisy actions [B, H, D], steps [B], condition [B, c] -> noise [B, H, D]."""

    def __init__(self, dim: int, widths: Sequence[int], condition: int) -> None:
        super().__init__()
        self.step = nn.Sequential(nn.Linear(128, 256), nn.Mish(), nn.Linear(256, 128))
        condition += 128
        downs = zip((dim, *widths[:-1]), widths, strict=True)
        ups = zip(widths[::-1][1:], widths[::-1][:-1], strict=True)
        self.downs = nn.ModuleList(FilmBlock(a, b, condition) for a, b in downs)
        self.shrink = nn.ModuleList(nn.Conv1d(width, width, 3, 2, 1) for width in widths[:-1])
        self.middle = FilmBlock(widths[-1], widths[-1], condition)
        self.grow = nn.ModuleList(nn.ConvTranspose1d(w, w, 4, 2, 1) for w in widths[:0:-1])
        self.ups = nn.ModuleList(FilmBlock(a + b, a, condition) for a, b in ups)
        self.out = nn.Sequential(
            nn.Conv1d(widths[0], widths[0], 5, padding=2), nn.Mish(), nn.Conv1d(widths[0], dim, 1)
        )

    def forward(self, noisy_BHD: Tensor, step_B: Tensor, condition_Bc: Tensor) -> Tensor:
        time_Bc = self.step(sinusoid(step_B / 1000, 128))
        condition_Bc = torch.cat([time_Bc, condition_Bc], dim=-1)
        x, kept = noisy_BHD.transpose(1, 2), list[Tensor]()
        for level, block in enumerate(self.downs):
            x = block(x if level == 0 else self.shrink[level - 1](kept[-1]), condition_Bc)
            kept.append(x)
        x = self.middle(x, condition_Bc)
        for grow, block, before in zip(self.grow, self.ups, kept[-2::-1], strict=True):
            x = block(torch.cat([grow(x), before], dim=1), condition_Bc)
        return self.out(x).transpose(1, 2)


class UNetPolicyNetwork(PolicyNetwork):
    """Bridge, and a U-Net conditioned on all its intent tokens and the state.

    Its loss is the masked mean squared error of the noise; there are no future tokens.
    """

    def __init__(self, config: PolicyConfig, hidden_size: int, embodiments: int) -> None:
        nn.Module.__init__(self)  # not that of PolicyNetwork, whose transformer it replaces
        self.config = config
        noise_scheduler()  # a missing package is named before hidden states are computed
        width = config.width
        self.bridge = Perceiver(config.bridge, hidden_size)
        self.encode_state = IndexedMLP(embodiments, config.max_dim, width, width)
        inputs = config.bridge.latents * config.bridge.width + width
        self.condition = nn.Sequential(
            nn.Linear(inputs, 2 * width), nn.Mish(), nn.Linear(2 * width, 2 * width)
        )
        self.unet = UNet(config.max_dim, config.unet_widths, 2 * width)

    def encode_condition(
        self, hidden: Tensor, mask: Tensor, state: Tensor, embodiment: Tensor | Runs
    ) -> Tensor:
        """Return the condition [B, c] for hidden states [B, L, d] and states [B, D]."""
        state_token = self.encode_state(state[:, None], embodiment)[:, 0]
        return self.condition(torch.cat([self.bridge(hidden, mask).flatten(1), state_token], dim=-1))

    def loss(self, batch: PolicyBatch, teacher: PolicyNetwork) -> dict[str, Tensor]:
        """Return scalars 'loss', 'loss_flow' (here the error of the noise) and 'loss_future', 0."""
        real = batch.real
        actions, noise = batch.actions * real, batch.noise * real
        steps = (time_quantile(batch.tau) * TRAIN_STEPS).long().clamp(0, TRAIN_STEPS - 1)
        noisy = noise_scheduler().add_noise(actions, noise, steps) * real
        condition = self.encode_condition(
            batch.hidden, batch.mask, batch.state, batch.runs or batch.embodiment
        )
        error = (self.unet(noisy, steps.float(), condition) - noise).square() * real
        loss = error.sum() / (batch.values * len(error) or real.sum())
        return {"loss": loss, "loss_flow": loss, "loss_future": torch.zeros_like(loss)}

    @torch.no_grad()
    def sample(
        self,
        hidden: Tensor,
        mask: Tensor,
        state: Tensor,
        embodiment: Tensor | Runs,
        noise: Tensor,
        dims: Tensor,
        prefix: ActionPrefix | None = None,
    ) -> Tensor:
        """Return normalised actions [B, H, D] by DDIM steps; see `PolicyNetwork.sample`.

        Raises BlmError for a `prefix`: real-time chunking guides flow matching.
        """
        if prefix is not None:
            raise BlmError("a policy with a U-Net head cannot continue a chunk (real-time chunking)")
        condition, real = self.encode_condition(hidden, mask, state, embodiment), dims[:, None]

        def predict(x: Tensor, steps: Tensor) -> Tensor:
            return self.unet(x, steps, condition) * real

        return denoise(predict, noise * real, noise_scheduler(), self.config.sampler_steps)


def make_network(config: PolicyConfig, hidden_size: int, embodiments: int) -> PolicyNetwork:
    """Return an untrained policy network with the head that the config names."""
    kind = UNetPolicyNetwork if config.head == "unet" else PolicyNetwork
    return kind(config, hidden_size, embodiments)
