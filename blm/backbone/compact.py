"""Compact backbones: only what training changed is stored, beside the name of the base model.

LoRA adapters of a language model take a tenth of its weights or less. A compact folder has two files,

    compact.json          base model, hashes, and the config of the whole model
    compact.safetensors   low-rank factors B, A [out, r], [r, in]; whole tensors of all else that changed

and is expanded, once, into a stock transformers folder in the user's cache folder. The expanded
weights are the same bits on every machine, so a checkpoint's proof of its frozen backbone holds: all
sums have a fixed order and no fused operations. (Matrix products round differently by processor.)
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from blm.backbone.hashing import hash_tensors
from blm.backbone.saving import save_folder
from blm.io import new_folder, read_json, recover_folder, sha256_file
from blm.types import BlmError

FORMAT = 1
FACTS, TENSORS = "compact.json", "compact.safetensors"
UP, DOWN = ".lora_B", ".lora_A"
"""Endings of the names of factors: a weight is that of the base plus B A."""
ROWS = 64
"""Rows of a weight that are summed at a time, which stay in the processor's cache."""
LoadBase = Callable[[str, Any], tuple[PreTrainedModel, Any]]
"""Returns the base model of this name and its processor; the second argument is the config of the
whole model."""


@dataclass(frozen=True, kw_only=True)
class CompactFacts:
    """Content of compact.json."""

    base: str
    """Name of the base model: one of BACKBONES, or an id of the Hugging Face hub."""
    base_hash: str
    """sha256 of the base's tensors that are used."""
    weights: str
    """sha256 of all tensors of the whole model."""
    tensors: str
    """sha256 of compact.safetensors."""
    config: dict[str, Any]
    """Config of the whole model."""
    format: int = FORMAT


def is_compact(folder: Path) -> bool:
    """Return whether a folder holds a compact backbone."""
    return (folder / FACTS).is_file()


def read_facts(folder: Path) -> CompactFacts:
    """Return the content of compact.json. Raises BlmError unless both files are unaltered."""
    stored = read_json(folder / FACTS)
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise BlmError(f"'{folder / FACTS}' is not of format {FORMAT}: use the program version that wrote it")
    facts = CompactFacts(**stored)
    if not (folder / TENSORS).is_file() or sha256_file(folder / TENSORS) != facts.tensors:
        raise BlmError(f"'{folder / TENSORS}' is missing or altered; copy the folder again")
    return facts


def add_product(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Return W + B A in float32 for W [out, in], B [out, r] and A [r, in].

    The products are added one after the other, for r = 0, 1, ..: the result has the same bits on all
    processors.
    """
    total, up, down = weight.float().clone(), up.float(), down.float()
    for part, factors in zip(total.split(ROWS), up.split(ROWS), strict=True):
        for rank in range(len(down)):
            part += factors[:, rank, None] * down[rank]
    return total


def write_compact(
    whole: PreTrainedModel,
    base: PreTrainedModel,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    out: Path,
    *,
    name: str,
    dtype: torch.dtype,
) -> None:
    """Write to `out` what differs between the model `whole` and its `base`, called `name`.

    `factors` are B and A of the weights that LoRA adapted, with the scale in B. They and the other
    changed tensors are rounded to `dtype`, so what is loaded later differs a little from `whole`.
    Raises BlmError for factors that do not lead from base to whole.
    """
    before = base.state_dict()
    kept, used = dict[str, Tensor](), dict[str, Tensor]()
    for key, value in _stored(whole).items():
        old = before.get(key)
        if key in factors:
            if old is None or old.shape != value.shape or _distance(value, old, *factors[key]) > 0.01:
                raise BlmError(
                    f"the adapters do not lead from the base '{name}' to this model: '{key}' differs"
                )
            kept |= {key + UP: factors[key][0], key + DOWN: factors[key][1]}
            used[key] = old
        elif old is not None and torch.equal(old, value):
            used[key] = old
        else:
            kept[key] = value
    if unknown := sorted(factors.keys() - whole.state_dict().keys()):
        raise BlmError(f"the adapters belong to another model: this one has no '{unknown[0]}'")
    rounded = {
        key: (value.to(dtype) if value.is_floating_point() else value).contiguous()
        for key, value in kept.items()
    }
    model = _assembled(whole.config.to_dict(), used, rounded)

    def write(work: Path) -> None:
        save_file(rounded, work / TENSORS)
        facts = CompactFacts(
            base=name,
            base_hash=_hash(used),
            weights=_hash(_stored(model)),
            tensors=sha256_file(work / TENSORS),
            config=whole.config.to_dict(),
        )
        (work / FACTS).write_text(json.dumps(asdict(facts), indent=1, sort_keys=True))

    save_folder(out, write)


def expand(folder: Path, load_base: LoadBase) -> Path:
    """Return a stock transformers folder of a compact backbone, in the user's cache folder.

    It is written by the first call. Raises BlmError for altered files, another version of the base
    model, and a cache folder that cannot be written.
    """
    facts = read_facts(folder)
    key = hashlib.sha256((folder / FACTS).read_bytes()).hexdigest()[:16]
    place = user_cache_path("blm") / "backbones" / f"{facts.base.replace('/', '--')}-{key}"
    if recover_folder(place).is_dir():
        return place
    base, processor = load_base(facts.base, AutoConfig.for_model(**facts.config))
    changed = load_file(folder / TENSORS)
    used = {name: value for name, value in _stored(base).items() if name not in changed}
    if _hash(used) != facts.base_hash:
        raise BlmError(
            f"the base model '{facts.base}' that is installed is not the one that '{folder}' was made from: "
            "its weights have another hash. Install the version that the documentation names"
        )
    model = _assembled(facts.config, used, changed)
    if _hash(_stored(model)) != facts.weights:
        raise BlmError(f"the weights of '{folder}' do not have the hash that {FACTS} states")
    try:
        with new_folder(place) as work:
            model.save_pretrained(work)
            processor.save_pretrained(work)
    except BlmError as error:
        if not place.is_dir():  # otherwise another process was faster
            raise BlmError(
                f"{error} (the first use of '{folder}' writes {_megabytes(model)} MB to the user's cache "
                "folder; XDG_CACHE_HOME chooses another one)"
            ) from error
    return place


def copy_compact(folder: Path, out: Path) -> None:
    """Copy a compact backbone's files into an existing folder."""
    for name in (FACTS, TENSORS):
        shutil.copyfile(folder / name, out / name)


def _assembled(
    config: Mapping[str, Any], used: Mapping[str, Tensor], changed: Mapping[str, Tensor]
) -> PreTrainedModel:
    """Return the whole model from the base's tensors and the changed ones, in float32.

    Raises BlmError if a tensor of the model is in neither.
    """
    with torch.random.fork_rng(devices=[]):
        model: Any = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config))
    state = dict[str, Tensor]()
    for name, value in used.items():
        factors = changed.get(name + UP), changed.get(name + DOWN)
        state[name] = value if None in factors else add_product(value, *factors)  # type: ignore[arg-type]
    for name, value in changed.items():
        if not name.endswith((UP, DOWN)):
            state[name] = value
    if missing := sorted(model.state_dict().keys() - state.keys() - _shared(model)):
        raise BlmError(f"neither the base model nor {TENSORS} has the tensor '{missing[0]}'")
    model.load_state_dict(state, strict=False)
    return model.float().eval()


def _shared(model: PreTrainedModel) -> set[str]:
    """Return the names of tied tensors but the first of each: they follow from it."""
    seen, again = set[tuple[int, torch.Size]](), set[str]()
    for name, value in model.state_dict().items():
        key = (value.data_ptr(), value.shape)
        if key in seen and value.numel():
            again.add(name)
        seen.add(key)
    return again


def _stored(model: PreTrainedModel) -> dict[str, Tensor]:
    shared = _shared(model)
    return {name: value for name, value in model.state_dict().items() if name not in shared}


def _hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    hash_tensors(digest, tensors)
    return digest.hexdigest()


def _distance(value: Tensor, old: Tensor, up: Tensor, down: Tensor) -> float:
    """Return the distance of W + B A from a weight, relative to its change."""
    change = (value - old).float()
    off = change - up.float() @ down.float()
    return float(off.norm() / change.norm().clamp_min(1e-12)) if change.any() else float(off.norm())


def _megabytes(model: PreTrainedModel) -> int:
    return round(sum(value.numel() * value.element_size() for value in _stored(model).values()) / 1e6)
