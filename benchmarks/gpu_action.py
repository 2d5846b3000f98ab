"""The latency of an action by parts: eager, compiled and with CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_setting import (
    INSTRUCTION,
    Clock,
    Numbers,
    Setting,
    SkippedError,
    attempt,
    latency,
    shown,
    wait,
    with_peak,
)
from torch import Tensor

from blm.app.memory.work import act, size_of
from blm.backbone.compilation import CompileMode, Compiler, pad_prompts, require_compiler
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
        self.rest = (self.state, self.robot, self.noise, self.dims)
        self.hidden, self.mask = self.tap()

    def vision(self) -> Any:
        return vision_features(self.backbone, self.inputs)

    def tap(self) -> tuple[Tensor, Tensor]:
        tapped = self.backbone.tap(self.inputs, self.setting.layer)
        return tapped.hidden, tapped.mask

    def bridge(self) -> Tensor:
        return self.network.bridge(self.hidden, self.mask)

    def policy(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return the actions: the bridge and the Euler steps."""
        return self.network.sample(hidden, mask, *self.rest)

    def action(self) -> Tensor:
        """Return the actions: what the device does for one decision."""
        return self.policy(*self.tap())


def action(setting: Setting, clock: Clock, found: Numbers) -> None:
    """Measure the latency of an action by parts, and that of its compiled forms."""
    network = setting.network().eval().requires_grad_(False)
    cases = [(cameras, count) for count in setting.batches for cameras in setting.cameras]
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
        attempt(case, "eager", own.first(0.3), lambda clock: _eager(decision, clock))  # noqa: B023
        for mode in ("default", "cuda-graphs"):
            attempt(case, mode, own, lambda clock: _compiled(decision, clock, mode))  # noqa: B023


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

    def peak() -> Numbers:
        decision.action()
        return found

    return with_peak(setting, peak, lambda: _predicted(decision))


def _predicted(decision: Decision) -> int:
    setting = decision.setting
    backbone, network = setting.outline(), setting.network_outline().eval().requires_grad_(False)
    weights = size_of([*setting.backbone.model.parameters(), *network.parameters()])
    return weights + act(backbone, network, decision.read(), setting.layer)


@torch.no_grad()
def _compiled(decision: Decision, clock: Clock, mode: CompileMode) -> Numbers:
    """Measure tap, bridge and sampler as a policy compiles them."""
    setting = decision.setting
    if mode == "cuda-graphs" and not setting.on_gpu:
        raise SkippedError("CUDA graphs need a GPU")
    if clock.left < setting.compile_seconds:
        raise SkippedError(f"compiling takes {setting.compile_seconds:.0f} s; {clock.left:.0f} s are left")
    if "backend" not in setting.compile_options:
        require_compiler(mode, setting.device)
    begin = time.monotonic()
    torch.compiler.reset()
    compiler = Compiler(mode, **setting.compile_options)
    decision.backbone.compile_tap(setting.layer, compiler)
    sample: Any = compiler(decision.network.sample)
    inputs = pad_prompts(decision.inputs, decision.backbone.processor.tokenizer.pad_token_id)

    def choose() -> Tensor:
        if setting.on_gpu:
            torch.compiler.cudagraph_mark_step_begin()
        tapped = decision.backbone.tap(inputs, setting.layer)
        return sample(tapped.hidden, tapped.mask, *decision.rest)

    try:
        choose()
        wait(setting)
        setting.compile_seconds = time.monotonic() - begin
        found = {"action": latency(setting, clock.first(0.6), choose)}
        tap = latency(setting, clock, lambda: decision.backbone.tap(inputs, setting.layer))
        return found | {"tap": tap, "compile_s": setting.compile_seconds}
    finally:
        decision.backbone._compiled.clear()  # the next measurement is eager
