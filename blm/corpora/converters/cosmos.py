"""Converter of Cosmos-Reason1: RoboVQA, BridgeV2, HoloAssist and AgiBot.

Each set is a folder with JSON arrays of {"video": "clips/<name>.mp4", "conversations":
[role/content]} (SFT sets: system, user, assistant) or {"video", "qa_pairs": {"question",
"index2ans", "answer"}} (RL and benchmark sets: multiple choice). Texts have no media tags; the clip
belongs to the first question. Only the RoboVQA clips are in the hub's repository, so clips are
found by path or, as upstream does, by file name.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from blm.corpora.converters.media_files import MediaFolders
from blm.corpora.converters.placing import place_media
from blm.corpora.converters.reading import read_rows
from blm.corpora.converters.report import Tally
from blm.corpora.converters.rows import ConverterConfig, Rows, conversation, media_root, require_field
from blm.corpora.converters.turns import Turn, read_turns
from blm.corpora.format.faults import RowError
from blm.corpora.format.messages import check_text, check_turns
from blm.media import VIDEOS

SYSTEM = "Answer the questions."
OPTION_PROMPT = "Answer with the option's letter from the given choices directly."


def cosmos_reason1(source: Path, settings: ConverterConfig, tally: Tally) -> Rows:
    """Convert the rows of one or more sets."""
    root = media_root(source, settings)
    name = settings.source or "cosmos_reason1"
    folders = MediaFolders(source, settings, tally)
    uses = {"video": "frames", "conversations": "turns", "qa_pairs": "choices"}

    @cache
    def clips() -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for path in sorted(path for path in root.rglob("*") if path.suffix.lower() in VIDEOS):
            found.setdefault(path.name, []).append(path.relative_to(root).as_posix())
        return found

    for where, identity, row in read_rows(source, tally):
        try:
            if isinstance(row, RowError):
                raise row
            video = require_field(row, "video", str)
            clip = video if (root / video).is_file() else _by_name(video, clips())
            part = Path(where).parent.name  # the set: a folder of the hub's repository
            for number, (kind, turns) in enumerate(_dialogues(row, part)):
                placed = place_media(turns, {"video": [clip]}, "first")
                messages = tuple(folders.message(turn, [root]) for turn in placed)
                check_turns(messages)
                key = f"cosmos_reason1/{identity}" + (f".{number}" if number else "")
                if not number:
                    tally.count(row, uses)
                yield where, conversation(key, messages, name, group=f"{part}/{video}", kind=kind)
        except RowError as error:
            yield where, error


def _by_name(video: str, clips: Mapping[str, list[str]]) -> str:
    found = clips.get(Path(video).name, [])
    if len(found) != 1:
        detail = f"also called so: {', '.join(found[:3])}" if found else "nor is a clip of that name"
        raise RowError("media missing", f"{video} is not there; {detail}")
    return found[0]


def _dialogues(row: Mapping[str, Any], part: str) -> list[tuple[str, list[Turn]]]:
    """Return kind and turns of each dialogue in a row.

    Each multiple choice is a separate dialogue.
    """
    if "qa_pairs" not in row:
        require_field(row, "conversations", list)
        turns, _ = read_turns(row, Tally())
        thinks = any("<think>" in str(turn.content) for turn in turns if turn.role == "assistant")
        return [(f"{part}_reasoning" if thinks else part, turns)]
    pairs = require_field(row, "qa_pairs", (list, dict))
    return [(f"{part}_choice", _choice(pair)) for pair in (pairs if isinstance(pairs, list) else [pairs])]


def _choice(pair: Any) -> list[Turn]:
    options = require_field(pair, "index2ans", dict)
    question = require_field(pair, "question", str)
    answer = require_field(pair, "answer" if "answer" in pair else "correct_answer", str)
    if answer not in options:
        raise RowError("malformed row", f"answer {answer!r} is no option; there are {', '.join(options)}")
    lines = [question, *(f"({letter}) {text}" for letter, text in sorted(options.items())), OPTION_PROMPT]
    asked = check_text("\n".join(map(str, lines)))
    return [Turn("system", SYSTEM), Turn("user", asked), Turn("assistant", answer)]
