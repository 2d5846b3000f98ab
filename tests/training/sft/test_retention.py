"""What is kept of language: divergence and perplexity, replay, and instructions that a program can check."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from blm.backbone import Backbone, build_nano
from blm.corpora.curation import replay
from blm.corpora.format.messages import CORPUS_FILE, Conversation, read_corpus
from blm.corpora.format.writing import write_corpus
from blm.evaluation.digital.instructions import (
    run_instructions,
    summarise,
    verifiable_instructions,
)
from blm.training.caches.processes import ProcessGroup
from blm.training.loop.distributed import Processes
from blm.training.sft.retention import Retention, held_out_texts, read_texts
from blm.types import BlmError, Image, Message
from tests.support.backbones import MAKERS, picture
from tests.support.meeting import in_processes

TEXTS = ["The gripper moves to the red cube and closes.", "Is it done? Not yet.", "What can you do?", "x"]


def noisy(size: float) -> Backbone:
    backbone = build_nano()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.decoder.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return backbone


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_a_model_has_zero_divergence_from_itself(name: str) -> None:
    backbone = MAKERS[name]()
    found = Retention(backbone, TEXTS).measure(backbone)
    assert found.kl == found.kl_low == found.kl_high == found.nll_rise == 0.0
    assert found.perplexity == found.perplexity_base > 1.0


def test_numbers_equal_a_direct_computation_through_the_whole_model() -> None:
    base, tuned = build_nano(), noisy(0.05)
    retention = Retention(base, TEXTS, length=9)
    found = retention.measure(tuned)
    kls, losses = [], {"base": [], "tuned": []}
    for text in TEXTS:
        ids = base.processor.tokenizer(text, return_tensors="pt")["input_ids"][:, :9]
        if ids.shape[1] < 2:
            continue
        logs = {}
        for which, backbone in (("base", base), ("tuned", tuned)):
            with torch.no_grad():
                out = backbone.model(input_ids=ids, labels=ids)
            logs[which] = out.logits[0, :-1].log_softmax(-1)
            losses[which] += [float(out.loss)] * (ids.shape[1] - 1)
        kls += F.kl_div(logs["tuned"], logs["base"], log_target=True, reduction="none").sum(1).tolist()
    assert found.text_tokens == len(kls)
    assert found.kl == pytest.approx(sum(kls) / len(kls), rel=1e-4)
    for key, which in (("perplexity_base", "base"), ("perplexity", "tuned")):
        assert getattr(found, key) == pytest.approx(math.exp(sum(losses[which]) / len(kls)), rel=1e-4)
    assert found.nll_rise == pytest.approx(math.log(found.perplexity / found.perplexity_base), rel=1e-6)
    assert found.kl_low <= found.kl <= found.kl_high
    assert found.nll_rise_low <= found.nll_rise <= found.nll_rise_high


def test_a_uniform_model_diverges_by_log_v_minus_the_entropy() -> None:
    """KL(p || uniform) = log V - H(p), and the perplexity of the uniform model is V."""
    base, flat = build_nano(), build_nano()
    with torch.no_grad():
        flat.model.get_output_embeddings().weight.zero_()
    found = Retention(base, TEXTS).measure(flat)
    size = flat.model.get_output_embeddings().out_features
    assert found.perplexity == pytest.approx(size, rel=1e-5)
    entropy, count = 0.0, 0
    for text in TEXTS[:3]:
        ids = base.processor.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            log_p = base.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        entropy, count = entropy - float((log_p.exp() * log_p).sum()), count + len(log_p)
    assert found.kl == pytest.approx(math.log(size) - entropy / count, rel=1e-4)


def test_divergence_grows_with_noise_and_the_base_is_remembered() -> None:
    base = build_nano()
    retention = Retention(base, TEXTS)
    kls = [retention.measure(noisy(size)).kl for size in (0.0, 0.005, 0.02, 0.08)]
    assert kls[0] == 0.0 and kls == sorted(set(kls))
    base.model.train()
    with torch.no_grad():  # training goes on in the base's own memory
        base.model.get_output_embeddings().weight += 0.05
    assert retention.measure(base).kl > 0.0
    assert base.model.training


def test_other_tokens_and_empty_texts_are_refused(tmp_path: Path) -> None:
    retention = Retention(build_nano(), TEXTS)
    with pytest.raises(BlmError, match="different tokenizers"):
        retention.measure(build_nano(["quite another text about gripper and cube"] * 3))
    with pytest.raises(BlmError, match="two or more tokens"):
        Retention(build_nano(), [""])
    with pytest.raises(BlmError, match=r"cannot read .*absent\.txt"):
        read_texts(tmp_path / "absent.txt")


def test_a_text_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {i} " + "word " * i for i in range(30)]
    (tmp_path / "text.txt").write_text("\n\n".join(paragraphs))
    parts = read_texts(tmp_path / "text.txt", size=100)
    assert "".join(parts).split() == " ".join(paragraphs).split()
    assert all(len(part) >= 100 for part in parts[:-1]) and len(parts) > 5


def test_held_out_topics_are_no_replay_topics() -> None:
    held, used = replay.topic_texts(held_out=True), replay.topic_texts(held_out=False)
    assert not held.keys() & used.keys()
    assert not set(held.values()) & set(used.values())
    assert {*held.values(), *used.values()} == set(topics.values())
    assert min(len(held), len(used)) > 20
    assert held_out_texts() == list(held.values())
    asked = {group for group, _ in itertools.islice(replay.replay_prompts(0), 2000)}
    assert not asked & {f"replay/{name}" for name in held}


def test_replay_prompts_are_many_and_a_function_of_the_seed() -> None:
    first, same, other = (list(itertools.islice(replay.replay_prompts(s), 400)) for s in (3, 3, 4))
    assert first == same != other
    assert len({prompt for _, prompt in first}) == 400


class Halting:
    """A backbone whose answers all end, whatever it is asked, until it fails at a call."""

    def __init__(self, fail_at: int = 99, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.calls, self.fail_at, self.error = 0, fail_at, error

    def fingerprint(self) -> str:
        return "ab" * 32

    def complete(self, conversations, *, max_tokens, seed):
        self.calls += 1
        if self.calls == self.fail_at:
            raise self.error("no answer")
        texts = [f"{seed}: {messages[0].text}"[:max_tokens] for messages in conversations]
        return [(text, index % 4 != 0) for index, text in enumerate(texts)]


def test_a_replay_corpus_is_text_only_exact_in_number_and_resumes(tmp_path: Path) -> None:
    unused = replay.build_replay(Halting(), tmp_path / "a", 100, seed=5)  # type: ignore[arg-type]
    rows = read_corpus(tmp_path / "a")
    assert len(rows) == 100 and unused > 100 / 4
    assert {row.source for row in rows} == {"replay"}
    assert all([m.role for m in row.messages] == ["user", "assistant"] for row in rows)
    assert not any(message.images for row in rows for message in row.messages)
    with pytest.raises(KeyboardInterrupt):
        replay.build_replay(Halting(fail_at=3), tmp_path / "b", 100, seed=5)  # type: ignore[arg-type]
    again = Halting()
    replay.build_replay(again, tmp_path / "b", 100, seed=5)  # type: ignore[arg-type]
    assert (tmp_path / "b/corpus.jsonl").read_text() == (tmp_path / "a/corpus.jsonl").read_text()
    assert again.calls == Halting().calls + 3  # two of five batches were in the journal
    with pytest.raises(BlmError, match="exists"):
        replay.build_replay(again, tmp_path / "b", 100)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [2, 3])
def test_processes_write_the_replay_of_one_and_continue_what_any_number_began(
    tmp_path: Path, count: int
) -> None:
    wanted = replay.build_replay(Halting(), tmp_path / "a", 100, seed=5)  # type: ignore[arg-type]

    def build(name: str, fail_at: int = 99) -> list[Any]:
        backbones = [Halting(fail_at if rank else 99, BlmError) for rank in range(count)]

        def work(processes: Processes) -> tuple[int, int]:
            mine: Any = backbones[processes.rank]
            unused = replay.build_replay(mine, tmp_path / name, 100, seed=5, group=ProcessGroup(processes))
            return unused, mine.calls

        found = in_processes(count, work)
        if fail_at == 99:
            assert (tmp_path / name / CORPUS_FILE).read_text() == (tmp_path / "a" / CORPUS_FILE).read_text()
            assert not (tmp_path / f"{name}.shards").exists()
        return found

    found = build("b")
    assert [unused for unused, _ in found] == [wanted] * count
    assert sum(calls for _, calls in found) == 5 and max(calls for _, calls in found) <= 3
    complaints = build("c", fail_at=1)
    assert len({*complaints}) == 1 and "process 1 of" in complaints[0] and "no answer" in complaints[0]
    again: Any = Halting()
    alone = ProcessGroup(Processes(0, 1, torch.device("cpu")))
    assert replay.build_replay(again, tmp_path / "c", 100, seed=5, group=alone) == wanted
    assert (tmp_path / "c" / CORPUS_FILE).read_text() == (tmp_path / "a" / CORPUS_FILE).read_text()
    assert again.calls < 5 and not (tmp_path / "c.shards").exists()


def test_a_third_of_replay_asks_about_pictures_if_there_are_some(tmp_path: Path) -> None:
    write_corpus(
        tmp_path / "seen",
        [
            Conversation(
                id=f"{number}",
                group=f"{number}",
                source="seen",
                kinds=("seen",),
                messages=(Message("user", (Image(picture(number)), "?")), Message("assistant", ("!",))),
            )
            for number in range(5)
        ],
    )
    names = tuple(str(image.path) for row in read_corpus(tmp_path / "seen") for image in row.media)
    pictures = replay.Pictures(references=names, root=tmp_path / "seen")

    class Seeing(Halting):
        def complete(self, conversations, *, max_tokens, seed):
            images = [image for messages in conversations for image in messages[0].images]
            assert all(image.pixels is not None for image in images)
            return super().complete(conversations, max_tokens=max_tokens, seed=seed)

    def build(backbone: Halting, name: str) -> list[Conversation]:
        replay.build_replay(backbone, tmp_path / name, 60, max_tokens=40, pictures=pictures)  # type: ignore[arg-type]
        return read_corpus(tmp_path / name)

    rows = build(Seeing(), "a")
    shown = [row for row in rows if row.media]
    assert len(shown) == pytest.approx(20, abs=6) and {row.kinds for row in shown} == {("replay_picture",)}
    assert {image.path for row in shown for image in row.media} == set(names)
    assert all((tmp_path / "a" / str(image.path)).is_file() for row in shown for image in row.media)
    with pytest.raises(KeyboardInterrupt):
        build(Seeing(fail_at=2), "b")
    assert build(Seeing(), "b") == rows
    fewer = replay.Pictures(references=names[1:], root=tmp_path / "seen")
    with pytest.raises(KeyboardInterrupt):
        build(Seeing(fail_at=2), "c")
    with pytest.raises(BlmError, match=r"c\.shards"):
        replay.build_replay(Seeing(), tmp_path / "c", 60, max_tokens=40, pictures=fewer)  # type: ignore[arg-type]


def test_drawn_answers_depend_on_the_seed_alone() -> None:
    backbone, state = build_nano(), torch.get_rng_state()
    asked = [probe.question.messages for probe in verifiable_instructions()[:2]]
    drawn = [backbone.complete(asked, max_tokens=12, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), state)
    greedy = backbone.complete(asked, max_tokens=12)
    assert [text for text, _ in greedy] == backbone.answer_batch(asked, max_tokens=12)


def test_a_run_gives_rows_and_rates() -> None:
    class Parrot:
        def answer(self, messages, *, max_tokens):
            return "Paris"

    rows = run_instructions(Parrot())
    right = {row.question for row in rows if row.correct}
    assert "What is the capital of France?" in right and "What is the capital of Japan?" not in right
    found = summarise(rows)
    parts = [found[name].n for name in ("instructions", "knowledge", "dialogue")]
    assert found["all"].n == sum(parts) == len(rows) == 260 and parts[2] == 60
    assert found["all"].hits == len(right) and found["all"].low < found["all"].rate
