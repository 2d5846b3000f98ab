"""Dialogues are trained whole, independent turns apart, and excluded answers not at all."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from blm.backbone import Backbone
from blm.corpora import read_corpus, write_corpus
from blm.corpora.format.faults import RowError
from blm.corpora.format.messages import CORPUS_FILE, Conversation
from blm.corpora.format.validate import check_with_backbone
from blm.training.loop.distributed import Processes
from blm.training.sft.tokenize import TokenizationConfig, TokenizedExample, tokenize_conversation
from blm.training.sft.tokenize_corpora import CorpusTokenizer, TrainingSource
from blm.types import BlmError, Image, Message
from tests.support.backbones import MAKERS, build_nano


@pytest.fixture(scope="module", params=["nano", "qwen2.5", "smol"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return MAKERS[request.param]()


def dialogue(*losses: bool, words: str = "Answer", group: str = "g") -> Conversation:
    picture = Image(np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8))
    messages = []
    for number, loss in enumerate(losses):
        text = f"Why is he on the ground {number}?"
        messages += [
            Message("user", (picture, text) if number == 0 else (text,)),
            Message("assistant", (f"{words} {number}.",), loss),
        ]
    return Conversation(
        id=group, group=group, source="s", kinds=("k",) * len(losses), messages=tuple(messages)
    )


def tokens_of(
    backbone: Backbone, row: Conversation, *, independent: bool, limits: TokenizationConfig | None = None
) -> TokenizedExample:
    limits = limits or TokenizationConfig()
    made = tokenize_conversation(backbone, row.messages, limits, None, Counter(), independent=independent)
    assert made is not None
    return made


def learnt(backbone: Backbone, example: TokenizedExample) -> str:
    return str(backbone.processor.tokenizer.decode(example.tokens[example.loss_mask]))


def test_a_dialogue_is_one_text_by_default(backbone: Backbone) -> None:
    row = dialogue(True, True, True)
    made = tokens_of(backbone, row, independent=False)
    assert not made.segment_ids.any()
    apart = tokens_of(backbone, row, independent=True)
    assert set(apart.segment_ids) == {0, 1, 2, 3}
    off = TokenizationConfig(separate_turns=False)
    whole = tokens_of(backbone, row, independent=True, limits=off)
    assert np.array_equal(made.tokens, whole.tokens) and np.array_equal(made.loss_mask, whole.loss_mask)
    assert learnt(backbone, made).count("Answer") == learnt(backbone, apart).count("Answer") == 3


@pytest.mark.parametrize("losses", [(True, False), (False, True), (False, True, False, True)])
@pytest.mark.parametrize("independent", [True, False])
def test_an_excluded_answer_is_never_learnt(
    backbone: Backbone, losses: tuple[bool, ...], independent: bool
) -> None:
    made = tokens_of(backbone, dialogue(*losses), independent=independent)
    text = learnt(backbone, made)
    assert [f"Answer {number}." in text for number in range(len(losses))] == list(losses)
    seen = str(backbone.processor.tokenizer.decode(made.tokens))
    context = [f"Answer {number}." in seen for number in range(len(losses))]
    assert context == list(losses if independent else [True] * len(losses))


def test_a_conversation_of_excluded_answers_is_refused(backbone: Backbone) -> None:
    with pytest.raises(BlmError, match="no assistant turn to train on"):
        tokens_of(backbone, dialogue(False), independent=False)


def test_cutting_a_dialogue_leaves_no_example_without_loss() -> None:
    nano, counts = build_nano(["Why is he on the ground? Answer."]), Counter[str]()
    row = dialogue(False, True, words="Answer " * 40)
    limits = TokenizationConfig(max_length=100)
    assert tokenize_conversation(nano, row.messages, limits, None, counts) is None
    assert counts["dropped, too long"] == 1


def test_corpora_of_ours_are_separated_whether_they_say_so_or_not(tmp_path: Path) -> None:
    """Rows of earlier versions, which did not mark independence, keep their tokens and masks."""
    nano = build_nano(["Why is he on the ground? Answer."])
    row = dialogue(True, True, group="scene/panda/push_cube/7")
    write_corpus(tmp_path / "new", [Conversation(**{**vars(row), "independent": True})])
    stored = json.loads((tmp_path / "new" / CORPUS_FILE).read_text())
    assert stored.pop("independent") is True
    (tmp_path / "new" / CORPUS_FILE).write_text(json.dumps(stored) + "\n")
    rows = read_corpus(tmp_path / "new")
    processes = Processes.join(nano.model.device)
    tokenizer = CorpusTokenizer(nano, TokenizationConfig(), processes, skip_bad=False)
    (made,) = tokenizer.tokenize(TrainingSource.of_rows("s", rows, tmp_path / "new")).examples
    wanted = tokens_of(nano, row, independent=True)
    for name in ("tokens", "loss_mask", "segment_ids", "position_ids"):
        assert np.array_equal(getattr(made, name), getattr(wanted, name)), name
    (plain,) = tokenizer.tokenize(
        TrainingSource(name="s", conversations=[one.messages for one in rows], root=tmp_path / "new")
    ).examples
    assert not plain.segment_ids.any(), "without the mark a dialogue stays whole"


class Forgetful:
    """A backbone whose template strips the thoughts of all answers but the last, as Qwen3's does."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self.processor = backbone, backbone.processor

    def render(self, messages: tuple[Message, ...], *, prompt: bool) -> str:
        last = max(i for i, message in enumerate(messages) if message.role == "user")
        kept = [
            Message(m.role, (m.text.split("</think>")[-1],)) if m.role == "assistant" and i < last else m
            for i, m in enumerate(messages)
        ]
        return self.backbone.render(kept, prompt=prompt)

    def process(self, *args: object, **kwargs: object) -> object:
        return self.backbone.process(*args, **kwargs)  # type: ignore[arg-type]


def test_a_template_that_strips_old_thoughts_suits_turns_that_are_trained_apart(tmp_path: Path) -> None:
    nano = build_nano(["Why is he on the ground? Answer. think"])
    row = dialogue(True, True, words="<think>he fell</think>Answer")
    apart = Conversation(**{**vars(row), "independent": True})
    check_with_backbone(apart, tmp_path, Forgetful(nano), [])  # type: ignore[arg-type]
    with pytest.raises(RowError, match="the chat template rewrites the answer"):
        check_with_backbone(row, tmp_path, Forgetful(nano), [])  # type: ignore[arg-type]
    last = dialogue(False, True, words="<think>he fell</think>Answer")
    check_with_backbone(last, tmp_path, Forgetful(nano), [])  # type: ignore[arg-type]
