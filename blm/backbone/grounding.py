"""Vision towers that localise named things: what they share, whatever network reads the image.

Such a tower has one heat map for each thing that it was trained to localise
(`training/pretraining/vision_tower.py`): a distribution over the cells of the image and "nowhere".
The most probable things become tokens with their name, position in the image, position in the
robot's frame and appearance, like the region features of early vision-language models (UNITER, Chen
et al., 2020); the other tokens are the quarters of the image. Every token also has the predicted
step of the task and the camera. Shapes: N images, M maps, T tokens, P cells, F features, W features
of the summary, S steps.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from blm.types import BlmError

QUARTERS = 4
"""Number of tokens for the quarters of the image; the others are for things."""
FOUND = 12
"""Number of tokens for things."""
WORDS = 64
"""Maximum number of words in the names of things, and size of their one-hot code."""
NAME_SIZE = WORDS + QUARTERS
"""Number of the first features of a token: its name, or its quarter."""
NAME_SCALE, LOOK_SCALE, DECIMAL_SCALE = 24.0, 0.3, 30.0
"""Weights of name, appearance and digits in a token: without them the few features of name and
position are outweighed by the many of appearance. Digits were learnt faster at larger scales (1, 4,
10, 30); names then need a norm of about that of all digits together (docs/LOG.md)."""
VIEW_SCALE = 4.0
"""Weight of the camera in a token."""
FREQUENCIES = (1, 2, 4, 5, 10)
"""Half periods of the Fourier features over the image; 5 and 10 resolve decimal digits."""
REACH = 0.5
"""Unit of positions in the robot's frame [m]; most of them lie within -1 .. 1 or 0 .. 2."""
PERIODS = (2.0, 1.0, 0.2, 0.1)
"""Periods of the Fourier features of these positions [m]; 1 and 0.1 resolve centimetres."""
DECIMAL = 22
"""Size of the digit code of a number: two for the sign, ten for the tens, ten for the ones."""
STEPS, VIEWS = 16, 4
"""Maximum numbers of steps and of cameras."""


class GroundingConfig(PretrainedConfig):
    """Vocabulary of a tower that localises things, and the sizes of what its network returns."""

    image_size: int
    """Side to which images are resized [px]."""
    cells: int
    """Cells per side of a heat map."""
    channels: int
    """Number of features F of a cell."""
    summary_size: int
    """Number of features W of the summary of an image."""

    def __init__(
        self,
        things: Sequence[str] = (),
        steps: Sequence[str] = (),
        views: Sequence[str] = (),
        compound: bool = False,
        sharpness: float = 1.0,
        step_scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        """Check the vocabulary: `things` of at most WORDS - FOUND words, `steps`, `views`.

        With `compound`, names of more than two words share the scores of their words too: "red and
        blue peg" those of "red", "blue" and "peg"; without it, as in `blm-nano` 1, they are words
        of their own. Above 1, `sharpness` moves the weights of tokens from probabilities towards 0
        and 1: the language model normalises its inputs, and would otherwise read a thing that is
        hardly there as one that is. `step_scale` is the weight of the predicted step in a token: with
        1, beside names and digits, a language model learns slowly to read it.
        """
        words = sorted({word for thing in things for word in map_words(thing, compound)})
        if len(words) > WORDS - FOUND:
            raise BlmError(
                f"the vision tower supports at most {WORDS - FOUND} words, not {len(words)}: {words}"
            )
        for kind, names, most in (("steps", steps, STEPS), ("views", views, VIEWS)):
            if len(names) > most:
                raise BlmError(f"the vision tower supports at most {most} {kind}, not {len(names)}: {names}")
        self.things, self.steps, self.views = list(things), list(steps), list(views)
        self.compound, self.sharpness, self.step_scale = compound, sharpness, step_scale
        super().__init__(**kwargs)

    @property
    def token_size(self) -> int:
        """Number of features of a token."""
        places = 2 + 4 * len(FREQUENCIES) + 3 + 6 * len(PERIODS) + 5 * DECIMAL
        return NAME_SIZE + 1 + places + 2 * self.channels + STEPS + VIEWS


def map_words(thing: str, compound: bool) -> list[str]:
    """Return the words whose scores add up to a thing's map: colour and kind, or the whole name.

    With `compound`, these are all words of the name but "and".
    """
    words = [word for word in thing.split() if word != "and"]
    return words if compound or len(words) == 2 else [thing]


class FoundThings(NamedTuple):
    """The K most probable things of N images."""

    names: Tensor
    """[N, K, words] 1 for each word of the name."""
    points: Tensor
    """[N, K, 2] x, y as fractions of the image."""
    presence: Tensor
    """[N, K, 1] probability that the thing is in the image."""
    tokens: Tensor
    """[N, K + 4, C] tokens of the things, then of the quarters of the image."""


class GroundingTower(PreTrainedModel):
    """Vision tower: normalised pixels [N, 3, H, W] -> tokens [N, FOUND + QUARTERS, C].

    A subclass defines `features`. The position of a thing is the mean of Fourier features under the
    softmax of its map: the spatial softmax of "Deep Spatial Autoencoders for Visuomotor Learning"
    (Finn et al., 2016). The score of "red cube" is the sum of those of "red" and "cube", so each
    word is trained on all things that share it.
    """

    config: GroundingConfig
    main_input_name = "pixel_values"

    def _add_heads(self) -> None:
        """Add heat maps and heads; a subclass calls this after it has made its network."""
        config = self.config
        c, w = config.channels, config.summary_size
        self.num_maps = max(len(config.things), FOUND)  # before pretraining, maps have no names
        words = (word for thing in config.things for word in map_words(thing, config.compound))
        self.words = list(dict.fromkeys(words))
        self.score = nn.Conv2d(c, len(self.words) + self.num_maps - len(config.things), 1)
        self.nowhere = nn.Parameter(torch.zeros(self.num_maps))
        seen = NAME_SIZE + 2 + 4 * len(FREQUENCIES) + 2 * c + w
        self.metric = nn.Sequential(nn.Linear(seen, 192), nn.ReLU(), nn.Linear(192, 3))
        self.fixed, self.view = nn.Linear(c, 1), nn.Linear(w, VIEWS)
        self.doing = nn.Sequential(nn.Linear(w, 96), nn.ReLU(), nn.Linear(96, STEPS))

    def _init_heads(self) -> None:
        """Initialise the heat maps: everything is as likely nowhere as in all cells together."""
        nn.init.normal_(self.score.weight, std=0.05)
        nn.init.constant_(self.nowhere, 6.0)  # about log P

    @abstractmethod
    def features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return features of the cells [N, F, P], and a summary of the image [N, W]."""

    def maps(self, features: Tensor) -> Tensor:
        """Return log-probabilities [N, M, P + 1] of cells and "nowhere", for features [N, F, P].

        Scores have the weights' precision also under autocast: bfloat16 would round those above 16 to
        eighths, and so change probabilities by up to 6 %.
        """
        with _without_autocast(features.device.type):
            weight = self.score.weight.flatten(2)
            scores = F.conv1d(features.to(weight), weight, self.score.bias)
            scores = torch.einsum("mk,nkp->nmp", self.mixing_matrix(scores), scores)
        nowhere = self.nowhere.expand(scores.shape[0], -1)[..., None]
        return torch.cat([scores, nowhere], dim=-1).log_softmax(-1)

    def describe(
        self, features: Tensor, summary: Tensor, weights: Tensor, names: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Describe things by their float32 weights over cells [N, T, P] and their names [N, T, W].

        Returns, each [N, T, ...]: Fourier features of the position in the image; appearance of
        the thing and of the whole image; position in the robot's frame [units of REACH].
        """
        appearance = F.layer_norm(weights.to(features) @ features.transpose(1, 2), features.shape[1:2])
        average = self.average(features)[:, None].expand_as(appearance)
        both = torch.cat([appearance, average], dim=-1)
        context = summary[:, None].expand(-1, weights.shape[1], -1)
        with _without_autocast(features.device.type):
            place = weights @ _cell_features(self.config.cells, weights.device, weights.dtype)
            parts = (names, place, both, context)
            seen = torch.cat([part.to(self.score.weight) for part in parts], dim=-1)
            return place, both, self.metric(seen)

    def average(self, features: Tensor) -> Tensor:
        """Return the normalised mean over all cells [N, F] of features [N, F, P]."""
        return F.layer_norm(features.mean(-1), features.shape[1:2])

    def mixing_matrix(self, like: Tensor) -> Tensor:
        """Return the matrix [M, scores] of 0 and 1 that adds up the scores of each map.

        It has the device and dtype of `like`.
        """
        words = tuple(tuple(map_words(thing, self.config.compound)) for thing in self.config.things)
        return _mixing_matrix(words, self.num_maps, like.device, like.dtype)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Return tokens [N, 16, C] of the FOUND most probable things, then of the quarters."""
        tokens = self.find(*self.features(pixel_values), FOUND).tokens
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=(tokens,))

    def find(self, features: Tensor, summary: Tensor, count: int) -> FoundThings:
        """Return the `count` most probable things in the order of `config.things`; see `features`.

        Positions are computed in float32: bfloat16 does not resolve hundredths of the image.
        """
        log_maps = self.maps(features).float()
        presence = 1 - log_maps[..., -1].exp()
        found = presence.topk(count, dim=1).indices.sort(dim=1).values
        rows = torch.arange(found.shape[0], device=found.device)[:, None]
        weights = torch.cat([log_maps[rows, found, :-1].softmax(-1), _quarters(log_maps)], dim=1)
        certain = presence.new_ones(presence.shape[0], QUARTERS)
        presence = torch.cat([presence[rows, found], certain], dim=1)[..., None]
        names = self.names(found)
        place, appearance, position = self.describe(features, summary, weights, names)
        position = position.float()
        is_fixed = self.fixed(appearance[..., -features.shape[1] :]).sigmoid()  # a fixed camera
        is_thing = (torch.arange(count + QUARTERS, device=presence.device) < count).to(presence)[:, None]
        digits = digit_features((place[..., :2] + 1) * 50) * is_thing
        metric = [metric_position_features(position), digit_features(100 * REACH * position)]
        metric_features = torch.cat(metric, dim=-1) * is_fixed * is_thing
        parts = [
            NAME_SCALE * names,
            torch.ones_like(presence),
            place,
            digits,
            metric_features,
            LOOK_SCALE * appearance,
        ]
        view = VIEW_SCALE * self.view(summary).softmax(-1)
        step = self.config.step_scale * self.doing(summary).softmax(-1)
        context = torch.cat([step, view], dim=-1)[:, None]
        per_thing = sharpened(presence, self.config.sharpness) * torch.cat(parts, dim=-1)
        tokens = torch.cat([per_thing, context.expand(-1, count + QUARTERS, -1)], dim=-1).to(features)
        points = (place[:, :count, :2] + 1) / 2
        return FoundThings(names[:, :count, : len(self.words)], points, presence[:, :count], tokens)

    def names(self, found: Tensor) -> Tensor:
        """Return one-hot names [N, K + 4, WORDS + QUARTERS] of maps [N, K] and the quarters."""
        words = self.mixing_matrix(self.nowhere)[found]
        words = F.pad(words, (0, WORDS - words.shape[-1], 0, QUARTERS))
        quarter = torch.eye(QUARTERS, device=words.device, dtype=words.dtype).expand(found.shape[0], -1, -1)
        return torch.cat([words, F.pad(quarter, (0, 0, found.shape[1], 0))], dim=-1)


def _without_autocast(device_type: str) -> AbstractContextManager[None]:
    """Return a context without autocast: none at all where it is off, which exporters can trace."""
    on = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else nullcontext()


def sharpened(probability: Tensor, power: float) -> Tensor:
    """Return p^k / (p^k + (1 - p)^k): the probability with its logit multiplied by k, the `power`."""
    if power == 1:
        return probability
    odds, rest = probability**power, (1 - probability) ** power
    return odds / (odds + rest)


def _quarters(like: Tensor) -> Tensor:
    """Return uniform weights [N, 4, P] over the cells of each quarter, for maps [N, M, P + 1]."""
    side = math.isqrt(like.shape[-1] - 1)
    return _quarter_weights(side, like.device, like.dtype).expand(like.shape[0], -1, -1)


# These constants are cached on the device, because the host waits for the device whenever it copies
# them. They cannot be buffers of the module: the fingerprint of a frozen backbone includes buffers.


@lru_cache(maxsize=64)
def _quarter_weights(side: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return uniform weights [4, P] over the cells of each quarter."""
    half = torch.arange(side) * 2 // side
    quarter = (half[:, None] * 2 + half[None, :]).flatten()
    weights = F.one_hot(quarter, QUARTERS).T.to(dtype)
    return (weights / weights.sum(-1, keepdim=True)).to(device)


@lru_cache(maxsize=64)
def _mixing_matrix(
    names: tuple[tuple[str, ...], ...], num_maps: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    words = list(dict.fromkeys(word for name in names for word in name))
    rest = num_maps - len(names)
    mixing = torch.zeros(num_maps, len(words) + rest)
    for place, name in enumerate(names):
        for word in name:
            mixing[place, words.index(word)] = 1
    mixing[len(names) :, len(words) :] = torch.eye(rest)
    return mixing.to(device, dtype)


@lru_cache(maxsize=64)
def _cell_features(side: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return image_position_features(side, side).to(device, dtype)


@lru_cache(maxsize=64)
def device_constants(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return numbers [values] on the device, cached."""
    return torch.tensor(values, device=device, dtype=dtype)


def image_position_features(height: int, width: int) -> Tensor:
    """Return Fourier features of the cells [height * width, 2 + 4 F].

    x, y in -1 .. 1, then sin and cos of pi f x and pi f y for F frequencies f.
    """
    lines = [(torch.arange(n) + 0.5) / n * 2 - 1 for n in (height, width)]
    y, x = torch.meshgrid(*lines, indexing="ij")
    return _fourier(torch.stack([x, y], dim=-1).reshape(-1, 2), FREQUENCIES)


def metric_position_features(place: Tensor) -> Tensor:
    """Return Fourier features [..., 3 + 6 P] of positions [..., 3] in units of REACH, P periods."""
    return _fourier(place, tuple(2 * REACH / period for period in PERIODS))


def digit_features(number: Tensor) -> Tensor:
    """Return digit codes [..., 22 N] of numbers [..., N]: one-hot sign, tens and ones.

    They match the digits in answers, so a linear layer can read them. Between two whole numbers the
    code is the weighted mean of their codes.
    """
    whole = number.detach().floor()
    share = (number - whole)[..., None]

    def spelt(value: Tensor) -> Tensor:
        size = value.abs().clamp(max=99).long()
        digits = [F.one_hot((value < 0).long(), 2), F.one_hot(size // 10, 10), F.one_hot(size % 10, 10)]
        return DECIMAL_SCALE * torch.cat(digits, dim=-1).to(number)

    return ((1 - share) * spelt(whole) + share * spelt(whole + 1)).flatten(-2)


def _fourier(place: Tensor, frequencies: tuple[float, ...]) -> Tensor:
    factors = device_constants(frequencies, place.device, place.dtype)
    phase = (place[..., None] * factors * math.pi).flatten(-2)
    return torch.cat([place, phase.sin(), phase.cos()], dim=-1)
