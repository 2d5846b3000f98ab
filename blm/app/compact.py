"""Compact backbones from runs of Stage I with LoRA; `blm.backbone.compact` has their form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from blm.backbone import Backbone
from blm.backbone.backbone import load_base
from blm.backbone.compact import write_compact
from blm.io import files_below
from blm.training.sft.lora import read_factors
from blm.types import BlmError


@dataclass(frozen=True)
class CompactReport:
    """What compacting did."""

    size: int
    """Size of the folder [bytes]."""
    difference: float
    """Maximum difference of the probe logits from those before rounding."""
    largest: float
    """Maximum size of a probe logit."""


def export_compact(
    run: Path, out: Path, *, base: str, earlier: Sequence[Path] = (), dtype: torch.dtype = torch.float16
) -> CompactReport:
    """Write the backbone of a Stage I with LoRA to `out` as changes to its base model.

    `run` is the run's folder, with `backbone` and `adapter`; `earlier` are the folders of runs from
    which it started, whose adapters are added. Changes are rounded to `dtype`. Raises BlmError for
    runs that did not start from `base`, and for folders that are not runs with LoRA.
    """
    if not (run / "backbone").is_dir():
        raise BlmError(f"'{run}' has no backbone: give the folder of a finished Stage I with LoRA")
    found = [read_factors(folder / "adapter") for folder in (*earlier, run)]
    factors = {
        name: (
            torch.cat([one[name][0] for one in found if name in one], dim=1),
            torch.cat([one[name][1] for one in found if name in one]),
        )
        for name in {name for one in found for name in one}
    }
    whole = Backbone.load(run / "backbone")
    before, _ = load_base(base, whole.model.config)
    write_compact(whole.model, before, factors, out, name=base, dtype=dtype)
    logits = whole.probe_logits()
    again = Backbone.load(out).probe_logits()
    return CompactReport(
        size=sum((out / name).stat().st_size for name in files_below(out)),
        difference=float((again - logits).abs().max()),
        largest=float(logits.abs().max()),
    )
