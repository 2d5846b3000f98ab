"""Replay: dialogues that the base model answers itself, to be mixed into Stage I.

The base model answers prompts generated here, so nothing is downloaded and no other model is
imitated. Answers are sampled from its own distribution at temperature 1: on such text the base has
zero expected gradient, while greedy answers would train it to be more confident than it was. The
prompts follow from a seed: half are general, half are about half of the topics of Python's manual
(`pydoc_data.topics`). The other half of the topics is held-out text, on which
`blm.training.sft.retention` measures forgetting. If there are pictures, a third of the prompts ask
about one of them, so that the model also keeps how it describes what it sees.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from blm.backbone import Backbone
from blm.corpora.format.messages import Conversation
from blm.corpora.format.writing import write_corpus
from blm.corpora.scenes.build import SHARDS_KIND, remove_shards, shards_folder
from blm.io import work_folder
from blm.jobs import Result, WorkUnit
from blm.jobs.group import Alone, Group
from blm.media import with_pixels
from blm.types import BlmError, Image, Message

MOST = 10_000_000
"""Maximum number of conversations in a replay corpus."""
MAX_TOKENS = 64
"""Default of the maximum length of an answer [tokens]. Longer answers are dropped, because cut off they would
teach the wrong end."""
BATCH = 32
"""Number of conversations per batch. It affects the result: sampling depends on the batch."""
MANUAL = (
    'In one or two sentences: what does the manual of Python say about "{}"?',
    'Explain "{}" in Python to a beginner, briefly.',
    'Give one short example for "{}" in Python.',
    'When would I need "{}" in Python? Answer in one sentence.',
)
GENERAL = (
    "What is {}? Answer in one sentence.",
    "Tell me one fact about {}.",
    "Write two sentences about {}.",
    "Give me three words that describe {}.",
    "Why is {} useful? Be brief.",
    "Write a short question that a child might ask about {}.",
    "List three things that have to do with {}.",
    "Explain {} in simple words, in one or two sentences.",
    "Write one sentence about {} in capital letters.",
    "Is {} something that you can touch? Say why, briefly.",
)
ABOUT_PICTURES = (
    "Describe this picture in one sentence.",
    "What is in this picture? Be brief.",
    "Name the objects that you can see.",
    "Which colours do you see in this picture?",
    "Write a short title for this picture.",
    "What might happen next? Answer in one sentence.",
    "How many objects do you see? Name them.",
    "What is unusual about this picture? Be brief.",
)
SUBJECTS = (
    "rain", "bread", "a bicycle", "the moon", "music", "a library", "gravity", "a river", "coffee",
    "a hammer", "democracy", "a volcano", "the heart", "a battery", "paper", "a robot", "honey",
    "winter", "a bridge", "a map", "electricity", "a tree", "the ocean", "glass", "a clock",
    "friendship", "salt", "a garden", "a computer", "a train", "history", "a doctor", "light", "a dog",
    "a poem", "wood", "mathematics", "a kitchen", "fire", "a school", "sleep", "a mountain", "money",
    "an airport", "colour", "a chair", "the wind", "a language",
)  # fmt: skip


def topic_texts(held_out: bool) -> dict[str, str]:
    """Return title -> text for one half of the manual's topics.

    Which half a topic belongs to depends on its title. Some topics have several names and one text:
    by name they would be in both halves.
    """
    titled = {text.partition("\n")[0].replace('"', ""): text for text in topics.values()}
    return {
        title: text
        for title, text in sorted(titled.items())
        if (hashlib.sha256(title.encode()).digest()[0] % 2 == 0) == held_out
    }


def replay_prompts(seed: int) -> Iterator[tuple[str, str]]:
    """Yield (group, prompt) endlessly, half of them general, half about the manual.

    No prompt is repeated before all prompts of its half were used.
    """
    titles = topic_texts(held_out=False)
    pools = (
        [(f"replay/{subject}", form.format(subject)) for form in GENERAL for subject in SUBJECTS],
        [(f"replay/{title}", form.format(title)) for form in MANUAL for title in titles],
    )
    for epoch in itertools.count():
        rng = np.random.default_rng((seed, epoch))
        orders = [rng.permutation(len(pool)) for pool in pools]
        for pair in itertools.zip_longest(*orders):
            yield from (pool[place] for pool, place in zip(pools, pair, strict=True) if place is not None)


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures to ask about."""

    references: Sequence[str]
    """Media references below `root`."""
    root: Path
    """Folder of the pictures."""


ALONE = Alone()
Prompt = tuple[str, tuple[Image, ...], str]
"""Group, pictures and text."""


def prompts_with_pictures(seed: int, pictures: Pictures | None) -> Iterator[Prompt]:
    """Yield the prompts of `replay_prompts`; if there are pictures, every third is about one."""
    texts = replay_prompts(seed)
    if pictures is None or not pictures.references:
        yield from ((group, (), text) for group, text in texts)
        return
    for epoch in itertools.count():
        rng = np.random.default_rng((seed, epoch, 1))
        for place in rng.permutation(len(pictures.references)):
            for group, text in itertools.islice(texts, 2):
                yield group, (), text
            reference = pictures.references[place]
            text = str(rng.choice(ABOUT_PICTURES))
            yield f"replay/{reference}", (Image(path=reference),), text


def build_replay(
    backbone: Backbone,
    out: Path,
    count: int,
    *,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
    pictures: Pictures | None = None,
    group: Group = ALONE,
) -> int:
    """Write a corpus of `count` conversations at `out`.

    Return the number of conversations that were answered but dropped.

    Empty answers and those that do not end within `max_tokens` are dropped. With `pictures`, a
    third of the prompts show one. A killed run resumes.
    The processes of `group` answer a part of the batches each, and the first writes the corpus: it
    does not depend on their number. Each must have the backbone, and all must see `out`.
    Raises BlmError when `out` exists, or when the model gives no complete answer to most prompts.
    """
    if out.exists():
        raise BlmError(f"corpus folder '{out}' exists; move it away or name another one")
    if not 1 <= count <= MOST:
        raise BlmError(f"a replay corpus needs a count from 1 to {MOST:,}, got {count}")
    if not 0 <= seed < 2**32:
        raise BlmError(f"seed is {seed}; it must be 0 to {2**32 - 1:,}")
    revision, shards = backbone.fingerprint()[:16], shards_folder(out)
    facts = _facts(revision, seed, pictures)
    group.together(lambda: work_folder(shards, SHARDS_KIND, facts) if group.first else None)
    root = pictures.root if pictures is not None else None

    def answer(payload: tuple[int, Sequence[Prompt]]) -> Result:
        number, asked = payload
        prompts: list[tuple[Message, ...]] = []
        for _, shown, text in asked:
            message = Message("user", (*shown, text))
            prompts.append(with_pixels((message,), root) if root is not None else (message,))
        return {"answers": backbone.complete(prompts, max_tokens=max_tokens, seed=seed * 1_000_003 + number)}

    prompts, units = prompts_with_pictures(seed, pictures), list[WorkUnit]()
    kept, answered = list[Conversation](), 0
    while len(kept) < count:
        if answered > 20 * count + 100 * BATCH:
            raise BlmError(f"only {len(kept)} of {answered} answers ended within {max_tokens} tokens")
        for _ in range(-(-(count - len(kept)) // BATCH)):
            part = list(itertools.islice(prompts, BATCH))
            units.append(WorkUnit(f"{revision}/{seed}/{max_tokens}/{len(units)}", (len(units), part)))
        done = group.run_units(answer, units, shards, "replay")
        asked = [prompt for unit in units for prompt in unit.payload[1]]
        answers = [answer for unit in units for answer in done[unit.key]["answers"]]
        answered, kept = len(answers), list(_conversations(asked, answers))
    unused = answered - len(kept)

    def write() -> None:
        if group.first:
            write_corpus(out, kept[:count], media=root)
            remove_shards(out)

    group.together(write)
    return unused


def _facts(revision: str, seed: int, pictures: Pictures | None) -> dict[str, object]:
    """Return what the answers depend on, beside their number and length."""
    facts: dict[str, object] = {"replay": revision, "seed": seed}
    if pictures is not None:
        listed = "\n".join(pictures.references)
        facts["pictures"] = hashlib.sha256(listed.encode(errors="surrogatepass")).hexdigest()[:16]
    return facts


def _conversations(asked: Sequence[Prompt], answers: Sequence[tuple[str, bool]]) -> Iterator[Conversation]:
    for number, ((group, shown, prompt), (text, ended)) in enumerate(zip(asked, answers, strict=True)):
        if text and ended:
            yield Conversation(
                id=f"replay/{number}",
                group=group,
                source="replay",
                kinds=("replay_picture" if shown else "replay",),
                messages=(Message("user", (*shown, prompt)), Message("assistant", (text,))),
            )
