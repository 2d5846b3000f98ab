"""nano's vision tower: a small convolutional network that localises named things.

What it makes of them is defined in `blm.backbone.grounding`. Shapes: N images, P = 784 cells, F
features, W channels at an eighth of the resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blm.backbone.grounding import GroundingConfig, GroundingTower

IMAGE_SIZE, GRID = 112, 4
"""Every image is resized to 112 x 112 px and becomes GRID * GRID tokens."""
CELLS = 28
"""Cells per side."""


class ConvVisionConfig(GroundingConfig):
    """Sizes and vocabulary of nano's vision tower."""

    model_type = "blm_conv_vision"

    def __init__(
        self,
        channels: int = 48,
        width: int = 96,
        things: Sequence[str] = (),
        steps: Sequence[str] = (),
        views: Sequence[str] = (),
        dilations: Sequence[int] = (1, 2),
        pooled: bool = False,
        **kwargs: Any,
    ) -> None:
        """Check the vocabulary as `GroundingConfig` does.

        `dilations` has one number for each residual block at an eighth of the resolution. With
        `pooled`, these blocks are followed by a bias from the whole image, such as the colour of
        its light. The defaults are those of `blm-nano` 1.
        """
        self.channels, self.width, self.summary_size, self.cells = channels, width, 4 * width, CELLS
        self.dilations, self.pooled = list(dilations), pooled
        self.image_size, self.patch_size = IMAGE_SIZE, IMAGE_SIZE // GRID
        self.hidden_size = self.token_size
        super().__init__(things, steps, views, **kwargs)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with a residual connection, pre-activation."""

    def __init__(self, channels: int, dilation: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class GlobalContext(nn.Module):
    """Adds to every cell a projection of the mean and the maximum over all cells.

    A cell can thus take account of the light and the background of the whole image, at the cost of
    one matrix product: the global pooling of "Accelerating Self-Play Learning in Go" (Wu, 2019).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Linear(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(x)
        pooled = torch.cat([active.mean((2, 3)), active.amax((2, 3))], dim=-1)
        return x + self.mix(pooled)[..., None, None]


class ConvVision(GroundingTower):
    """Vision tower: normalised pixels [N, 3, 112, 112] -> tokens [N, 16, C] of things and quarters."""

    config: ConvVisionConfig
    config_class = ConvVisionConfig

    def __init__(self, config: ConvVisionConfig) -> None:
        super().__init__(config)
        c, w = config.channels, config.width
        self.stem = nn.Sequential(  # at half resolution a cube of 7 px differs from a cylinder
            nn.Conv2d(3, c // 3, 4, stride=2, padding=1),
            ResidualBlock(c // 3),
            nn.ReLU(),
            nn.Conv2d(c // 3, c, 4, stride=2, padding=1),
        )
        self.fine, self.both = ResidualBlock(c), ResidualBlock(c)
        self.down = nn.Conv2d(c, w, 3, stride=2, padding=1)
        self.coarse = nn.Sequential(*(ResidualBlock(w, dilation) for dilation in config.dilations))
        self.context = GlobalContext(w) if config.pooled else nn.Identity()
        self.up = nn.Conv2d(w, 4 * c, 1)
        self._add_heads()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, ConvVision):
            for block in module.modules():
                if isinstance(block, ResidualBlock):
                    nn.init.zeros_(block.conv2.weight)
            if isinstance(module.context, GlobalContext):
                nn.init.zeros_(module.context.mix.weight)
            module._init_heads()

    def features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return features of the cells [N, F, P], and a summary of the image [N, 4 W]."""
        fine = self.fine(self.stem(pixel_values))
        coarse = F.relu(self.context(self.coarse(self.down(F.relu(fine)))))
        features = F.relu(self.both(fine + F.pixel_shuffle(self.up(coarse), 2))).flatten(2)
        halves = coarse.unflatten(2, (2, -1)).flatten(3)  # [N, W, 2, P / 8]: upper and lower half
        return features, torch.cat([halves.mean(-1), halves.amax(-1)], dim=-1).flatten(1)
