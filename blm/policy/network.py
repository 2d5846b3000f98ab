"""The policy network: bridge, diffusion transformer and heads; its loss and its sampler.

    loss = masked mean of (V - (A - eps))^2  +  lambda * mean(1 - cos(MLP(DiT_l at future tokens), target))

The future tokens are trained to match the bridge's intent tokens of the frame `future_steps` ahead
(FLARE, arXiv 2505.15659): target is the stop-gradient of the teacher's bridge on that frame's
hidden states. The teacher is an exponential moving average of the whole network; the checkpoint
stores its weights. Beyond the end of an episode, its last frame is used: demonstrations end at
rest, so the scene would not change (choice).

Shape legend: B batch, L prompt positions, d hidden size, H action steps, D padded dimension, M
intent tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blm.bridge import BridgeConfig, Perceiver
from blm.policy import flow
from blm.policy.dit import DiT, IntentCache, TimeCache
from blm.policy.flow import ActionPrefix
from blm.policy.heads import ActionEncoder, IndexedMLP, Runs
from blm.types import BlmError, require_numbers


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Sizes of the bridge and the diffusion transformer, and weights of the losses.

    The defaults are those of blm-nano.
    """

    bridge: BridgeConfig = field(default_factory=BridgeConfig)
    """Size of the bridge."""
    head: Literal["dit", "unet"] = "dit"
    """What denoises chunks: our diffusion transformer with flow matching, or for comparison the U-Net
    of Diffusion Policy with DDPM noise (16 sampler_steps are usual), without future tokens."""
    unet_widths: tuple[int, ...] = (64, 128, 192)
    """Number of channels at each level of that U-Net; Diffusion Policy uses 256 512 1024.
    Each level but the last halves the number of action steps."""
    width: int = 128
    """Width w of the diffusion transformer; a multiple of 2 * heads."""
    blocks: int = 4
    """Number of blocks of the diffusion transformer."""
    heads: int = 4
    """Number of attention heads of the diffusion transformer."""
    max_dim: int = 16
    """Dimension D to which the states and actions of all robots are padded."""
    horizon: int = 16
    """Number of actions H in a chunk."""
    sampler_steps: int = 4
    """Number of Euler steps from noise to a chunk."""
    future_layer: int = 3
    """Block of the diffusion transformer, counted from 1, that the future-prediction loss reads.
    FLARE uses a block at about 3/4 of the depth."""
    future_weight: float = 0.2
    """Weight lambda of the future-prediction loss; 0 disables the loss."""
    future_steps: int = 16
    """Number of control steps to the frame that the future tokens predict."""
    ema: float = 0.995
    """Decay of the exponential moving average of the weights per optimizer step, in [0, 1)."""
    relative: bool = True
    """Predict joint targets relative to the current joint positions, not absolute ones."""
    dropout: float = 0.0
    """Dropout probability behind attention and feed-forward in the diffusion transformer, in
    training only. GR00T N1.5 uses 0.2."""
    state_noise: float = 0.0
    """Standard deviation of Gaussian noise on the normalised state, in training only."""

    def __post_init__(self) -> None:
        sizes = ("width", "blocks", "heads", "max_dim", "horizon", "sampler_steps", "future_steps")
        require_numbers(self, **dict.fromkeys(sizes, (1, 100_000)), future_weight=(0, 1e6))
        require_numbers(self, dropout=(0, 0.99), state_noise=(0, 100), unet_widths=(8, 100_000))
        if self.width % (2 * self.heads):
            raise BlmError(f"policy width {self.width} must be a multiple of 2 * heads = {2 * self.heads}")
        if self.head == "unet":
            shortest = 2 ** (len(self.unet_widths) - 1)
            if not self.unet_widths or any(w % 8 for w in self.unet_widths) or self.horizon % shortest:
                raise BlmError(
                    f"unet_widths {self.unet_widths} must be multiples of 8, and horizon {self.horizon} one "
                    f"of {shortest}: each level but the last halves the number of action steps"
                )
        if not 1 <= self.future_layer <= self.blocks:
            raise BlmError(f"future_layer {self.future_layer} must lie in 1..blocks = {self.blocks}")
        if not 0 <= self.ema < 1 or min(self.horizon, self.sampler_steps) < 1:
            raise BlmError(f"policy: need ema in [0, 1) and positive horizon and sampler_steps: {self}")

    def facts(self) -> dict[str, Any]:
        """Return what the result depends on, in the form of runs that knew one head only."""
        own = () if self.head == "unet" else ("head", "unet_widths")
        return {name: value for name, value in asdict(self).items() if name not in own}


@dataclass(frozen=True, kw_only=True)
class ActionBatch:
    """States, actions, noise and flow times of a training batch, without hidden states."""

    state: Tensor
    """[B, D] normalised, zero-padded."""
    actions: Tensor
    """[B, H, D] normalised, zero-padded."""
    real: Tensor
    """[B, H, D] True for dimensions that the robot has, at steps inside the episode."""
    embodiment: Tensor
    """[B] index of the robot."""
    noise: Tensor
    """[B, H, D] standard normal."""
    tau: Tensor
    """[B] flow time."""
    ids: Sequence[object] = ()
    """Names of the samples, for error messages."""
    values: float = 0.0
    """Mean number of real values per sample over the whole step; 0: over this batch.

    With it, the losses of the parts of a step, weighted by their samples, add up to the loss of the
    whole.
    """
    runs: Runs = ()
    """The robots in `embodiment` on the host, if known, for grouped products."""

    def to(self, device: torch.device | str) -> Self:
        """Return a copy on a device; copying from pinned memory does not block the host."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """Return a copy in pinned (page-locked) memory."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> Self:
        tensors: dict[str, Any] = {k: change(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


class HiddenStateCodec(Protocol):
    """Decoder of hidden states that travel to the device as codes."""

    def decode(self, codes: Tensor) -> Tensor:
        """Return hidden states [.., d], on the device of the codes [.., bytes]."""
        ...


@dataclass(frozen=True, kw_only=True)
class PolicyBatch(ActionBatch):
    """A training batch with its noise and flow times, so that the loss is a function of its
    batch."""

    hidden: Tensor
    """[B, L, d] hidden states of the frame."""
    mask: Tensor
    """[B, L] True at real prompt positions."""
    future_hidden: Tensor
    """[B, L', d] hidden states of the frame `future_steps` ahead."""
    future_mask: Tensor
    """[B, L']"""
    codec: HiddenStateCodec | None = None
    """With a codec, `hidden` and `future_hidden` are its codes [.., bytes], until `to` decodes
    them."""

    def to(self, device: torch.device | str) -> Self:
        """Return a copy on a device, with decoded hidden states."""
        moved = super().to(device)
        if self.codec is None:
            return moved
        hidden, future = self.codec.decode(moved.hidden), self.codec.decode(moved.future_hidden)
        return replace(moved, hidden=hidden, future_hidden=future, codec=None)


class PolicyNetwork(nn.Module):
    """Bridge, diffusion transformer and heads for several robots."""

    _no_split_modules = ("PerceiverBlock", "Block")
    """Units of FSDP, in an attribute that transformers models also have."""

    def __init__(self, config: PolicyConfig, hidden_size: int, embodiments: int) -> None:
        super().__init__()
        self.config = config
        width, z = config.width, config.bridge.width
        self.bridge = Perceiver(config.bridge, hidden_size)
        self.encode_state = IndexedMLP(embodiments, config.max_dim, width, width)
        self.encode_action = ActionEncoder(embodiments, config.max_dim, width)
        self.decode_action = IndexedMLP(embodiments, width, width, config.max_dim)
        self.position = nn.Parameter(torch.randn(config.horizon, width) * 0.02)
        self.future = nn.Parameter(torch.randn(config.bridge.latents, width) * 0.02)
        self.dit = DiT(width, config.blocks, config.heads, z, config.future_layer, config.dropout)
        self.predict_future = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, z))

    def velocity(
        self,
        noised: Tensor,
        tau: Tensor | TimeCache,
        intent: Tensor,
        state: Tensor,
        embodiment: Tensor | Runs,
        cache: IntentCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the velocity [B, H, D] and the predicted future intent tokens [B, M, z].

        `noised` is [B, H, D], `intent` [B, M, z], `tau` [B] or a result of `DiT.cache_time`, and
        `cache` the result of `DiT.cache_intent`.
        """
        state_token = self.encode_state(state[:, None], embodiment)
        out, future = self._transform(noised, tau, intent, state_token, embodiment, cache)
        return self.decode_action(out, embodiment), self.predict_future(future)

    def _transform(
        self,
        noised: Tensor,
        tau: Tensor | TimeCache,
        intent: Tensor,
        state_token: Tensor,
        embodiment: Tensor | Runs,
        cache: IntentCache | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the output tokens of the actions [B, H, w], and the future tokens [B, M, w]."""
        tokens = [
            state_token,
            self.encode_action(noised, tau, embodiment) + self.position,
            self.future.expand(noised.shape[0], -1, -1),
        ]
        out, future = self.dit(torch.cat(tokens, dim=1), intent, tau, cache)
        return out[:, 1 : 1 + self.config.horizon], future

    def loss(self, batch: PolicyBatch, teacher: PolicyNetwork) -> dict[str, Tensor]:
        """Return scalars 'loss', 'loss_flow' and 'loss_future'.

        Padded dimensions, and steps after the end of the episode, are zero in the input and masked
        in the loss, so they affect no weight.
        """
        actions, noise = batch.actions * batch.real, batch.noise * batch.real
        noised = flow.interpolate(actions, noise, batch.tau)
        intent = self.bridge(batch.hidden, batch.mask)
        robots = batch.runs or batch.embodiment
        velocity, predicted = self.velocity(noised, batch.tau, intent, batch.state, robots)
        error = (velocity - flow.target(actions, noise)).square() * batch.real
        loss_flow = error.sum() / (batch.values * len(error) or batch.real.sum())
        if self.config.future_weight == 0:
            return {"loss": loss_flow, "loss_flow": loss_flow, "loss_future": torch.zeros_like(loss_flow)}
        with torch.no_grad():
            future = teacher.bridge(batch.future_hidden, batch.future_mask)
        loss_future = (1 - F.cosine_similarity(predicted, future, dim=-1)).mean()
        total = loss_flow + self.config.future_weight * loss_future
        return {"loss": total, "loss_flow": loss_flow, "loss_future": loss_future}

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
        """Return normalised actions [B, H, D], sampled from `noise` [B, H, D] by Euler steps.

        `dims` [B, D] is True at the dimensions that the robot has. `prefix` is the current chunk to
        continue. What does not depend on the actions is computed once for all steps.
        """
        intent, real, steps = self.bridge(hidden, mask), dims[:, None], self.config.sampler_steps
        cache = self.dit.cache_intent(intent)
        state_token = self.encode_state(state[:, None], embodiment)
        times = iter(self.dit.cache_time(steps, intent))

        def velocity(x: Tensor, _tau: Tensor) -> Tensor:
            out, _ = self._transform(x, next(times), intent, state_token, embodiment, cache)
            return self.decode_action(out, embodiment) * real

        field = velocity if prefix is None else flow.guided(velocity, prefix)
        return flow.euler(field, noise * real, steps)
