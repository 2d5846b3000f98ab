"""smol's vision tower: EfficientNet-Lite0 that also localises named things and writes them down.

A pretrained language model reads words and digits well, and pictures not at all. So the tower
writes the things that it finds as a language model would read them: for each thing six tokens, two
for its name and two digits each for x and y, in hundredths of the image. They start as the language
model's own embeddings of these words and digits, mixed by how sure the tower is. The other tokens
are cells of the image at three strides. Every name token also has the thing's appearance and its
position in the robot's frame (`blm.backbone.grounding`). Shapes: N images, K slots for things, E
features of a word, T tokens, P cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput

from blm.backbone.grounding import (
    DECIMAL,
    DECIMAL_SCALE,
    GroundingConfig,
    GroundingTower,
    device_constants,
    digit_features,
    map_words,
)
from blm.backbone.smol.efficientnet import STRIDES, EfficientNetLite

CELL = 32
"""Side of a cell of the image that becomes a token [px]."""
READ_STRIDES = (8, 16, 32)
"""Strides whose maps these tokens contain; finer maps are folded into channels (space to depth)."""
CELL_SIZE = sum(STRIDES[stride] * (CELL // stride) ** 2 for stride in READ_STRIDES)
"""Number of features of a cell."""
DESCRIBED_SCALE, CELL_SCALE = 1 / DECIMAL_SCALE, 1 / 8
"""Weights of descriptions and of normalised cells: beside words of the language model, their first
projections are about as large as the words' embeddings."""
SPELLED = 6
"""Number of tokens of a thing: two words, and two digits each for x and y."""
EMPTY = "none"
"""What an empty slot says."""


class SceneVisionConfig(GroundingConfig):
    """Sizes and vocabulary of smol's vision tower."""

    model_type = "blm_scene_vision"

    def __init__(
        self,
        image_size: int = 128,
        word_size: int = 576,
        slots: int = 8,
        channels: int = 48,
        width: int = 96,
        things: Sequence[str] = (),
        steps: Sequence[str] = (),
        views: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        """Check the vocabulary as `GroundingConfig` does.

        `word_size` is the size of the language model's embeddings, `slots` the number of things in
        an image that are written down.
        """
        self.image_size, self.patch_size, self.cells = image_size, CELL, image_size // 4
        self.word_size, self.slots = word_size, slots
        self.channels, self.width, self.summary_size = channels, width, 4 * width
        kwargs.pop("compound", None)
        self.hidden_size = word_size + self.token_size + CELL_SIZE
        super().__init__(things, steps, views, compound=True, **kwargs)

    @property
    def written(self) -> int:
        """Number of tokens of all slots."""
        return self.slots * SPELLED


class SceneVision(GroundingTower):
    """Normalised pixels [N, 3, H, W] -> tokens [N, 6 K + H / 32 * W / 32, E + ...]: slots, then cells.

    The first E features of a token are those of a word; the projector starts by passing them on.
    """

    config: SceneVisionConfig
    config_class = SceneVisionConfig

    def __init__(self, config: SceneVisionConfig) -> None:
        super().__init__(config)
        c, w = config.channels, config.width
        self.network = EfficientNetLite()
        self.lateral = nn.ModuleList(nn.Conv2d(channels, c, 1) for channels in STRIDES.values())
        self.smooth = nn.Conv2d(c, c, 3, padding=1)
        self.squeeze = nn.Conv2d(STRIDES[CELL], w, 1)
        self._add_heads()
        rows = len(self.words) + 10 + 1
        self.embedded = nn.Parameter(torch.zeros(rows, config.word_size))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, SceneVision):
            nn.init.normal_(module.embedded, std=0.02)
            module._init_heads()

    @torch.no_grad()
    def write_as(self, embed: Callable[[str], Tensor]) -> None:
        """Start the tokens as the language model's embeddings: `embed` returns that of a word [E]."""
        words = (*self.words, *"0123456789", EMPTY)
        self.embedded.copy_(torch.stack([embed(word) for word in words]))

    def features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return features of the cells [N, F, P], and a summary of the image [N, W]."""
        return self._combined(self.network(pixel_values))

    def _combined(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Combine the maps of all strides from the coarsest to the finest, as a feature pyramid."""
        pairs = [*zip(self.lateral, maps, strict=True)][::-1]
        grid = pairs[0][0](pairs[0][1])
        for lateral, finer in pairs[1:]:
            grid = F.interpolate(F.relu(grid), size=finer.shape[-2:]) + lateral(finer)
        features = F.relu(grid + self.smooth(F.relu(grid))).flatten(2)
        coarse = F.relu(self.squeeze(maps[-1]))
        halves = [half.flatten(2) for half in coarse.tensor_split(2, dim=2)]  # upper and lower
        summary = [pooled for half in halves for pooled in (half.mean(-1), half.amax(-1))]
        return features, torch.cat(summary, dim=-1)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Return the tokens of the most probable things and of the cells."""
        maps = self.network(pixel_values)
        features, summary = self._combined(maps)
        found = self.find(features, summary, self.config.slots)
        cells = torch.cat(
            [
                F.pixel_unshuffle(grid, CELL // stride)
                for stride, grid in zip(STRIDES, maps, strict=True)
                if stride in READ_STRIDES
            ],
            dim=1,
        )
        cells = CELL_SCALE * F.layer_norm(cells.flatten(2).transpose(1, 2), (CELL_SIZE,))
        cells = F.pad(cells, (self.config.word_size + self.config.token_size, 0))
        written = self._written(found.names, found.points, found.presence)
        described = F.pad(
            DESCRIBED_SCALE * found.tokens[:, : self.config.slots, None], (0, 0, 0, SPELLED - 1)
        )
        slots = F.pad(torch.cat([written, described], dim=-1), (0, CELL_SIZE)).flatten(1, 2)
        tokens = torch.cat([slots, cells], dim=1)
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=(tokens,))

    def _written(self, names: Tensor, points: Tensor, presence: Tensor) -> Tensor:
        """Return words and digits [N, K, 6, E] of things.

        `names` are the one-hot words [N, K, words], `points` x, y [N, K, 2] as fractions of the
        sides and `presence` [N, K, 1] the probabilities that the things are in the image.
        """
        words, digits, empty = self.embedded.float().split((len(self.words), 10, 1))
        names = names.float()
        last = self.kinds(names)
        first = names - last
        first = torch.where(first.sum(-1, keepdim=True) > 0, first, last)
        first = first / first.sum(-1, keepdim=True).clamp_min(1.0)
        named = torch.stack([first @ words, last @ words], dim=2)
        spelt = digit_features((100 * points).clamp(0, 99)).unflatten(-1, (2, DECIMAL)) / DECIMAL_SCALE
        numbers = spelt[..., 2:].flatten(2).unflatten(-1, (4, 10))  # without the signs
        written = torch.cat([named, numbers @ digits], dim=2)
        presence = presence[..., None]
        return (presence * written + (1 - presence) * empty).to(self.dtype)

    def kinds(self, names: Tensor) -> Tensor:
        """Return the one-hot last word of each name [N, K, words]: the kind of the thing."""
        last = {map_words(thing, compound=True)[-1] for thing in self.config.things}
        is_kind = tuple(float(word in last) for word in self.words)
        return names * device_constants(is_kind, names.device, names.dtype)
