"""Validate a whole corpus before training: every fault with file and line, counted by reason.

Without a backbone, the format is checked and every image and video frame is decoded. With a
backbone, the prompts are also checked as the model would read them. Training requires a corpus
without faults; with `skip_bad`, it uses the rows that `clean_corpus` keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import track

from blm.corpora.format.faults import Fault, RowError, count_faults
from blm.corpora.format.messages import CORPUS_FILE, Conversation, scan_corpus
from blm.corpora.format.perceptual_hash import MediaHasher
from blm.corpora.format.turns import Messages, is_learnt, split_turns
from blm.corpora.format.validated import require_clean
from blm.media import load_pixels
from blm.types import BlmError

if TYPE_CHECKING:
    from blm.backbone import Backbone


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The result of validating a corpus."""

    folder: Path
    rows: int
    faults: tuple[Fault, ...]
    """The first fault of each faulty row."""

    @property
    def counts(self) -> dict[str, int]:
        """Reason -> number of rows."""
        return count_faults(self.faults)

    @property
    def clean(self) -> bool:
        return not self.faults and self.rows > 0


def validate_corpus(
    folder: Path, *, backbone: Backbone | None = None, max_tokens: int | None = None
) -> Validation:
    """Check every row of a corpus; `max_tokens` limits a conversation in tokens of the backbone.

    Raises BlmError for a folder that is not a corpus, and for a token limit without a backbone.
    """
    rows, faults = 0, []
    for _, fault in _check(folder, backbone, max_tokens):  # one at a time: a corpus may not fit in memory
        rows += 1
        faults += [fault] if fault is not None else []
    return Validation(folder=folder, rows=rows, faults=tuple(faults))


def clean_corpus(
    folder: Path,
    *,
    backbone: Backbone | None = None,
    max_tokens: int | None = None,
    skip_bad: bool = False,
) -> list[Conversation]:
    """Return the conversations of a corpus without faults.

    With `skip_bad`, faulty rows are skipped and summarised on stderr. Otherwise a BlmError gives
    the counts and places of each reason. Raises BlmError if no row is left.
    """
    checked = list(_check(folder, backbone, max_tokens))
    faults = tuple(fault for _, fault in checked if fault is not None)
    require_clean(folder, len(checked), faults, count_faults(faults), skip_bad=skip_bad)
    return [row for row, fault in checked if row is not None and fault is None]


def _check(
    folder: Path, backbone: Backbone | None, max_tokens: int | None
) -> Iterator[tuple[Conversation | None, Fault | None]]:
    """Yield every row, or its fault."""
    if max_tokens is not None and backbone is None:
        raise BlmError(f"a limit of {max_tokens} tokens needs a backbone to count them: --backbone NAME")
    hasher = MediaHasher(folder)
    reserved = reserved_tokens(backbone) if backbone is not None else []
    rows = track(scan_corpus(folder), f"checking {folder.name}", console=Console(stderr=True))
    for number, row in rows:
        try:
            if isinstance(row, RowError):
                raise row
            hasher.hashes(row.media)
            if backbone is not None:
                check_with_backbone(row, folder, backbone, reserved, max_tokens)
            yield row, None
        except RowError as error:
            yield None, Fault(f"{folder / CORPUS_FILE}:{number}", error.reason, error.detail)


def reserved_tokens(backbone: Backbone) -> list[str]:
    """Return the texts of the special tokens of the backbone's tokenizer."""
    tokenizer = backbone.processor.tokenizer
    added = [str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*added, *tokenizer.all_special_tokens, backbone.processor.image_token})


def check_with_backbone(
    row: Conversation,
    folder: Path,
    backbone: Backbone,
    reserved: Sequence[str],
    max_tokens: int | None = None,
) -> None:
    """Raise RowError unless the backbone can be trained on the whole conversation.

    No text may contain one of the `reserved` tokens, every answer must follow its prompt in the
    rendered text, there must be one image feature per placeholder, and the tokens must fit
    `max_tokens` and the model's context.
    """
    check_reserved(row, reserved)
    check_answers(row, backbone)
    tokens = count_tokens(row, folder, backbone)
    if max_tokens is not None and tokens > max_tokens:
        raise RowError("too long", f"{tokens} tokens of at most {max_tokens}")


def check_reserved(row: Conversation, reserved: Sequence[str]) -> None:
    """Raise RowError for a text with one of the `reserved` tokens."""
    for turn, message in enumerate(row.messages):
        if found := [token for token in reserved if token in message.text]:
            raise RowError("reserved token in text", f"turn {turn} of the {message.role} has {found[0]!r}")


def check_answers(row: Conversation, backbone: Backbone) -> None:
    """Raise RowError unless each learnt answer follows its prompt in the rendered text."""
    for messages in split_turns(row.messages) if row.independent else [row.messages]:
        _check_answers(messages, backbone)


def _check_answers(messages: Messages, backbone: Backbone) -> None:
    text = backbone.render(messages, prompt=False)
    for turn, message in enumerate(messages):
        if is_learnt(message):
            asked = backbone.render(messages[:turn], prompt=True)
            if not text.startswith(asked) or not text[len(asked) :].lstrip().startswith(message.text.strip()):
                raise RowError(
                    "answer not learnt", f"the chat template rewrites the answer {message.text[:40]!r}"
                )


def count_tokens(row: Conversation, folder: Path, backbone: Backbone) -> int:
    """Return the length of a conversation in tokens, images included.

    Raises RowError if it exceeds the context, or if placeholders and image features differ.
    """
    images = [load_pixels(image, folder) for image in row.media]
    try:
        text = backbone.render(row.messages, prompt=False)
        return int(backbone.process([text], images)["input_ids"].shape[1])
    except ValueError as error:  # of Backbone.check, or of the model's own processor
        long = "the context holds" in str(error)
        raise RowError("too long" if long else "placeholders differ from features", str(error)) from None
