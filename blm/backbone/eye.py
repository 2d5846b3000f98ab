"""nano's eye: a small convolutional network that looks for named things.

It has one map for each thing that it was taught to find (`training/eye.py`): a distribution over 28 x 28
cells and "nowhere". The things that are most surely there become tokens that say what, where, and how it
looks, as region features did in early vision-language models (UNITER, Chen et al., 2020); the quarters of the
picture are the other tokens. Shapes: N pictures, M maps, P = 784 cells, F features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from blm.types import BlmError

IMAGE_SIZE, GRID = 112, 4
"""Every picture is resized to 112 x 112 px and becomes GRID * GRID tokens."""
CELLS = 28
"""Cells per side."""
QUARTERS = 4
"""Tokens for the quarters of the picture; the others are for things."""
FOUND = GRID * GRID - QUARTERS
WORDS = 64
"""Things are told apart by at most so many words."""
NAME_SCALE, LOOK_SCALE = 4.0, 0.3
"""Make the few numbers that say what a token is about as large as the many that say how it looks."""
FREQUENCIES = (1, 2, 4, 5, 10)
"""Half periods of the position code over the picture. 5 and 10 tell apart what decimal digits need."""


class ConvVisionConfig(PretrainedConfig):
    model_type = "blm_conv_vision"

    def __init__(
        self, channels: int = 48, width: int = 96, things: Sequence[str] = (), **kwargs: Any
    ) -> None:
        """`things`: names of what is looked for, of at most WORDS - FOUND words."""
        words = sorted({word for thing in things for word in words_of(thing)})
        if len(words) > WORDS - FOUND:
            raise BlmError(f"nano's eye knows at most {WORDS - FOUND} words, not {len(words)}: {words}")
        self.channels, self.width, self.things = channels, width, list(things)
        self.image_size, self.patch_size = IMAGE_SIZE, IMAGE_SIZE // GRID
        self.hidden_size = WORDS + QUARTERS + 1 + 2 + 4 * len(FREQUENCIES) + 2 * channels
        super().__init__(**kwargs)


def words_of(thing: str) -> list[str]:
    """What a thing's map is the sum of: its colour and kind, or its whole name."""
    words = thing.split()
    return words if len(words) == 2 else [thing]


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, dilation: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class ConvVision(PreTrainedModel):
    """[N, 3, 112, 112] normalised pixels -> [N, 16, C] tokens: what is there, where, and how it looks.

    A map's place is the mean of a Fourier position code under a softmax over the cells: the spatial softmax
    of "Deep Spatial Autoencoders for Visuomotor Learning" (Finn et al., 2016). The score of "red cube" is
    that of "red" plus that of "cube", so each word is learnt from all things that share it.
    """

    config_class = ConvVisionConfig
    main_input_name = "pixel_values"

    def __init__(self, config: ConvVisionConfig) -> None:
        super().__init__(config)
        c, w = config.channels, config.width
        self.maps_made = max(len(config.things), FOUND)  # untaught, it looks for things without a name
        self.words = list(dict.fromkeys(word for thing in config.things for word in words_of(thing)))
        self.stem = nn.Conv2d(3, c, 4, stride=4)
        self.fine = ResidualBlock(c)
        self.down = nn.Conv2d(c, w, 3, stride=2, padding=1)
        self.coarse = nn.Sequential(ResidualBlock(w), ResidualBlock(w, 2))
        self.up = nn.Conv2d(w, 4 * c, 1)
        self.score = nn.Conv2d(c, len(self.words) + self.maps_made - len(config.things), 1)
        self.nowhere = nn.Parameter(torch.zeros(self.maps_made))
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
            nn.init.normal_(module.score.weight, std=0.05)
            nn.init.constant_(module.nowhere, 6.0)  # about log P: nothing is anywhere yet

    def maps(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return features [N, F, P] and the log-probabilities [N, M, P + 1] of cells, and of nowhere."""
        fine = self.fine(self.stem(pixel_values))
        coarse = self.coarse(self.down(F.relu(fine)))
        features = F.relu(fine + F.pixel_shuffle(self.up(F.relu(coarse)), 2))
        scores = self.score(features).flatten(2)
        scores = torch.einsum("mk,nkp->nmp", self.mixing.to(scores), scores)
        nowhere = self.nowhere.expand(len(scores), -1)[..., None]
        return features.flatten(2), torch.cat([scores, nowhere], dim=-1).log_softmax(-1)

    @cached_property
    def mixing(self) -> Tensor:
        """[M, scores] of 0 and 1, on the CPU: which scores a map is the sum of."""
        mixing = torch.zeros(self.maps_made, self.score.out_channels)
        for place, thing in enumerate(self.config.things):
            for word in words_of(thing):
                mixing[place, self.words.index(word)] = 1
        rest = self.maps_made - len(self.config.things)
        mixing[len(self.config.things) :, len(self.words) :] = torch.eye(rest)
        return mixing

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        features, logs = self.maps(pixel_values)
        there = 1 - logs[..., -1].exp()
        found = there.topk(FOUND, dim=1).indices.sort(dim=1).values
        rows = torch.arange(len(found), device=found.device)[:, None]
        weights = torch.cat([logs[rows, found, :-1].softmax(-1), _quarters(logs)], dim=1)
        sure = torch.cat([there[rows, found], there.new_ones(len(there), QUARTERS)], dim=1)[..., None]
        looks = F.layer_norm(weights @ features.transpose(1, 2), features.shape[1:2])
        whole = F.layer_norm(features.mean(-1), features.shape[1:2])[:, None].expand_as(looks)
        place = weights @ position_code(CELLS, CELLS).to(weights)
        what = NAME_SCALE * self._names(found)
        parts = (what * sure, sure, place * sure, LOOK_SCALE * looks * sure, LOOK_SCALE * whole)
        tokens = torch.cat(parts, dim=-1)
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=(tokens,))

    def _names(self, found: Tensor) -> Tensor:
        """[N, 16, W]: the words of what was found, and which quarter a token is."""
        words = self.mixing.to(self.nowhere)[found]
        words = F.pad(words, (0, WORDS - words.shape[-1], 0, QUARTERS))
        quarter = torch.eye(QUARTERS).to(words).expand(len(found), -1, -1)
        return torch.cat([words, F.pad(quarter, (0, 0, FOUND, 0))], dim=-1)


def _quarters(like: Tensor) -> Tensor:
    """[N, 4, P]: uniform weights over the cells of each quarter."""
    half = torch.arange(CELLS) * 2 // CELLS
    quarter = (half[:, None] * 2 + half[None, :]).flatten()
    weights = F.one_hot(quarter, QUARTERS).T.to(like)
    return (weights / weights.sum(-1, keepdim=True)).expand(len(like), -1, -1)


def position_code(height: int, width: int) -> Tensor:
    """Return [height * width, 2 + 4 F]: x, y in -1 .. 1; sin, cos of pi f x, pi f y for F frequencies f."""
    lines = [(torch.arange(n) + 0.5) / n * 2 - 1 for n in (height, width)]
    y, x = torch.meshgrid(*lines, indexing="ij")
    place = torch.stack([x, y], dim=-1).reshape(-1, 2)
    phase = (place[:, :, None] * torch.tensor(FREQUENCIES) * math.pi).flatten(1)
    return torch.cat([place, phase.sin(), phase.cos()], dim=1)
