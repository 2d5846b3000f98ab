"""The convolutional networks of Diffusion Policy (Chi et al., RSS 2023, arXiv 2303.04137).

An image encoder for each camera, trained end to end: residual blocks with group norm, then a
spatial softmax. The denoiser is a U-Net over the action steps (`blm.policy.unet`). Differences
from the paper: a smaller encoder than ResNet-18, for images of 112 px; and, for several robots and
tasks, an embedding of the robot and a bag of words of the instruction.

Shape legend: B batch, C channels, H action steps, D padded action dimension, K keypoints, c
condition width.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blm.policy.unet import UNet
from blm.types import BlmError, require_numbers


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Sizes of the networks, and numbers of diffusion steps."""

    widths: tuple[int, ...] = (64, 128, 192)
    """Number of channels at each level of the U-Net; the paper uses (256, 512, 1024).
    Each level but the last halves the number of action steps."""
    image_width: int = 64
    """Number of keypoints K per image."""
    words: int = 1024
    """Number of hash buckets of the bag-of-words encoder of the instruction."""
    text_width: int = 64
    """Width of the instruction embedding."""
    robot_width: int = 16
    """Width of the robot embedding."""
    train_steps: int = 100
    """Number of diffusion steps in training."""
    sampler_steps: int = 10
    """Number of denoising steps of the DDIM sampler."""

    def __post_init__(self) -> None:
        sizes = ("widths", "image_width", "words", "text_width", "robot_width", "train_steps")
        require_numbers(self, **dict.fromkeys((*sizes, "sampler_steps"), (1, 1_000_000)))
        if not self.widths or any(width % 8 for width in self.widths) or self.image_width % 16:
            raise BlmError(
                f"widths {self.widths} need multiples of 8, image_width {self.image_width} one of 16"
            )


class GroupNormBlock(nn.Module):
    """Two 3 x 3 convolutions with group norm around a residual connection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1),
            nn.GroupNorm(outputs // 16, outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1),
            nn.GroupNorm(outputs // 16, outputs),
        )
        self.skip = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


class ImageEncoder(nn.Module):
    """Images [B, 3, side, side] in -1 .. 1 -> keypoints [B, 2 K] (spatial softmax)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width // 2, 4, 4),
            nn.ReLU(),
            GroupNormBlock(width // 2, width, 1),
            GroupNormBlock(width, width, 2),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        maps = self.body(pictures)
        weights = maps.flatten(2).softmax(-1).unflatten(-1, maps.shape[2:])
        rows, columns = (torch.linspace(-1, 1, n, device=maps.device) for n in maps.shape[2:])
        return torch.cat([(weights.sum(3) * rows).sum(-1), (weights.sum(2) * columns).sum(-1)], dim=-1)


class DiffusionNetwork(nn.Module):
    """Image encoders, embeddings, and the denoiser `unet` that they condition."""

    def __init__(self, config: DiffusionConfig, cameras: Sequence[str], robots: int, dim: int) -> None:
        super().__init__()
        self.config, self.dim = config, dim
        self.eyes = nn.ModuleDict({camera: ImageEncoder(config.image_width) for camera in cameras})
        self.robot = nn.Embedding(robots, config.robot_width)
        self.text = nn.EmbeddingBag(config.words, config.text_width)
        width = 2 * config.image_width * len(cameras) + dim + config.robot_width + config.text_width
        self.condition = nn.Sequential(nn.Linear(width, 256), nn.Mish(), nn.Linear(256, 256))
        self.unet = UNet(dim, config.widths, 256)

    def encode_condition(
        self, pictures: Sequence[Tensor], state: Tensor, words: Sequence[Tensor], robot: Tensor
    ) -> Tensor:
        """Return the condition [B, c]: images of each camera, state, instruction and robot."""
        keypoints = [encoder(pixels) for encoder, pixels in zip(self.eyes.values(), pictures, strict=True)]
        starts = torch.tensor([0, *(len(row) for row in words[:-1])], device=state.device).cumsum(0)
        text = self.text(torch.cat(list(words)).to(state.device), starts)
        return self.condition(torch.cat([*keypoints, state, self.robot(robot), text], dim=-1))


def bag_of_words(instruction: str, buckets: int) -> Tensor:
    """Return the hash buckets of the words of an instruction and of its adjacent word pairs."""
    words = re.findall(r"[a-z]+", instruction.lower()) or ["nothing"]
    terms = [*words, *(" ".join(pair) for pair in itertools.pairwise(words))]
    digests = (hashlib.blake2b(term.encode(), digest_size=4).digest() for term in terms)
    return torch.tensor([int.from_bytes(digest, "big") % buckets for digest in digests])
