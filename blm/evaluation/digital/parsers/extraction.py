"""Answer extraction: from a model's raw text to its answer, or to None. Nothing is guessed.

`final_answer` takes the answer out of the raw text; one reader per type of answer reads it.
Places and lengths are read by coordinates.py. The readers' precision and recall on answers that
were labelled by hand is measured by benchmarks/extraction.py.
"""

from blm.evaluation.digital.parsers.choice import read_choice
from blm.evaluation.digital.parsers.quantities import read_count
from blm.evaluation.digital.parsers.text import final_answer, normalise, short_answer, without_reasoning
from blm.evaluation.digital.parsers.words import read_words
from blm.evaluation.digital.parsers.yes_no import read_yes_no

__all__ = [
    "final_answer", "normalise", "read_choice", "read_count", "read_words", "read_yes_no",
    "short_answer", "without_reasoning",
]  # fmt: skip
