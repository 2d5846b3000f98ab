"""Benchmarks that ask for points in an image; the score is the fraction of points inside a mask.

Published questions ask for different conventions of coordinates. We remove that request and ask for
our convention, integers from 0 to 1000 over width and height, y down; `with_convention` asks for
another one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from blm.evaluation.digital.benchmarks.layout import Row
from blm.types import Image, Message, Question, lookup

_SIDES = "the width (x, to the right) and the height (y, downwards) of the picture."
REQUESTS: Mapping[str, str] = {
    "thousandths": f"{{points}}. Coordinates are whole numbers from 0 to 1000 over {_SIDES}",
    "unit": f"{{points}}. Coordinates are numbers from 0 to 1 over {_SIDES}",
    "pixels": f"{{points}}. Coordinates are pixels, counted over {_SIDES}",
    "yx1000": f"{{points}}, y before x. Coordinates are whole numbers from 0 to 1000 over {_SIDES}",
}
"""The request for each convention of coordinates.py."""
SEVERAL = "Answer with a list of points only: {points}"
ONE = "Answer with one point only: {points}"
_FORMS = {SEVERAL: "[(x1, y1), (x2, y2), ...]", ONE: "[(x, y)]"}
_THEIRS = re.compile(r"Your answer should be formatted as .*?(?:points in the image\.|$)", re.DOTALL)


def request(ask: str, convention: str = "thousandths") -> str:
    """Return the sentences that ask for points; `ask` is SEVERAL or ONE."""
    form = _FORMS[ask]
    if convention == "yx1000":
        form = re.sub(r"\((x\d?), (y\d?)\)", r"(\2, \1)", form)
    return ask.format(points=lookup("coordinates", convention, REQUESTS).format(points=form))


def with_convention(question: Question, convention: str) -> Question:
    """Return a question of this module that asks for another convention of coordinates."""
    *before, last = question.messages
    *pictures, text = last.content
    ask = ONE if request(ONE) in str(text) else SEVERAL
    changed = str(text).replace(request(ask), request(ask, convention))
    return replace(question, messages=(*before, Message(last.role, (*pictures, changed))))


def point_question(
    row: Row, name: str, *, kind: str, text: str, ask: str, picture: Image, mask: Image
) -> Question:
    """Return a question whose points are right where `mask` is white.

    `text` may contain the published request for coordinates, which is removed.
    """
    asked = " ".join(_THEIRS.sub(" ", text).split())
    if not asked:
        raise row.error("the question has no words but its request for coordinates")
    return Question(
        id=f"{kind}/{name}",
        kind=kind,
        messages=(Message("user", (picture, f"{asked} {request(ask)}")),),
        answer=str(mask.path),
        group=str(picture.path),
        scorer="points",
        mask=mask,
    )
