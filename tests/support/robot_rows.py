"""A corpus of questions about the frames of robot episodes, as ShareRobot asks them, in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image


def write_robot_rows(
    folder: Path, *, episodes: int = 4, questions: int = 3, frames: int = 2, side: int = 56
) -> Path:
    """Write a corpus with a row for each question; the frames of an episode are shared."""
    rng = np.random.default_rng(0)
    (folder / "frames").mkdir(parents=True)
    rows = []
    for episode in range(episodes):
        names = [f"frames/{episode}-{number}.png" for number in range(frames)]
        for name in names:
            pixels = rng.integers(0, 256, (side, side + 28 * (episode % 2), 3), np.uint8)
            PIL.Image.fromarray(pixels).save(folder / name)
        for question in range(questions):
            rows.append(row(f"{episode}/{question}", names, f"Is it {question}?", "no" * (question + 1)))
    (folder / "corpus.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return folder


def row(name: str, media: list[str], question: str, answer: str, **fields: Any) -> dict[str, Any]:
    """Return a row in the corpus format."""
    shown = [{"type": "image_url", "image_url": {"url": path}} for path in media]
    asked = {"role": "user", "content": [*shown, {"type": "text", "text": question}]}
    return {"id": name, "messages": [asked, {"role": "assistant", "content": answer}], **fields}
