"""The latency of an action by parts: eager, compiled and with CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_setting import INSTRUCTION, Clock, Numbers, Setting, SkippedError, attempt, latency, shown, with_peak
from torch import Tensor

from blm.backbone.prompt import control_prompt
from blm.policy.network import PolicyNetwork
from blm.training.sft.vision_features import vision_features


class Decision:
    """The parts of one decision for a batch of observations."""

    def __init__(self, setting: Setting, network: PolicyNetwork, cameras: int, count: int) -> None:
        self.setting, self.network = setting, network
        self.backbone, config, device = setting.backbone, setting.policy, setting.device
        self.prompts = [
            control_prompt(INSTRUCTION, "panda", images) for images in setting.images(count, cameras)
        ]
        self.read = lambda: self.backbone.read(self.prompts, side="right")
        self.inputs = self.backbone.place(self.read())
        self.state = torch.zeros(count, config.max_dim, device=device)
        self.robot = torch.zeros(count, dtype=torch.long, device=device)
        self.noise = torch.randn(count, config.horizon, config.max_dim, device=device)
        self.dims = torch.ones(count, config.max_dim, dtype=torch.bool, device=device)
        tapped = self.tap()
        self.hidden, self.mask = tapped

    def vision(self) -> Any:
        return vision_features(self.backbone, self.inputs)

    def tap(self) -> tuple[Tensor, Tensor]:
        tapped = self.backbone.tap(self.inputs, self.setting.layer)
        return tapped.hidden, tapped.mask

    def bridge(self) -> Tensor:
        return self.network.bridge(self.hidden, self.mask)

    def policy(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return the actions: the bridge and the Euler steps."""
        return self.network.sample(hidden, mask, self.state, self.robot, self.noise, self.dims)

    def action(self) -> Tensor:
        """Return the actions: what the device does for one decision."""
        return self.policy(*self.tap())


def action(setting: Setting, clock: Clock, found: Numbers) -> None:
    """Measure the latency of an action by parts, and that of its compiled forms."""
    network = setting.network().eval().requires_grad_(False)
    cases = [(cameras, count) for cameras in setting.cameras for count in setting.batches]
    for number, (cameras, count) in enumerate(cases):
        own = clock.first(1 / (len(cases) - number))
        name = f"{cameras} cameras, batch {count}"
        found[name] = case = Numbers()
        try:
            decision = Decision(setting, network, cameras, count)
        except Exception as error:
            case["error"] = shown(error)
            continue
        case["tokens"] = decision.hidden.shape[1]
        attempt(case, "eager", own.first(0.5), lambda clock: _eager(decision, clock))  # noqa: B023
        if count > 1:
            continue  # compiling takes longer than measuring, and latency matters for one robot
        for mode, options in {"compiled": {}, "cuda graphs": {"mode": "reduce-overhead"}}.items():
            attempt(case, mode, own, lambda clock: _compiled(decision, clock, options))  # noqa: B023


@torch.no_grad()
def _eager(decision: Decision, clock: Clock) -> Numbers:
    parts: dict[str, Callable[[], Any]] = {
        "prompt and pictures": decision.read,
        "vision tower": decision.vision,
        "tap": decision.tap,
        "bridge": decision.bridge,
        "bridge and sampler": lambda: decision.policy(decision.hidden, decision.mask),
        "action": decision.action,
    }
    setting, found = decision.setting, Numbers()
    for number, (name, call) in enumerate(parts.items()):
        found[name] = latency(setting, clock.first(1 / (len(parts) - number)), call)
    tokens = decision.hidden.shape[:2].numel()
    found["tap"]["tokens_per_s"] = 1000 * tokens / found["tap"]["p50_ms"]
    return with_peak(setting, lambda: found | {"n_of_the_peak": len([decision.action()])})


@torch.no_grad()
def _compiled(decision: Decision, clock: Clock, options: Numbers) -> Numbers:
    """Measure bridge and sampler compiled as one function, and the action with them."""
    setting = decision.setting
    if options and not setting.on_gpu:
        raise SkippedError("CUDA graphs need a GPU")
    torch.compiler.reset()
    fast = torch.compile(decision.policy, **options, **setting.compile_options)
    first, last = decision.hidden, decision.mask
    return {
        "bridge and sampler": latency(setting, clock.first(0.5), lambda: fast(first, last)),
        "action": latency(setting, clock, lambda: fast(*decision.tap())),
    }
