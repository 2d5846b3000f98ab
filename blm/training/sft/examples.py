"""Examples that stay on disk, and the batches that worker processes make of them.

A corpus of a million rows is read through its index (`ValidatedCorpus`): the sampler packs by the
lengths in it, and a row is read, its media are decoded, and it is tokenised when a batch needs it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from blm.backbone import Backbone
from blm.backbone.outline import BackboneOutline
from blm.corpora.format.row_index import ReadOnDemand
from blm.corpora.format.validated import ValidatedCorpus
from blm.training.loop.batches import Microbatch
from blm.training.loop.distributed import DataShard
from blm.training.sft.mixture_sampler import MixtureSampler, TokenizedSource
from blm.training.sft.pack import ExampleBatch, pack
from blm.training.sft.tokenize import TokenizationConfig, TokenizedExample, tokenize_conversation
from blm.training.sft.tokenize_corpora import without_scan_turns
from blm.types import BlmError


class LazyExamples(ReadOnDemand[TokenizedExample]):
    """The examples of a validated corpus, tokenised whenever they are used.

    A copy in another process opens the files again, and loads the backbone's outline once.
    """

    def __init__(self, corpus: ValidatedCorpus, outline: BackboneOutline, limits: TokenizationConfig) -> None:
        """Raises BlmError if no row can be trained on."""
        self.corpus, self.outline, self.limits = corpus, outline, limits
        if not len(self):
            raise BlmError(
                f"no conversation of '{corpus.folder.name}' can be trained on: {dict(corpus.outcomes)}"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in ("corpus", "outline", "limits")}

    @cached_property
    def _rows(self) -> Any:
        return self.corpus.open()

    @cached_property
    def _numbers(self) -> np.ndarray:
        """Number of the row of each example: those that tokenisation did not leave out."""
        return np.flatnonzero(self._rows.places["tokens"]).astype(np.int32)

    @cached_property
    def lengths(self) -> np.ndarray:
        """[N] tokens of each example."""
        found: np.ndarray = self._rows.places["tokens"][self._numbers]
        return found

    @cached_property
    def answers(self) -> np.ndarray:
        """[N] tokens with loss of each example."""
        found: np.ndarray = self._rows.places["answers"][self._numbers]
        return found

    @property
    def shows_video(self) -> bool:
        """Whether the vision tower runs on a video for one of them."""
        return bool(self._rows.places["video"].any())

    def __len__(self) -> int:
        return len(self._numbers)

    def item(self, index: int) -> TokenizedExample:
        """Return an example. Raises BlmError if its media have changed since it was measured."""
        number = int(self._numbers[index])
        row = without_scan_turns(self._rows[number])
        example = tokenize_conversation(
            self.outline.load(),
            row.messages,
            self.limits,
            self.corpus.folder,
            Counter(),
            independent=row.independent,
            keep_pixels=True,
        )
        if example is None or len(example) != self.lengths[index]:
            found = "too long" if example is None else f"{len(example)} tokens long"
            raise BlmError(
                f"{self._rows.location(number)} is {found}, but was {self.lengths[index]} tokens long when "
                "the corpus was validated: its media have changed. Run the same command again"
            )
        return example


def shows_video(examples: Sequence[TokenizedExample]) -> bool:
    """Return whether the vision tower runs on a video for one of these examples."""
    if isinstance(examples, LazyExamples):
        return examples.shows_video
    return any(example.shows_video for example in examples)


class BatchMaker:
    """Makes the micro-batch of a step; a copy in another process does so without the weights."""

    def __init__(
        self,
        backbone: Backbone,
        outline: BackboneOutline | None,
        sources: Sequence[TokenizedSource],
        sampler: MixtureSampler,
    ) -> None:
        """`outline` is needed for copies in other processes."""
        self.outline, self.sources, self.sampler = outline, sources, sampler
        self._backbone: Backbone | None = backbone

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_backbone": None}

    def __call__(self, step: int, shard: DataShard) -> Microbatch[ExampleBatch]:
        if self._backbone is None:
            assert self.outline is not None
            self._backbone = self.outline.load()
        sequences = self.sampler.sequences(step, shard.index)
        examples = [[self.sources[source].examples[index] for source, index in one] for one in sequences]
        ids = [f"{self.sources[source].name} {index}" for one in sequences for source, index in one]
        batch = pack(self._backbone, examples, tuple(range(len(ids))))
        return Microbatch(
            batch,
            ids,
            weight=float(batch.loss_mask.sum()),
            tokens=batch.tokens,
            positions=batch.loss_mask.numel(),
        )
