"""EfficientNet-Lite0 (Tan and Le, 2019; Google, 2020), as a network that returns several strides.

Batch norms are folded into the convolutions: their statistics stay fixed in training, and answers
do not depend on the other images of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blm.types import BlmError

STAGES = (
    (1, 3, 1, 1, 16),
    (6, 3, 2, 2, 24),
    (6, 5, 2, 2, 40),
    (6, 3, 2, 3, 80),
    (6, 5, 1, 3, 112),
    (6, 5, 2, 4, 192),
    (6, 3, 1, 1, 320),
)
"""Expansion, kernel, stride of the first block, blocks, channels: EfficientNet-B0's (Tan & Le 2019,
table 1); Lite0 has no squeeze-and-excitation, and ReLU6 for swish."""
NORM_EPS = 1e-3
"""Epsilon of the vision tower's batch norms, as in TensorFlow, where the weights come from."""
STRIDES = {4: 24, 8: 40, 16: 112, 32: 320}
"""Stride of each map that the network returns -> its channels."""
_RETURNED = (1, 2, 4, 6)
"""Stages whose outputs these are."""


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow's "SAME": at stride 2 more after than before, not evenly.

    The weights were trained with it; even padding shifts all features and visibly degrades them.
    """

    def forward(self, x: Tensor) -> Tensor:
        k, s = self.kernel_size[0], self.stride[0]
        height, width = (max(0, (-(-n // s) - 1) * s + k - n) for n in x.shape[-2:])
        return super().forward(F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2)))


class InvertedBottleneck(nn.Module):
    """MBConv: 1 x 1 expansion, depthwise convolution, 1 x 1 projection, residual."""

    def __init__(self, before: int, after: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = before * expansion
        self.expand = SameConv(before, wide, 1) if expansion > 1 else None
        self.depthwise = SameConv(wide, wide, kernel, stride, groups=wide)
        self.project = SameConv(wide, after, 1)
        self.residual = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        wide = x if self.expand is None else F.relu6(self.expand(x))
        out = self.project(F.relu6(self.depthwise(wide)))
        return x + out if self.residual else out


class EfficientNetLite(nn.Module):
    """Normalised pixels [N, 3, H, W] -> maps [N, C, H / s, W / s] for the strides s of STRIDES."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv(3, 32, 3, 2)
        self.blocks, before = nn.ModuleList(), 32
        for expansion, kernel, stride, count, after in STAGES:
            for index in range(count):
                step = stride if index == 0 else 1
                self.blocks.append(InvertedBottleneck(before, after, expansion, kernel, step))
                before = after

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        ends = [*accumulate(stage[3] for stage in STAGES)]
        returned = {ends[stage] for stage in _RETURNED}
        grid, maps = F.relu6(self.stem(pixel_values)), []
        for number, block in enumerate(self.blocks, start=1):
            grid = block(grid)
            if number in returned:
                maps.append(grid)
        return maps

    @torch.no_grad()
    def load_published(self, state: Mapping[str, Tensor]) -> None:
        """Load the published weights: in order, each convolution and the batch norm after it.

        Raises BlmError if their shapes are not those of EfficientNet-Lite0.
        """
        unused = ("_conv_head", "_bn1", "_fc")  # the classifier
        values = [v for name, v in state.items() if v.ndim > 0 and not name.startswith(unused)]
        mine = [module for module in self.modules() if isinstance(module, SameConv)]
        groups = list(zip(*[iter(values)] * 5, strict=False))
        if [tuple(g[0].shape) for g in groups] != [tuple(c.weight.shape) for c in mine]:
            raise BlmError("the package's weights are not those of EfficientNet-Lite0; needed: version 0.1")
        for conv, (weight, gain, shift, mean, variance) in zip(mine, groups, strict=True):
            assert conv.bias is not None
            scale = gain / (variance + NORM_EPS).sqrt()
            conv.weight.copy_(weight * scale[:, None, None, None])
            conv.bias.copy_(shift - mean * scale)
