"""Replay: text-only dialogues that the base model answers itself, to be mixed into Stage I.

The base model answers prompts generated here, so nothing is downloaded and no other model is
imitated. Answers are sampled from its own distribution at temperature 1: on such text the base has
zero expected gradient, while greedy answers would train it to be more confident than it was. The
prompts follow from a seed: half are general, half are about half of the topics of Python's manual
(`pydoc_data.topics`). The other half of the topics is held-out text, on which
`blm.training.sft.retention` measures forgetting.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from blm.backbone import Backbone
from blm.corpora.format.messages import Conversation, write_corpus
from blm.corpora.scenes.build import SHARDS_KIND, remove_shards, shards_folder
from blm.io import work_folder
from blm.jobs import Result, WorkUnit, run_units
from blm.types import BlmError, Message

MOST = 10_000_000
"""Maximum number of conversations in a replay corpus."""
MAX_TOKENS = 64
"""Maximum length of an answer [tokens]. Longer answers are dropped, because cut off they would
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


def build_replay(backbone: Backbone, out: Path, count: int, *, seed: int = 0) -> int:
    """Write a corpus of `count` conversations at `out`.

    Return the number of conversations that were answered but dropped.

    Empty answers and those that do not end within MAX_TOKENS are dropped. A killed run resumes.
    Raises BlmError when `out` exists, or when the model gives no complete answer to most prompts.
    """
    if out.exists():
        raise BlmError(f"corpus folder '{out}' exists; move it away or name another one")
    if not 1 <= count <= MOST:
        raise BlmError(f"a replay corpus needs a count from 1 to {MOST:,}, got {count}")
    if not 0 <= seed < 2**32:
        raise BlmError(f"seed is {seed}; it must be 0 to {2**32 - 1:,}")
    revision = backbone.fingerprint()[:16]
    shards = work_folder(shards_folder(out), SHARDS_KIND, {"replay": revision, "seed": seed})

    def answer(payload: tuple[int, Sequence[tuple[str, str]]]) -> Result:
        number, asked = payload
        prompts = [(Message("user", (prompt,)),) for _, prompt in asked]
        return {"answers": backbone.complete(prompts, max_tokens=MAX_TOKENS, seed=seed * 1_000_003 + number)}

    prompts, units = replay_prompts(seed), list[WorkUnit]()
    kept, answered = list[Conversation](), 0
    while len(kept) < count:
        if answered > 20 * count + 100 * BATCH:
            raise BlmError(f"only {len(kept)} of {answered} answers ended within {MAX_TOKENS} tokens")
        for _ in range(-(-(count - len(kept)) // BATCH)):
            part = list(itertools.islice(prompts, BATCH))
            units.append(WorkUnit(f"{revision}/{seed}/{MAX_TOKENS}/{len(units)}", (len(units), part)))
        done = run_units(answer, units, journal=shards / "journal.jsonl", workers=0, title="replay")
        asked = [prompt for unit in units for prompt in unit.payload[1]]
        answers = [answer for unit in units for answer in done[unit.key]["answers"]]
        answered, kept = len(answers), list(_conversations(asked, answers))
    unused = answered - len(kept)
    write_corpus(out, kept[:count])
    remove_shards(out)
    return unused


def _conversations(
    asked: Sequence[tuple[str, str]], answers: Sequence[tuple[str, bool]]
) -> Iterator[Conversation]:
    for number, ((group, prompt), (text, ended)) in enumerate(zip(asked, answers, strict=True)):
        if text and ended:
            yield Conversation(
                id=f"replay/{number}",
                group=group,
                source="replay",
                kinds=("replay",),
                messages=(Message("user", (prompt,)), Message("assistant", (text,))),
            )
