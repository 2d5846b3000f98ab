"""nano's eye: a small convolutional network that looks for named things.

It has one map for each thing that it was taught to find (`training/eye.py`): a distribution over 28 x 28
cells and "nowhere". The things that are most surely there become tokens that say what, where in the picture,
where from the robot, and how it looks, as region features did in early vision-language models (UNITER, Chen
et al., 2020); the quarters of the picture are the other tokens. All of them say which step the picture looks
like, and which camera took it. Shapes: N pictures, M maps, T tokens, P = 784 cells, F features, S steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
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
NAME_SCALE, LOOK_SCALE, DECIMAL_SCALE = 24.0, 0.3, 30.0
"""Make the few numbers that say what and where a thing is count among the many that say how it looks. Spelt
numbers were learnt the faster the larger they were: 1, 4, 10, 30; names then had to grow too, to be about as
long as all numbers together (docs/LOG.md)."""
VIEW_SCALE = 4.0
"""The same for which camera took the picture."""
FREQUENCIES = (1, 2, 4, 5, 10)
"""Half periods of the position code over the picture. 5 and 10 tell apart what decimal digits need."""
REACH = 0.5
"""Places from the robot are given in this [m], so that most lie within -1 .. 1 or 0 .. 2."""
PERIODS = (2.0, 1.0, 0.2, 0.1)
"""Periods of their code [m]. 1 and 0.1 tell apart what decimal digits of centimetres need."""
DECIMAL = 22
"""Numbers that spell one: two for its sign, ten for its tens, ten for its ones."""
STEPS, VIEWS = 16, 4
"""Steps, and cameras, are told apart up to these numbers."""


class ConvVisionConfig(PretrainedConfig):
    model_type = "blm_conv_vision"

    def __init__(
        self,
        channels: int = 48,
        width: int = 96,
        things: Sequence[str] = (),
        steps: Sequence[str] = (),
        views: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        """`things`: what is looked for, of at most WORDS - FOUND words; at most STEPS, VIEWS others."""
        words = sorted({word for thing in things for word in words_of(thing)})
        if len(words) > WORDS - FOUND:
            raise BlmError(f"nano's eye knows at most {WORDS - FOUND} words, not {len(words)}: {words}")
        for kind, names, most in (("steps", steps, STEPS), ("views", views, VIEWS)):
            if len(names) > most:
                raise BlmError(f"nano's eye tells at most {most} {kind} apart, not {len(names)}: {names}")
        self.channels, self.width = channels, width
        self.things, self.steps, self.views = list(things), list(steps), list(views)
        self.image_size, self.patch_size = IMAGE_SIZE, IMAGE_SIZE // GRID
        places = 2 + 4 * len(FREQUENCIES) + 3 + 6 * len(PERIODS) + 5 * DECIMAL
        self.hidden_size = WORDS + QUARTERS + 1 + places + 2 * channels + STEPS + VIEWS
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
        self.stem = nn.Sequential(  # half resolution tells a cube of 7 px from a cylinder
            nn.Conv2d(3, c // 3, 4, stride=2, padding=1),
            ResidualBlock(c // 3),
            nn.ReLU(),
            nn.Conv2d(c // 3, c, 4, stride=2, padding=1),
        )
        self.fine, self.both = ResidualBlock(c), ResidualBlock(c)
        self.down = nn.Conv2d(c, w, 3, stride=2, padding=1)
        self.coarse = nn.Sequential(ResidualBlock(w), ResidualBlock(w, 2))
        self.up = nn.Conv2d(w, 4 * c, 1)
        self.score = nn.Conv2d(c, len(self.words) + self.maps_made - len(config.things), 1)
        self.nowhere = nn.Parameter(torch.zeros(self.maps_made))
        seen = WORDS + QUARTERS + 2 + 4 * len(FREQUENCIES) + 2 * c + 4 * w
        self.metric = nn.Sequential(nn.Linear(seen, 192), nn.ReLU(), nn.Linear(192, 3))
        self.fixed, self.view = nn.Linear(c, 1), nn.Linear(4 * w, VIEWS)
        self.doing = nn.Sequential(nn.Linear(4 * w, 96), nn.ReLU(), nn.Linear(96, STEPS))
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

    def features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the cells look like [N, F, P], and a summary of the picture [N, 4 W]."""
        fine = self.fine(self.stem(pixel_values))
        coarse = F.relu(self.coarse(self.down(F.relu(fine))))
        features = F.relu(self.both(fine + F.pixel_shuffle(self.up(coarse), 2))).flatten(2)
        halves = coarse.unflatten(2, (2, -1)).flatten(3)  # [N, W, 2, P / 8]: upper and lower half
        return features, torch.cat([halves.mean(-1), halves.amax(-1)], dim=-1).flatten(1)

    def maps(self, features: Tensor) -> Tensor:
        """[N, F, P] -> the log-probabilities [N, M, P + 1] of cells, and of nowhere."""
        scores = F.conv1d(features, self.score.weight.flatten(2), self.score.bias)
        scores = torch.einsum("mk,nkp->nmp", self.mixing(scores), scores)
        nowhere = self.nowhere.expand(len(scores), -1)[..., None]
        return torch.cat([scores, nowhere], dim=-1).log_softmax(-1)

    def looks(
        self, features: Tensor, summary: Tensor, weights: Tensor, names: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What things with these weights over cells [N, T, P] and names [N, T, W] are like.

        Returns [N, T, ...]: the code of their place in the picture, their looks and those of the whole
        picture, and their places from the robot [REACH m].
        """
        looks = F.layer_norm(weights @ features.transpose(1, 2), features.shape[1:2])
        whole = self.whole(features)[:, None].expand_as(looks)
        place = weights @ _cell_code(weights.device, weights.dtype)
        both = torch.cat([looks, whole], dim=-1)
        around = summary[:, None].expand(-1, weights.shape[1], -1)
        return place, both, self.metric(torch.cat([names, place, both, around], dim=-1))

    def whole(self, features: Tensor) -> Tensor:
        """[N, F, P] -> [N, F]: the looks of the whole picture."""
        return F.layer_norm(features.mean(-1), features.shape[1:2])

    def mixing(self, like: Tensor) -> Tensor:
        """[M, scores] of 0 and 1, where and as `like` is: which scores a map is the sum of."""
        return _mixing(tuple(self.config.things), self.maps_made, like.device, like.dtype)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        features, summary = self.features(pixel_values)
        logs = self.maps(features)
        there = 1 - logs[..., -1].exp()
        found = there.topk(FOUND, dim=1).indices.sort(dim=1).values
        rows = torch.arange(len(found), device=found.device)[:, None]
        weights = torch.cat([logs[rows, found, :-1].softmax(-1), _quarters(logs)], dim=1)
        sure = torch.cat([there[rows, found], there.new_ones(len(there), QUARTERS)], dim=1)[..., None]
        names = self.names(found)
        place, looks, metres = self.looks(features, summary, weights, names)
        fixed = self.fixed(looks[..., -features.shape[1] :]).sigmoid()
        thing = (torch.arange(GRID * GRID, device=sure.device) < FOUND).to(sure)[:, None]
        spelt = decimal_code((place[..., :2] + 1) * 50) * thing
        metres = torch.cat([metric_code(metres), decimal_code(100 * REACH * metres)], dim=-1) * fixed * thing
        view = VIEW_SCALE * self.view(summary).softmax(-1)
        whole = torch.cat([self.doing(summary).softmax(-1), view], dim=-1)[:, None]
        told = [NAME_SCALE * names, torch.ones_like(sure), place, spelt, metres, LOOK_SCALE * looks]
        tokens = torch.cat([sure * torch.cat(told, dim=-1), whole.expand(-1, GRID * GRID, -1)], dim=-1)
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=(tokens,))

    def names(self, found: Tensor) -> Tensor:
        """[N, K] numbers of maps -> [N, K + 4, WORDS + QUARTERS]: words of each, then the quarters."""
        words = self.mixing(self.nowhere)[found]
        words = F.pad(words, (0, WORDS - words.shape[-1], 0, QUARTERS))
        quarter = torch.eye(QUARTERS, device=words.device, dtype=words.dtype).expand(len(found), -1, -1)
        return torch.cat([words, F.pad(quarter, (0, 0, found.shape[1], 0))], dim=-1)


def _quarters(like: Tensor) -> Tensor:
    """[N, 4, P]: uniform weights over the cells of each quarter."""
    return _quarter_weights(like.device, like.dtype).expand(len(like), -1, -1)


# These constants stay on the device: a copy for each picture would make the host wait for the device. They
# are no buffers of the module, because every buffer counts in the hash of a frozen backbone.


@lru_cache(maxsize=64)
def _quarter_weights(device: torch.device, dtype: torch.dtype) -> Tensor:
    half = torch.arange(CELLS) * 2 // CELLS
    quarter = (half[:, None] * 2 + half[None, :]).flatten()
    weights = F.one_hot(quarter, QUARTERS).T.to(dtype)
    return (weights / weights.sum(-1, keepdim=True)).to(device)


@lru_cache(maxsize=64)
def _mixing(things: tuple[str, ...], maps: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    words = list(dict.fromkeys(word for thing in things for word in words_of(thing)))
    rest = maps - len(things)
    mixing = torch.zeros(maps, len(words) + rest)
    for place, thing in enumerate(things):
        for word in words_of(thing):
            mixing[place, words.index(word)] = 1
    mixing[len(things) :, len(words) :] = torch.eye(rest)
    return mixing.to(device, dtype)


@lru_cache(maxsize=64)
def _cell_code(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The position code of the cells."""
    return position_code(CELLS, CELLS).to(device, dtype)


@lru_cache(maxsize=64)
def _numbers(numbers: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(numbers, device=device, dtype=dtype)


def position_code(height: int, width: int) -> Tensor:
    """Return [height * width, 2 + 4 F]: x, y in -1 .. 1; sin, cos of pi f x, pi f y for F frequencies f."""
    lines = [(torch.arange(n) + 0.5) / n * 2 - 1 for n in (height, width)]
    y, x = torch.meshgrid(*lines, indexing="ij")
    return _fourier(torch.stack([x, y], dim=-1).reshape(-1, 2), FREQUENCIES)


def metric_code(place: Tensor) -> Tensor:
    """[..., 3] places from the robot [REACH m] -> [..., 3 + 6 P]: the same, and sin, cos for P periods."""
    return _fourier(place, tuple(2 * REACH / period for period in PERIODS))


def decimal_code(number: Tensor) -> Tensor:
    """[..., N] numbers -> [..., 22 N]: sign, tens and ones of each as answers spell it, so that reading it
    is linear; in between two whole numbers a mean of both."""
    whole = number.detach().floor()
    share = (number - whole)[..., None]

    def spelt(value: Tensor) -> Tensor:
        size = value.abs().clamp(max=99).long()
        digits = [F.one_hot((value < 0).long(), 2), F.one_hot(size // 10, 10), F.one_hot(size % 10, 10)]
        return DECIMAL_SCALE * torch.cat(digits, dim=-1).to(number)

    return ((1 - share) * spelt(whole) + share * spelt(whole + 1)).flatten(-2)


def _fourier(place: Tensor, frequencies: tuple[float, ...]) -> Tensor:
    phase = (place[..., None] * _numbers(frequencies, place.device, place.dtype) * math.pi).flatten(-2)
    return torch.cat([place, phase.sin(), phase.cos()], dim=-1)
