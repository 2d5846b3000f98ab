"""Compact codes of hidden states: normalised, projected, and quantised to int8.

    x = (h - mean h) / sqrt(var h + eps)    per token; the bridge begins with the same norm
    y = (x - m) P                           P: principal components, or an order of the channels
    stored: the first channels of y in float16, the others as round(y / (scale step)) in int8,
            and in float16 the step of the token, such that no value is clipped

The first channels are those with the largest standard deviation (the outlier channels); the scale
of a channel is the square root of its standard deviation. On tokens of nano and smol, this scale
gave a smaller worst error than none; against the standard deviation itself it won on nano and lost
on smol.

Shape legend: d hidden size, D kept channels, K outlier channels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from blm.io import replacing, sha256_file
from blm.types import BlmError

SMALLEST_STEP = 2.0**-14
"""Smallest step of a token: the smallest normal number of float16."""
SMALLEST_DEVIATION = 1e-4
"""Smallest standard deviation that a scale is made of, relative to the largest."""


def outlier_channels(dims: int) -> int:
    """Return the number K of channels in float16: a 32nd, and at least 8."""
    return max(8, dims // 32)


def code_bytes(hidden: int, dims: int) -> int:
    """Return the bytes of a stored token."""
    kept = min(dims, hidden)
    return kept + outlier_channels(kept) + 2


@dataclass(frozen=True, eq=False)
class TokenCodec:
    """Encoder and decoder of hidden states; a function of its tensors alone."""

    mean: Tensor
    """[d] mean of normalised tokens."""
    basis: Tensor | None
    """[d, D] principal components, the largest first; None: all channels are kept."""
    order: Tensor | None
    """[d] numbers of the channels, those with the largest deviation first; None with a basis."""
    scale: Tensor
    """[D - K] scale of each channel in int8."""
    explained: float
    """Share of the variance of the sample that the kept channels have, 0..1."""
    sha256: str = ""
    """Hash of the file that it was loaded from."""
    path: Path | None = None
    """That file."""
    _copies: dict[torch.device, TokenCodec] = field(default_factory=dict, init=False, repr=False)

    @property
    def dims(self) -> int:
        """Number D of channels that are kept."""
        return len(self.mean) if self.basis is None else self.basis.shape[1]

    @classmethod
    def fit(cls, batches: Iterable[Tensor], dims: int) -> TokenCodec:
        """Fit a codec of `dims` channels to hidden states, in batches [n, d].

        With `dims` >= d there is no projection.
        """
        count, total, products = 0, torch.zeros(()), torch.zeros(())
        for hidden in batches:
            tokens = normalised(hidden)
            count += len(tokens)
            total = total + tokens.double().sum(0).cpu()
            products = products + (tokens.T @ tokens).double().cpu()
        mean = total / count
        covariance = products / count - mean[:, None] * mean
        if dims >= len(mean):
            variances, order = covariance.diag().sort(descending=True, stable=True)
            basis, explained = None, 1.0
        else:
            variances, vectors = torch.linalg.eigh(covariance)
            variances, order = variances.flip(0).clamp_min(0), None
            explained = float(variances[:dims].sum() / variances.sum())
            basis = vectors.flip(1)[:, :dims].float().contiguous()
        deviation = variances.clamp_min(0).sqrt()
        smallest = SMALLEST_DEVIATION * deviation[0].clamp_min(SMALLEST_DEVIATION)
        scale = deviation[outlier_channels(min(dims, len(mean))) : dims].clamp_min(float(smallest)).sqrt()
        return cls(mean.float(), basis, order, scale.float(), explained)

    def encode(self, hidden: Tensor) -> Tensor:
        """Return the codes [n, bytes], uint8, of hidden states [n, d]."""
        mine = self._on(hidden.device)
        centred = normalised(hidden) - mine.mean
        channels = centred[:, mine.order] if mine.basis is None else centred @ mine.basis
        outliers = outlier_channels(self.dims)
        high, low = channels[:, :outliers].half(), channels[:, outliers:] / mine.scale
        step = (low.abs().amax(-1, keepdim=True) / 127).clamp_min(SMALLEST_STEP).half()
        low = (low / step.float()).round().clamp(-127, 127).to(torch.int8)
        return torch.cat([part.view(torch.uint8) for part in (low, high, step)], dim=-1)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the normalised hidden states [.., d], float32, of codes [.., bytes]."""
        mine = self._on(codes.device)
        with torch.autocast(codes.device.type, enabled=False):
            halves = codes[..., len(mine.scale) :].contiguous().view(torch.float16).float()
            low = codes[..., : len(mine.scale)].view(torch.int8).float() * (mine.scale * halves[..., -1:])
            channels = torch.cat([halves[..., :-1], low], dim=-1)
            if mine.basis is not None:
                return channels @ mine.basis.T + mine.mean
            assert mine.order is not None
            return channels[..., mine.order.argsort()] + mine.mean

    def _on(self, device: torch.device) -> TokenCodec:
        """Return this codec with its tensors on `device`; copied once."""
        if device not in self._copies:
            basis = None if self.basis is None else self.basis.to(device)
            order = None if self.order is None else self.order.to(device)
            mean, scale = self.mean.to(device), self.scale.to(device)
            self._copies[device] = TokenCodec(mean, basis, order, scale, self.explained)
        return self._copies[device]

    def save(self, path: Path, inputs: Mapping[str, Any]) -> None:
        """Write a safetensors file; `inputs` is what the codec was made from.

        There is one entry of metadata, because safetensors writes several in any order, and the
        file is hashed.
        """
        tensors = {"mean": self.mean, "basis": self.basis, "order": self.order, "scale": self.scale}
        facts = json.dumps({"inputs": inputs, "explained": self.explained}, sort_keys=True)
        with replacing(path) as temporary:
            save_file(
                {name: value for name, value in tensors.items() if value is not None},
                temporary,
                {"facts": facts},
            )

    @classmethod
    def load(cls, path: Path) -> tuple[TokenCodec, dict[str, Any]]:
        """Return the codec in a file, and what it was made from.

        Raises BlmError for a file that `save` did not write.
        """
        try:
            with safe_open(path, "pt") as stored:
                facts = json.loads(stored.metadata()["facts"])
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            inputs: dict[str, Any] = facts["inputs"]
            codec = cls(
                mean=tensors["mean"],
                basis=tensors.get("basis"),
                order=tensors.get("order"),
                scale=tensors["scale"],
                explained=facts["explained"],
                sha256=sha256_file(path),
                path=path,
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise BlmError(
                f"'{path}' is no projection of a hidden-state cache; move the folder of the caches away, run "
                "again"
            ) from error
        return codec, inputs


def normalised(hidden: Tensor) -> Tensor:
    """Return hidden states [.., d] with mean 0 and variance 1 over d, in float32."""
    return F.layer_norm(hidden.float(), hidden.shape[-1:])


@dataclass(frozen=True)
class CodingError:
    """Difference of decoded and normalised tokens."""

    rms: float
    """Root of the mean square error, relative to that of the tokens."""
    worst: float
    """Largest error of a token, relative to its norm."""
    cosine: float
    """Smallest cosine between a token and its decoded one."""


class ErrorMeter:
    """Adds up the error of codes."""

    def __init__(self) -> None:
        self._errors, self._norms, self._cosines = list[Tensor](), list[Tensor](), list[Tensor]()

    def add(self, hidden: Tensor, decoded: Tensor) -> None:
        """Add hidden states [n, d] and what their codes decode to."""
        tokens = normalised(hidden)
        self._errors.append((decoded - tokens).norm(dim=-1).cpu())
        self._norms.append(tokens.norm(dim=-1).cpu())
        self._cosines.append(F.cosine_similarity(decoded, tokens, dim=-1).cpu())

    def result(self) -> CodingError:
        """Return the error of all tokens so far."""
        errors, norms = torch.cat(self._errors).double(), torch.cat(self._norms).double()
        return CodingError(
            rms=float(errors.square().sum().sqrt() / norms.square().sum().sqrt()),
            worst=float((errors / norms.clamp_min(1e-6)).max()),
            cosine=float(torch.cat(self._cosines).min()),
        )
