"""The optimizers of a run: AdamW, and optionally Muon for the matrices inside a network's blocks.

Muon (Jordan et al., 2024, "Muon: An optimizer for hidden layers in neural networks") orthogonalises
the momentum of each matrix. The implementation is torch's, of torch 2.9 and later; docs/LOG.md has
measurements.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from blm.types import BlmError

BLOCK = re.compile(r"(?:^|\.)(?:layers|blocks)\.\d+\.")
"""Names of parameters inside a network's blocks."""


class Optimizers:
    """Steps all trained parameters of a module, some with AdamW and some with Muon.

    `learning_rate(name)` is the peak learning rate of AdamW for a parameter. With `muon` above 0,
    matrices in blocks are stepped by Muon, at `muon * learning_rate(name) / lr`. Weight decay
    applies to parameters of two or more dimensions. Moments exist from the start, so that
    `restore_state` can fill them. Raises BlmError when no parameter is trained, and for Muon
    without torch 2.9 or on sharded weights.
    """

    def __init__(
        self,
        module: nn.Module,
        learning_rate: Callable[[str], float],
        *,
        lr: float,
        muon: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        self.names = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not self.names:
            raise BlmError("nothing to train: every parameter of the module is frozen")
        groups = defaultdict[tuple[bool, float, float], list[nn.Parameter]](list)
        for name, p in self.names.items():
            inner = muon > 0 and p.ndim == 2 and BLOCK.search(name) is not None
            peak = learning_rate(name) * (muon / lr if inner else 1.0)
            groups[inner, peak, weight_decay if p.ndim >= 2 else 0.0].append(p)
        options: dict[bool, list[dict[str, object]]] = {True: [], False: []}
        for (inner, peak, decay), ps in groups.items():
            options[inner].append({"params": ps, "peak": peak, "weight_decay": decay})
        self.optimizers: list[torch.optim.Optimizer] = []
        if options[False]:
            self.optimizers.append(torch.optim.AdamW(options[False], lr=lr, betas=betas, fused=True))
        if options[True]:
            self.optimizers.append(_muon(options[True]))
        for optimizer in self.optimizers:
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                optimizer.state[p] = _initial_moments(optimizer, p)

    def step(self, lr_factor: float) -> None:
        """Step every parameter at this share of its peak learning rate."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * lr_factor
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """Return the moments, named "<parameter>/<moment>"."""
        found: dict[str, Tensor] = {}
        for name, p in self.names.items():
            optimizer = next(one for one in self.optimizers if p in one.state)
            found |= {f"{name}/{key}": value for key, value in optimizer.state[p].items()}
        return found


def _muon(options: list[dict[str, object]]) -> torch.optim.Optimizer:
    made = getattr(torch.optim, "Muon", None)
    if made is None:
        raise BlmError(f"muon needs torch 2.9 or later, this is {torch.__version__}; set loop.muon=0")
    if any(hasattr(p, "full_tensor") for group in options for p in group["params"]):  # type: ignore[attr-defined]
        raise BlmError("muon needs unsharded matrices: train with shard=False, or set loop.muon=0")
    return made(options)


def _initial_moments(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> dict[str, Tensor]:
    if not isinstance(optimizer, torch.optim.AdamW):
        return {"momentum_buffer": torch.zeros_like(p)}
    step = torch.zeros((), dtype=torch.float32, device=p.device)
    return {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
