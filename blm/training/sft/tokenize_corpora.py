"""Tokenization of corpora: each process tokenises a shard, and all of them receive all examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path

from rich.console import Console
from rich.progress import track

from blm.backbone import Backbone
from blm.backbone.video import media_of
from blm.corpora.format.messages import Conversation
from blm.corpora.format.row_index import LazySequence
from blm.corpora.format.validated import ValidatedCorpus
from blm.training.loop.distributed import DataShard, Processes
from blm.training.sft.mixture_sampler import TokenizedSource
from blm.training.sft.tokenize import (
    ProcessorInput,
    TokenizationConfig,
    TokenizedExample,
    tokenize_conversation,
)
from blm.types import BlmError, Message

SAMPLED_CONVERSATIONS = 32
"""Conversations of a corpus whose length is measured before all of them are read."""
MAX_IN_MEMORY = 300_000
"""Maximum number of conversations that are tokenised before training: of 8 frames they take 130 kB each."""
CONVERSATIONS_PER_EXCHANGE = 256
"""Number of conversations that a process tokenises between two exchanges."""


@dataclass(frozen=True, kw_only=True)
class TrainingSource:
    """Conversations of one kind, and their weight in the mixture."""

    name: str
    conversations: Sequence[Sequence[Message]]
    root: Path | None = None
    """Folder that image paths are relative to."""
    weight: float = 1.0
    """Weight in the training mixture, relative to the other sources."""
    locations: Sequence[str] = ()
    """Place of each conversation ("file:line"), for messages."""
    independent: Sequence[bool] = ()
    """Whether the turns of each conversation may be separated; empty if those of none may."""
    corpus: ValidatedCorpus | None = None
    """The corpus whose rows these are, in this order, if it was validated for this training."""

    @classmethod
    def of_corpus(cls, name: str, corpus: ValidatedCorpus, *, weight: float = 1.0) -> TrainingSource:
        """Return the source of a validated corpus, whose rows are read when they are used."""
        rows = corpus.open()
        return cls(
            name=name,
            conversations=LazySequence(rows, _trained_messages),
            root=corpus.folder,
            weight=weight,
            locations=LazySequence(range(len(rows)), rows.location),
            independent=LazySequence(rows, attrgetter("independent")),
            corpus=corpus,
        )

    @classmethod
    def of_rows(
        cls, name: str, rows: Sequence[Conversation], root: Path, *, weight: float = 1.0
    ) -> TrainingSource:
        """Return the source of the rows of a corpus in the folder `root`."""
        return cls(
            name=name,
            conversations=[row.messages for row in rows],
            root=root,
            weight=weight,
            locations=[f"{root}, {row.id}" for row in rows],
            independent=[row.independent for row in rows],
        )

    def first(self, count: int) -> TrainingSource:
        """Return the source with its first `count` conversations only."""
        return replace(
            self,
            conversations=self.conversations[:count],
            locations=self.locations[:count],
            independent=self.independent[:count],
            corpus=None,
        )

    def location(self, index: int) -> str:
        """Return the place of conversation `index`."""
        return self.locations[index] if self.locations else f"{self.name}, conversation {index}"


def without_scan_turns(row: Conversation) -> Conversation:
    """Return a conversation without its scan turns, which are labels of vision towers.

    They are a fifth of all tokens of our scenes.
    """
    rest = [turn for turn, kind in enumerate(row.kinds) if not kind.startswith("scan")]
    return row.select(rest) if 0 < len(rest) < len(row.kinds) else row


def _trained_messages(row: Conversation) -> tuple[Message, ...]:
    return without_scan_turns(row).messages


@dataclass
class TokenizedShard:
    """The examples of one process, of one block of conversations."""

    examples: list[TokenizedExample | None] = field(default_factory=list)
    """The examples; None for a conversation that is not used."""
    faults: list[tuple[int, str]] = field(default_factory=list)
    """Number of each conversation that cannot be used, and the reason."""


class CorpusTokenizer:
    """Tokenises sources together with the other processes; `counts` are those of this one."""

    def __init__(
        self,
        backbone: Backbone,
        config: TokenizationConfig,
        processes: Processes,
        *,
        skip_bad: bool,
    ) -> None:
        self.backbone, self.config, self.processes = backbone, config, processes
        self.skip_bad = skip_bad
        self.counts: Counter[str] = Counter()
        self.console = Console(stderr=True, quiet=not processes.first)

    def tokenize(self, source: TrainingSource) -> TokenizedSource:
        """Return all examples of a source.

        Raises BlmError, in every process, naming a conversation that cannot be used (unless
        `skip_bad`), and when no conversation is left.
        """
        count, total = self.processes.count, len(source.conversations)
        if total > MAX_IN_MEMORY:
            raise BlmError(
                f"'{source.name}' has {total:,} conversations, too many for the memory of each process (at "
                f"most {MAX_IN_MEMORY:,}): give --workers N to read them while the model trains"
            )
        size = CONVERSATIONS_PER_EXCHANGE * count
        blocks = [range(begin, min(begin + size, total)) for begin in range(0, total, size)]
        examples = list[TokenizedExample]()
        for block in track(blocks, f"reading {source.name}", console=self.console):
            own = DataShard(self.processes.rank, count).of(block)
            mine = self._tokenize_shard(source, own)
            shards = self.processes.gather_objects(mine)
            shards[self.processes.rank] = mine  # instead of a pickled copy
            self._report_faults(source, sorted(fault for shard in shards for fault in shard.faults))
            in_order = (shards[n % count].examples[n // count] for n in range(len(block)))
            examples += [example for example in in_order if example is not None]
        if not examples:
            raise BlmError(f"no conversation of '{source.name}' can be trained on: {dict(self.counts)}")
        return TokenizedSource(name=source.name, examples=examples, weight=source.weight)

    def total_counts(self) -> Counter[str]:
        """Return the outcomes in all processes: conversations kept, cut, dropped, .."""
        return sum(self.processes.gather_objects(self.counts), Counter[str]())

    def _tokenize_shard(self, source: TrainingSource, numbers: Sequence[int]) -> TokenizedShard:
        shard = TokenizedShard()
        for number in numbers:
            messages, example = tuple(source.conversations[number]), None
            try:
                example = tokenize_conversation(
                    self.backbone,
                    messages,
                    self.config,
                    source.root,
                    self.counts,
                    independent=bool(source.independent) and source.independent[number],
                )
            except BlmError as error:
                shard.faults.append((number, str(error)))
                if not self.skip_bad:
                    break
                self.counts["skipped, bad"] += 1
            shard.examples.append(example)
        return shard

    def _report_faults(self, source: TrainingSource, faults: Sequence[tuple[int, str]]) -> None:
        for number, reason in faults:
            if not self.skip_bad:
                raise BlmError(f"{source.location(number)}: {reason}; skip_bad skips such conversations")
            self.console.print(
                f"skipped {source.location(number)}: {reason}", highlight=False, soft_wrap=True
            )


def check_lengths(backbone: Backbone, source: TrainingSource, config: TokenizationConfig) -> str:
    """Tokenise a sample of a source; return a warning if some of it is too long, else "".

    A conversation is left out of the training if its first question and answer exceed
    `config.max_length`. The backbone may be an outline. Raises BlmError if that holds for the
    whole sample. Conversations with other faults are not counted.
    """
    total = len(source.conversations)
    chosen = range(0, total, max(1, total // SAMPLED_CONVERSATIONS))[:SAMPLED_CONVERSATIONS]
    lengths = []
    for number in chosen:
        messages = tuple(source.conversations[number])
        roles = [message.role for message in messages]
        if "assistant" not in roles:
            continue
        first = messages[: roles.index("assistant") + 1]
        try:
            text, images = backbone.render(first, prompt=False), media_of(first, backbone.videos_as)
            inputs, _ = ProcessorInput(text, images, source.root, config.max_pixels).process(backbone)
        except BlmError:
            continue
        lengths.append(inputs["input_ids"].shape[1])
    long = [length for length in lengths if length > config.max_length]
    if not long:
        return ""
    message = (
        f"{len(long)} of {len(lengths)} sampled conversations of '{source.name}' are longer than "
        f"max_length = {config.max_length} tokens (up to {max(long)}) and would be left out: set "
        f"limits.max_length to {max(long)} or more, or limits.max_pixels to shrink large pictures"
    )
    if len(long) == len(lengths):
        raise BlmError(message)
    return message
