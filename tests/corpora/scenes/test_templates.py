"""The wordings of questions: many that are trained on, and held-out ones made of the same words."""

from __future__ import annotations

import re
import string

import pytest

from blm.corpora.scenes.templates import TEMPLATES
from blm.tasks.wordings import expand

SEEN, HELD_OUT = (
    {
        kind: [text for pattern in getattr(w, part) for text in expand(pattern)]
        for kind, w in TEMPLATES.items()
    }
    for part in ("seen", "held_out")
)


def words(texts):
    return {word for text in texts for word in re.findall(r"\{?\w+", text.lower())}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_wordings_of_a_kind(kind):
    seen, held_out = SEEN[kind], HELD_OUT[kind]
    both = seen + held_out
    assert 8 <= len(seen) <= 40 and 4 <= len(TEMPLATES[kind].seen) <= 9 and 1 <= len(held_out) <= 3
    assert len({*both}) == len(both)
    fields = [{name for _, name, _, _ in string.Formatter().parse(text) if name} for text in both]
    assert all(found == fields[0] for found in fields)
    for text in both:
        assert not re.search(r"[][|]|  | [?.,:]|^\s|\s$", text), text
        assert text[-1] in "?.}" and text[0].isupper(), text
        assert len(text.split()) <= 14, text


def test_held_out_wordings_are_new_but_of_known_words():
    seen = {text for texts in SEEN.values() for text in texts}
    held_out = {text for texts in HELD_OUT.values() for text in texts}
    assert not seen & held_out
    assert words(held_out) <= words(seen)


def test_a_question_tells_its_kind():
    kinds: dict[str, set[str]] = {}
    for kind, texts in SEEN.items():
        shared = re.sub(r"_(positive|negative|base|side|wrist)$", "", kind)
        for text in texts + HELD_OUT[kind]:
            kinds.setdefault(text, set()).add(shared)
    assert [text for text, names in kinds.items() if len(names) > 1] == []
    for text, (kind,) in kinds.items():
        assert ("{camera} view" in text) == (kind in ("point", "box")), text
        assert ("box" in text) == (kind == "box"), text
        vector = kind in ("metric_position", "metric_gripper_to_object", "metric_object_to_goal")
        assert ("cm" in text) == ("n cm" in text.lower()) == vector, text
