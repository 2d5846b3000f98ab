"""The wordings of instructions: many to train on, and others, fixed, that only tests use.

`TRAINING_WORDINGS` are expanded from the patterns of a small grammar. `TEST_WORDINGS` are the
paraphrases of the protocol `suite24-plus`; none of them, nor any held-out phrasing, is a training
wording.

Besides the suite's tasks there are six *words* tasks, in whose scenes only the words decide.
Their wordings have slots: `{color}` of the object to move (`{a}` onto `{b}` in a stack), `{bin}`,
and `{top}`, the end of the peg that points up. Slots are filled with colours. In the wordings of
pushing and pulling, the verb or the direction tells the one from the other (except in "Slide the
blue block to the round target", a phrasing of the suite). Directions are the robot's: "ahead" and
"forward" lead away from it, "back" and "near" towards it. No wording says "behind" or "in front
of", which people understand both ways.
"""

from blm.tasks.wordings.grammar import expand
from blm.tasks.wordings.suite_paraphrases import SUITE_PARAPHRASES
from blm.tasks.wordings.training import TRAINING_WORDINGS
from blm.tasks.wordings.words_paraphrases import HELD_OUT_WORDINGS, WORDS_PARAPHRASES

LEVELS = {
    1: "synonyms of the object",
    2: "synonyms of the verb",
    3: "other syntax",
    4: "long-winded",
    5: "with a distracting clause",
}
"""Level of a test wording -> how it differs from training wordings."""
TEST_WORDINGS = {**SUITE_PARAPHRASES, **WORDS_PARAPHRASES}
"""Task -> level -> wordings for tests only."""

__all__ = ["HELD_OUT_WORDINGS", "LEVELS", "TEST_WORDINGS", "TRAINING_WORDINGS", "expand"]
