"""Prefix cache: keys, values and hidden states of the text before the pictures, for later prompts.

Blocks of the language model are causal: what they compute for the text before the first picture
does not depend on the pictures. With control prompts in the order text_first this text stays the
same in all decisions of an episode (robot, views, instruction), so it is read once, and later
decisions read the pictures and the question only.

H_k is the same as without the cache, up to the rounding of matrix products of another shape. A
text is always read alone, whether or not its states are kept, so the same prompts give the same
bits each time. Shapes: B prompts, L positions, P positions before the pictures, R after, d hidden
size.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from blm.backbone.generation.batch import KeyValueCache, cache_argument
from blm.backbone.model import HiddenStates, Inputs, MultimodalModel, blocks_up_to
from blm.backbone.video import grids_of
from blm.types import BlmError

MAX_BYTES = 256 * 2**20
"""Maximum size of all cached states: about 100 texts of 60 tokens at 18 blocks of 7 B parameters."""
PER_TOKEN = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
"""Inputs that have a value for each token; all others belong to pictures."""
SAMPLES = 4
"""Number of values of each parameter that are compared to notice changed weights."""


@dataclass(frozen=True, eq=False)
class _Prefix:
    """The states of one text."""

    states: KeyValueCache
    """Keys and values of one row; its mask is on the CPU."""
    hidden: Tensor
    """[P, d] hidden states after the tapped block."""

    @property
    def nbytes(self) -> int:
        return self.states.nbytes + self.hidden.nbytes


class PrefixCache:
    """Taps prompts of one model after one block, and keeps the states of the texts before their
    pictures, the least recently used of which it forgets first. Thread-safe.

    Changed weights empty it: it compares which parameters the model has, their versions, and
    `SAMPLES` values of each, so that it also notices changes that torch does not count, such as
    merged adapters. In training mode it is not used.
    """

    def __init__(self, model: MultimodalModel, layer: int, *, max_bytes: int = MAX_BYTES) -> None:
        """Cache for taps after block `layer`.

        Raises BlmError for a layer that the model does not have, and for a model for which cached
        states are not exact (`why_not_exact`).
        """
        model.require_layer(layer)
        if reason := why_not_exact(model):
            raise BlmError(f"the texts of a '{model.model.config.model_type}' cannot be cached: {reason}")
        self.model, self.layer, self.max_bytes = model, layer, max_bytes
        self._kept = OrderedDict[tuple[int, ...], _Prefix]()
        """Token ids -> states, the least recently used first."""
        self._lock = threading.Lock()
        self._stamp: list[Any] = []

    def __len__(self) -> int:
        """Return the number of texts whose states are kept."""
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Size of the states that are kept."""
        return sum(prefix.nbytes for prefix in self._kept.values())

    def clear(self) -> None:
        """Forget all texts."""
        with self._lock:
            self._kept.clear()

    @torch.no_grad()
    def tap(self, inputs: Inputs) -> HiddenStates:
        """Return H_k as `MultimodalModel.tap` does, zero at padding.

        `inputs` are those of `MultimodalModel.read`: on the CPU, and padded on the right. Raises
        BlmError for a prompt without a picture.
        """
        model, ids, mask = self.model, inputs["input_ids"], inputs["attention_mask"]
        if model.model.training:
            self.clear()
            return model.tap(inputs, self.layer)
        is_picture = ids == model.placeholder_id
        if not is_picture.any(1).all():
            raise BlmError("a prompt without a picture cannot be tapped with a prefix cache; use `tap`")
        starts, lengths = is_picture.int().argmax(1), mask.sum(1)
        prefixes = self._prefixes([row[:start].tolist() for row, start in zip(ids, starts, strict=True)])
        rest = self._read_rest(inputs, starts, lengths, KeyValueCache.join([one.states for one in prefixes]))
        hidden = rest.new_zeros(*ids.shape, rest.shape[-1])
        for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            hidden[row, :start] = prefixes[row].hidden
            hidden[row, start:length] = rest[row, : length - start]
        return HiddenStates(hidden, model.place({"mask": mask})["mask"].bool())

    def _read_rest(self, inputs: Inputs, starts: Tensor, lengths: Tensor, before: KeyValueCache) -> Tensor:
        """Return the hidden states [B, R, d] of pictures and text from `starts` on, after `before`."""
        ids, positions, grids = inputs["input_ids"], self.model.position_ids(inputs), grids_of(inputs)
        columns = starts[:, None] + torch.arange(int((lengths - starts).max()))
        seen = (columns < lengths[:, None]).to(before.mask.dtype)
        columns = columns.clamp_max(ids.shape[1] - 1)
        return self._run(
            {name: value for name, value in inputs.items() if name not in (*PER_TOKEN, *grids)}
            | {
                "input_ids": ids.gather(1, columns),
                "position_ids": positions.gather(-1, columns.expand(*positions.shape[:-1], -1)),
                "attention_mask": torch.cat([before.mask, seen], 1),
            },
            before.cache,
            grids,
        )

    def _run(self, inputs: Inputs, cache: DynamicCache, grids: Inputs) -> Tensor:
        """Run the blocks with keys and values in `cache`, which grows; the host reads `grids`."""
        blocks = blocks_up_to(self.model, self.layer)
        more: dict[str, Any] = {**grids, cache_argument(blocks): cache, "use_cache": True}
        hidden: Tensor = blocks(**self.model.place(inputs), **more).last_hidden_state
        return hidden

    def _prefixes(self, texts: Sequence[Sequence[int]]) -> list[_Prefix]:
        """Return the states of texts, given as token ids; each different text is read at most once."""
        keys = [tuple(text) for text in texts]
        stamp = self._weights()
        with self._lock:
            if stamp != self._stamp:
                self._kept.clear()
                self._stamp = stamp
            found = {key: self._kept[key] for key in keys if key in self._kept}
        read = {key: self._read(key) for key in dict.fromkeys(keys) if key not in found}
        with self._lock:
            if stamp == self._stamp:
                self._keep(found | read)
        return [(found | read)[key] for key in keys]

    def _keep(self, used: dict[tuple[int, ...], _Prefix]) -> None:
        for key, prefix in used.items():
            self._kept[key] = prefix
            self._kept.move_to_end(key)
        while self.nbytes > self.max_bytes:
            self._kept.popitem(last=False)

    def _read(self, text: Sequence[int]) -> _Prefix:
        """Run the blocks on a text alone."""
        ids = torch.tensor([text])
        mask, cache = torch.ones_like(ids), DynamicCache()
        inputs = {"input_ids": ids, "position_ids": mask.cumsum(1) - 1, "attention_mask": mask}
        return _Prefix(KeyValueCache(cache, mask), self._run(inputs, cache, {})[0])

    def _weights(self) -> list[Any]:
        """Return a value that differs after a change of the weights that read a text."""
        embeddings: Any = self.model.model.get_input_embeddings()
        modules = [embeddings, *self.model.decoder.layers[: self.layer]]
        found = [parameter.detach() for module in modules for parameter in module.parameters()]
        samples = [x.flatten()[:: max(1, x.numel() // SAMPLES)][:SAMPLES] for x in found]
        return [(x.data_ptr(), x._version) for x in found] + torch.cat(samples).tolist()


def why_not_exact(model: MultimodalModel) -> str:
    """Return why cached states of a text would change the hidden states of this model, or an empty
    string if they do not."""
    config = model.decoder.config
    kinds = {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}
    if model.has_two_way_pictures:
        return "the tokens of a picture attend to each other in both directions"
    if kinds:
        return f"its blocks include {', '.join(sorted(kinds))}, which no prefix of another prompt continues"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return f"its blocks attend to a sliding window of {config.sliding_window} tokens"
    return ""
