"""The corpus format: a folder with `corpus.jsonl` and the media that it references.

A line is one conversation in the OpenAI content-part format: `{"id", "group", "source", "kinds":
[...], "messages": [{"role", "content": [{"type": "text", "text"} | {"type": "image_url",
"image_url": {"url": "images/ab12.png"}}]}, ...]}`. A content may be a plain string. URLs are media
references below the folder: an image, or a video frame `clips/a.mp4#t=1.25` (see blm.media). An
optional system turn comes first, then user and assistant turns alternate, and the last is an
answer.

Rows with free questions also have "facts": the key facts of each answer, or null. A message with
"loss": false (or another switch of blm.corpora.format.loss) is context: training does not learn it.
"independent": true says that no turn of the row refers to another one, so that each may be trained
and asked as if it were alone; otherwise every turn follows all earlier ones.

Only "messages" is required, so that rows of other programs are valid. Defaults: id "row-<line>";
source "messages"; group "<source>/<first media file>", or else the id; the source's name as kind of
each answer; "independent" as `always_independent` tells. Rows about our simulated scenes also have
"training": "plain" or "randomized". This module reads the format, and blm.corpora.format.writing
writes it. A row that violates it is a `RowError` (see blm.corpora.format.faults).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, get_args

from blm.corpora.format.facts import FREE, read_facts
from blm.corpora.format.faults import RowError
from blm.corpora.format.loss import read_loss, read_row_loss
from blm.corpora.format.unsupported import THOUGHTS, require_supported, require_supported_turn
from blm.media import split_time
from blm.seeds import count_reserved_seeds
from blm.types import BlmError, Image, KeyFacts, Message, Question, Scorer, Training

CORPUS_FILE = "corpus.jsonl"
ROLES = ("system", "user", "assistant")
MEDIA_KEYS = ("image", "images", "video", "videos", "audio", "audios")


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A dialogue whose assistant turns are the reference answers."""

    id: str
    group: str
    """Conversations about the same scene share a group: 'scene/<robot>/<task>/<seed>'."""
    source: str
    kinds: tuple[str, ...]
    """Question kinds, one per assistant turn."""
    messages: tuple[Message, ...]
    training: Training = "unknown"
    """Whether its simulated scenes were randomized; unknown for all other conversations."""
    facts: tuple[KeyFacts | None, ...] = ()
    """Key facts of each assistant turn, None where the question is not free; empty if none is."""
    independent: bool = False
    """Whether no turn refers to another one; only then may turns be trained or asked apart."""

    @property
    def learnt(self) -> tuple[bool, ...]:
        """Whether training learns the answer of each turn."""
        return tuple(message.loss for message in self.messages if message.role == "assistant")

    @property
    def media(self) -> tuple[Image, ...]:
        return tuple(image for message in self.messages for image in message.images)

    def turns(self) -> Iterator[tuple[str, Message, Message]]:
        """Yield kind, question and answer of each turn.

        A question includes all images shown so far.
        """
        shown: tuple[str | Image, ...] = ()
        body = [message for message in self.messages if message.role != "system"]
        for kind, asked, answer in zip(self.kinds, body[::2], body[1::2], strict=True):
            yield kind, Message("user", (*shown, *asked.content)), answer
            shown = (*shown, *asked.content[: end_of_pictures(asked)])

    def select(self, turns: Sequence[int]) -> Conversation:
        """Return the conversation with these turns only.

        The first of them gets all earlier images.
        """
        wanted = set(turns)
        kept = [m for m in self.messages if m.role == "system"]
        pending: tuple[str | Image, ...] = ()
        body = [message for message in self.messages if message.role != "system"]
        for turn, (asked, answer) in enumerate(zip(body[::2], body[1::2], strict=True)):
            if turn in wanted:
                kept += [replace(asked, content=(*pending, *asked.content)), answer]
                pending = ()
            else:
                pending = (*pending, *asked.content[: end_of_pictures(asked)])
        kinds = tuple(kind for turn, kind in enumerate(self.kinds) if turn in wanted)
        facts = tuple(facts for turn, facts in enumerate(self.facts) if turn in wanted)
        return replace(self, kinds=kinds, messages=tuple(kept), facts=facts)

    def without_loss(self, turns: Collection[int]) -> Conversation:
        """Return the conversation with the answers of these turns as context only."""
        numbers = count()
        messages = tuple(
            replace(m, loss=m.loss and next(numbers) not in turns) if m.role == "assistant" else m
            for m in self.messages
        )
        return replace(self, messages=messages)

    def questions(self) -> Iterator[Question]:
        """Yield each turn whose answer is learnt as a separate question.

        It follows the images shown so far or, unless the turns are independent, all earlier turns.
        """
        system = tuple(message for message in self.messages if message.role == "system")
        for turn, (kind, asked, answer) in enumerate(self.turns()):
            if not answer.loss:
                continue
            scorer = scorer_of(kind)
            before = self.messages[: len(system) + 2 * turn + 1]
            yield Question(
                id=f"{self.id}/{turn}",
                kind=kind,
                messages=(*system, asked) if self.independent else before,
                answer=without_thought(answer.text),
                group=self.group,
                scorer=scorer,
                options=options_of(asked.text) if scorer == "choice" else (),
                facts=self.facts[turn] if self.facts else None,
            )


def end_of_pictures(message: Message) -> int:
    """Return the number of content parts up to and including the last image."""
    return 1 + max((i for i, part in enumerate(message.content) if isinstance(part, Image)), default=-1)


THOUGHT_PATTERN = re.compile(r"\A\s*<think>.*?</think>\s*", re.DOTALL)


def without_thought(answer: str) -> str:
    """Return an answer without its thought; only this part is scored."""
    return THOUGHT_PATTERN.sub("", answer, count=1)


def with_thought(thought: str, answer: str) -> str:
    """Return an answer with its thought in front, if there is one."""
    return f"<think>{thought}</think>{answer}" if thought else answer


def scorer_of(kind: str) -> Scorer:
    """Return the scorer of a question kind, which follows from its name."""
    if kind.startswith(FREE):
        return "facts"
    for beginning in ("point", "box", "metric"):
        if kind.startswith(beginning):
            return beginning
    return "choice" if kind.endswith("_choice") else "exact"


def options_of(question: str) -> tuple[str, ...]:
    """Return the options of a multiple choice: the lines "(A) ...", "(B) ..."."""
    return tuple(re.findall(r"^\([A-Z]\) (.+)$", question, re.MULTILINE))


# --- reading ------------------------------------------------------------------------------------------------


def corpus_file(folder: Path) -> Path:
    """Return the file of a corpus. Raises BlmError for a folder that is not a corpus."""
    path = folder / CORPUS_FILE
    if not path.is_file():
        raise BlmError(
            f"'{folder}' is not a corpus folder: {CORPUS_FILE} is missing; create one with `blm corpus`"
        )
    return path


def scan_corpus(folder: Path) -> Iterator[tuple[int, Conversation | RowError]]:
    """Yield the number of each line and its conversation, or the fault of that line.

    Media are not opened, and blank lines are skipped. Raises BlmError for a folder that is not a
    corpus.
    """
    path = corpus_file(folder)
    lines: dict[str, int] = {}
    with path.open("rb") as file:  # bytes, because text files are also split at U+2028
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = parse_row(parse_json_line(line), number)
                if (first := lines.setdefault(row.id, number)) != number:
                    raise RowError("duplicate id", f"'{row.id}' is also line {first}")
                yield number, row
            except RowError as error:
                yield number, error


def read_corpus(folder: Path) -> list[Conversation]:
    """Read a corpus.

    Raises BlmError that names file, line and rule for a row that violates the format.
    """
    rows = []
    for number, row in scan_corpus(folder):
        if isinstance(row, RowError):
            raise BlmError(f"{folder / CORPUS_FILE}:{number}: {row}") from row
        rows.append(row)
    return rows


def reserved_scenes(rows: Iterable[Conversation]) -> dict[str, int]:
    """Return purpose -> number of our scenes in these rows that are reserved for it."""
    groups = {tuple(row.group.split("/")) for row in rows}
    scenes = {group for group in groups if len(group) == 4 and group[0] in ("scene", "episode")}
    return count_reserved_seeds(int(group[3]) for group in scenes if group[3].isdigit())


TEACHING = ("control", "scan")
"""Prefixes of the kinds of teaching turns, whose long answers are not evaluated."""


def read_questions(folder: Path, *, free: bool = False) -> list[Question]:
    """Return the questions of a corpus without teaching turns: the closed ones, or the free ones.

    Raises BlmError as `read_corpus` does.
    """
    every = [q for row in read_corpus(folder) for q in row.questions() if not q.kind.startswith(TEACHING)]
    return [question for question in every if (question.scorer == "facts") == free]


def parse_json_line(line: bytes) -> Any:
    """Parse one line of a JSONL file.

    Raises RowError for malformed JSON and a truncated last line.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = "malformed JSON" if line.endswith(b"\n") else "truncated last line"
        raise RowError(reason, str(error).splitlines()[0]) from None


def parse_row(row: Any, number: int) -> Conversation:
    """Return the conversation of one row. `number` names a row without id. Raises RowError."""
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        raise RowError("malformed row", "it is not an object with a list 'messages'")
    if beside := [key for key in MEDIA_KEYS if row.get(key)]:
        raise RowError(
            "wrong media count",
            f"it has media outside the messages ({', '.join(beside)}); convert it with `blm corpus convert`",
        )
    require_supported(row)
    if row.get("objects"):
        raise RowError(
            "unclear coordinates", "'objects' of the row; `blm corpus convert` puts them into texts"
        )
    messages = tuple(_message(message) for message in row["messages"])
    masked = read_row_loss(row, [message.role for message in messages])
    messages = tuple(replace(m, loss=m.loss and kept) for m, kept in zip(messages, masked, strict=True))
    check_turns(messages)
    identity = _text(row, "id", f"row-{number}")
    source = _text(row, "source", "messages")
    answers = sum(message.role == "assistant" for message in messages)
    kinds = row.get("kinds", [source] * answers)
    if not isinstance(kinds, list) or not all(isinstance(kind, str) and kind for kind in kinds):
        raise RowError("malformed row", f"'kinds' is {kinds!r}, not a list of names")
    if len(kinds) != answers:
        raise RowError("wrong number of kinds", f"{len(kinds)} kinds for {answers} assistant turns")
    files = [split_time(str(image.path))[0] for message in messages for image in message.images]
    group = _text(row, "group", f"{source}/{files[0]}" if files else identity)
    training = row.get("training", "unknown")
    if training not in get_args(Training):
        valid = ", ".join(get_args(Training))
        raise RowError("malformed row", f"'training' is {training!r}; valid: {valid}")
    return Conversation(
        id=identity,
        group=group,
        source=source,
        kinds=tuple(kinds),
        messages=messages,
        training=training,
        facts=read_facts(row.get("facts"), [kind.startswith(FREE) for kind in kinds]),
        independent=_independent(row, identity, group),
    )


OURS = re.compile(r"(scene|episode)/[^/]+/[^/]+/-?\d+")
"""Group of a row about one of our own scenes: robot, task and seed."""


def always_independent(identity: str, group: str) -> bool:
    """Return whether a row that says nothing about it has independent turns.

    These are the rows that this program builds itself, also those that earlier versions built,
    which did not mark them: questions about our scenes and episodes, easy-VQA and LeRobotDatasets.
    """
    return bool(OURS.fullmatch(group)) or identity.startswith(("easy_vqa/", "lerobot/"))


def _independent(row: dict[str, Any], identity: str, group: str) -> bool:
    value = row.get("independent", always_independent(identity, group))
    if not isinstance(value, bool):
        raise RowError("malformed row", f"'independent' is {value!r}, not true or false")
    return value


def check_turns(messages: Sequence[Message]) -> None:
    """Raise RowError if the turns are out of order or one of them is empty."""
    roles = [message.role for message in messages]
    body = roles[1:] if roles[:1] == ["system"] else roles
    if not body or body != ["user", "assistant"] * (len(body) // 2):
        raise RowError("roles out of order", ", ".join(roles) or "no turns")
    for turn, message in enumerate(messages):
        blank = not without_thought(message.text).strip()
        if message.role == "assistant" and (blank or message.images):
            raise RowError("empty answer", f"turn {turn}" + (" has an image" if message.images else ""))
        if message.role == "user" and blank and not message.images:
            raise RowError("empty question", f"turn {turn}")
    if not any(message.loss for message in messages if message.role == "assistant"):
        raise RowError("nothing to learn", "all answers are excluded")


def _message(message: Any) -> Message:
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        raise RowError("malformed row", f"a message is {str(message)[:60]!r}, no role with content")
    require_supported_turn(message)
    if thought := [key for key in THOUGHTS if message.get(key)]:
        raise RowError(
            "unsupported content", f"'{thought[0]}' of a turn; `blm corpus convert` puts it in <think>"
        )
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise RowError("unknown role", f"role {role!r}")
    if not isinstance(content, str | list):
        raise RowError("malformed row", f"a content is {type(content).__name__}, neither text nor list")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    loss = read_loss(message) or role != "assistant"
    return Message(role, tuple(_part(part) for part in parts), loss)


def _part(part: Any) -> str | Image:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return check_text(part.get("text"))
    if kind == "image_url":
        holder = part.get("image_url")
        url = holder.get("url") if isinstance(holder, dict) else None
        if not isinstance(url, str) or not url:
            raise RowError("malformed row", f"an image_url is {holder!r}, it needs a 'url'")
        if unread := [f"{key} {value!r}" for key, value in settings_of(part)]:
            raise RowError(
                "unsupported setting", f"{', '.join(unread)}; `blm corpus convert messages` applies settings"
            )
        return Image(path=url)
    raise RowError("unsupported content", f"a part of type {kind!r}; valid: text, image_url")


SETTINGS = (
    *("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width", "detail"),
    *("fps", "nframes", "num_frames", "min_frames", "max_frames", "video_start", "video_end"),
    *("sample_fps", "raw_fps", "crop", "start", "end", "start_time", "end_time"),
)
"""Keys of a content part that say how its picture or video is to be shown."""


def settings_of(part: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the settings of a content part, also those beside its url, that change anything."""
    holders = [part, *(value for value in part.values() if isinstance(value, Mapping))]
    found = [(key, value) for holder in holders for key, value in holder.items() if key in SETTINGS]
    return [(key, value) for key, value in found if value is not None and (key, value) != ("detail", "auto")]


def check_text(text: Any) -> str:
    """Return `text`.

    Raises RowError for another type, and for a lone surrogate (half a character).
    """
    if not isinstance(text, str):
        raise RowError("malformed row", f"a text is {type(text).__name__}")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RowError(
                "malformed row", f"a text contains a lone surrogate (half a character): {text[:40]!a}"
            ) from None
    return text


def _text(row: dict[str, Any], key: str, default: str) -> str:
    value = row.get(key, default)
    if not isinstance(value, str) or not value:
        raise RowError("malformed row", f"'{key}' is {value!r}, no text")
    return check_text(value)
