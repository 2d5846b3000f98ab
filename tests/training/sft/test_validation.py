"""A corpus is validated once: in parallel, resumably, named after its content; the lazy samples are
those of training in memory."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from blm.backbone import Backbone
from blm.backbone.outline import save_outline
from blm.corpora import read_corpus, validate_corpus
from blm.corpora.format import media_index, scan
from blm.corpora.format.validated import ValidatedCorpus
from blm.training.loop.distributed import DataShard, Processes
from blm.training.loop.loop import LoopConfig
from blm.training.sft import measure
from blm.training.sft.examples import BatchMaker, LazyExamples
from blm.training.sft.lora import Lora
from blm.training.sft.mixture_sampler import MixtureSampler, TokenizedSource
from blm.training.sft.sampling import sample_lengths, sampled_rows
from blm.training.sft.tokenize import TokenizationConfig, tokenize_conversation
from blm.training.sft.tokenize_corpora import CorpusTokenizer, TrainingSource
from blm.training.sft.train import Stage1Config, train_stage1
from blm.training.sft.validation import Validator
from blm.types import BlmError
from tests.support.backbones import MAKERS, tiny_qwen
from tests.support.meeting import in_processes
from tests.support.robot_rows import row, write_robot_rows

ALONE = Processes(0, 1, torch.device("cpu"))


def validate(corpus: Path, out: Path, backbone: Backbone | None, **fields: Any) -> ValidatedCorpus:
    limits = fields.pop("limits", TokenizationConfig())
    fields = {"processes": ALONE, "sample": 10, **fields}
    return Validator(backbone=backbone, limits=limits, out=out, **fields).validate(corpus)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_robot_rows(tmp_path / "robots")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(scan, "PART_BYTES", 700)
    monkeypatch.setattr(media_index, "FILES_PER_UNIT", 3)
    monkeypatch.setattr(measure, "ROWS_PER_UNIT", 5)
    yield


@pytest.mark.parametrize("name", MAKERS)
def test_lengths_without_pixels_are_those_of_training(name: str, corpus: Path, tmp_path: Path) -> None:
    backbone, limits = MAKERS[name](), TokenizationConfig(max_length=200)
    found = validate(corpus, tmp_path / "out", backbone, limits=limits)
    counts = Counter[str]()
    examples = [
        tokenize_conversation(backbone, one.messages, limits, corpus, counts) for one in read_corpus(corpus)
    ]
    index = found.open().places
    assert index["tokens"].tolist() == [0 if one is None else len(one) for one in examples]
    assert index["answers"].tolist() == [0 if one is None else one.loss_mask.sum() for one in examples]
    assert Counter(found.outcomes) == counts and not found.fault_counts


def test_rows_are_read_from_the_index(corpus: Path, tmp_path: Path, small_parts: None) -> None:
    found = validate(corpus, tmp_path / "out", None)
    rows = found.open()
    assert list(rows) == read_corpus(corpus) and rows[3:5] == read_corpus(corpus)[3:5]
    copy = ForkingPickler.loads(ForkingPickler.dumps(rows))
    assert copy[7] == rows[7] and len(ForkingPickler.dumps(rows)) < 1000
    assert rows.places.dtype.itemsize <= 200, "memory of a row"


def test_faults_are_those_of_the_serial_validation(corpus: Path, tmp_path: Path, small_parts: None) -> None:
    (corpus / "frames/0-0.png").write_bytes(b"no picture")
    (corpus / "frames/1-1.png").unlink()
    lines = (corpus / "corpus.jsonl").read_text().splitlines(keepends=True)
    lines[8] = "\n" + lines[8] + json.dumps(row("2/0", [], "Again?", "yes")) + "\n"
    lines.insert(4, json.dumps({"messages": [{"role": "user", "content": "Who?"}]}) + "\n")
    no_id = row("", [], "Hm?", "yes")
    del no_id["id"]
    (corpus / "corpus.jsonl").write_text("".join(lines) + json.dumps(no_id) + "\n" + '{"messages"')
    serial = validate_corpus(corpus)
    found = validate(corpus, tmp_path / "out", None)
    order = lambda fault: (fault.where, fault.reason)  # noqa: E731
    assert sorted(found.faults, key=order) == sorted(serial.faults, key=order)
    assert dict(found.fault_counts) == serial.counts and found.rows == serial.rows
    assert [one.id for one in found.open()][-1] == "row-16", "a row without id is named by its line"
    with pytest.raises(BlmError, match=r"9 of 16 rows .*\n.*media unreadable"):
        found.require_clean(skip_bad=False)
    found.require_clean(skip_bad=True)


def test_a_validation_is_kept_until_something_changes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qwen, ran = tiny_qwen("2.5"), list[str]()
    for module, name in ((scan, "scan_part"), (media_index, "check_part"), (measure, "measure_part")):
        work = getattr(module, name)
        monkeypatch.setattr(module, name, lambda load, work=work, name=name: ran.append(name) or work(load))
    first = validate(corpus, tmp_path / "out", qwen)
    assert ran == ["scan_part", "check_part", "measure_part"]
    assert validate(corpus, tmp_path / "other", qwen) == first and len(ran) == 3, "another run reads it"
    shorter = validate(corpus, tmp_path / "out", qwen, limits=TokenizationConfig(max_length=45))
    assert ran[3:] == ["measure_part"] and shorter.digest != first.digest
    os.utime(corpus / "frames/0-0.png", ns=(1, 1))
    validate(corpus, tmp_path / "out", qwen)
    assert ran[4:] == ["check_part", "measure_part"]
    first.index.write_bytes(first.index.read_bytes()[:-4] + b"\0\0\0\1")
    os.utime(corpus / "frames/0-0.png", ns=(1, 1))
    with pytest.raises(BlmError, match="was altered"):
        ValidatedCorpus.load(first.index.parent, corpus)


def test_a_killed_validation_goes_on(
    corpus: Path, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = validate(shutil.copytree(corpus, tmp_path / "copy"), tmp_path / "out", None).open()
    work, left = media_index.check_part, [1]

    def dying(payload: Any) -> Any:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return work(payload)

    monkeypatch.setattr(media_index, "check_part", dying)
    with pytest.raises(KeyboardInterrupt):
        validate(corpus, tmp_path / "out", None)
    seen = list[Any]()
    monkeypatch.setattr(media_index, "check_part", lambda payload: seen.append(payload) or work(payload))
    assert list(validate(corpus, tmp_path / "out", None).open()) == list(whole)
    assert len(seen) == 2, "one of three parts was finished"


def test_worker_processes_measure_like_one(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qwen, copy = tiny_qwen("2.5"), shutil.copytree(corpus, tmp_path / "copy")
    alone = validate(copy, tmp_path / "out", qwen)
    monkeypatch.setattr(measure, "ROWS_PER_UNIT", 5)
    together = validate(corpus, tmp_path / "out", qwen, workers=2)
    assert together.open().places.tolist() == alone.open().places.tolist()
    assert together.outcomes == alone.outcomes


def test_processes_trust_the_first_by_its_hash(corpus: Path, tmp_path: Path) -> None:
    found = in_processes(2, lambda own: validate(corpus, tmp_path / "out", None, processes=own))
    assert found[0] == found[1] and not list((tmp_path / "out").glob("awaited-*"))
    shutil.rmtree(corpus / "validated")
    (corpus / "corpus.jsonl").unlink()
    assert len({*in_processes(2, lambda own: validate(corpus, tmp_path / "o", None, processes=own))}) == 1


def test_workers_train_like_one_process(corpus: Path, tmp_path: Path) -> None:
    """Parity: the same samples reach the model, whatever reads them; the weights are the same bits."""
    weights = []
    for workers in (0, 1):
        copy = shutil.copytree(corpus, tmp_path / f"corpus{workers}")
        loop = LoopConfig(steps=4, batch_size=4, lr=1e-3, log_every=1)
        config = Stage1Config(loop=loop, workers=workers, pack_length=160, vision_scale=0.5)
        qwen, out = tiny_qwen("2.5"), tmp_path / f"out{workers}"
        found = validate(copy, out, qwen, workers=workers)
        counts = train_stage1(qwen, [TrainingSource.of_corpus("made", found)], config, out)
        assert counts == Counter(kept=12)
        weights.append(load_file(out / "backbone/model.safetensors"))
        drawn = (out / "drawn.json").read_text()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert drawn == (tmp_path / "out0/drawn.json").read_text()


def test_lazy_batches_are_bit_identical(corpus: Path, tmp_path: Path) -> None:
    qwen, limits = tiny_qwen("2.5"), TokenizationConfig()
    found = validate(corpus, tmp_path / "out", qwen)
    outline = save_outline(qwen, tmp_path / "outline")
    lazy = TokenizedSource(name="made", examples=LazyExamples(found, outline, limits))
    source = TrainingSource.of_corpus("made", found)
    eager = CorpusTokenizer(qwen, limits, ALONE, skip_bad=False).tokenize(source)
    assert lazy.lengths.tolist() == eager.lengths.tolist()
    assert lazy.answers.tolist() == eager.answers.tolist()
    made = []
    for one in (lazy, eager):
        sampler = MixtureSampler([one], examples_per_step=5, pack_length=160, seed=1)
        make = BatchMaker(qwen, outline, [one], sampler)
        if one is lazy:
            sent = ForkingPickler.dumps(make)
            assert len(sent) < 20_000, "a worker gets paths, not rows"
            make = ForkingPickler.loads(sent)
        made.append([make(step, DataShard()) for step in range(3)])
    for left, right in zip(*made, strict=True):
        assert left.ids == right.ids and left.batch.inputs.keys() == right.batch.inputs.keys()
        for name, value in left.batch.inputs.items():
            assert torch.equal(value, right.batch.inputs[name]), name
        assert torch.equal(left.batch.loss_mask, right.batch.loss_mask)


def test_a_sample_shows_what_the_limits_do(corpus: Path) -> None:
    qwen = tiny_qwen("2.5")
    found = sample_lengths(qwen, corpus, TokenizationConfig(), 500)
    assert len(found.lengths) == 12 and not found.warning and 0 < found.pictures < 1
    short = TokenizationConfig(max_length=int(np.median(found.lengths)))
    assert "sampled conversations of 'robots' are longer" in sample_lengths(qwen, corpus, short, 500).warning
    with pytest.raises(BlmError, match="12 of 12 sampled"):
        _ = sample_lengths(qwen, corpus, TokenizationConfig(max_length=4), 500).warning
    assert len(list(sampled_rows(corpus, 4))) == 4


def test_settings_that_contradict_are_refused(corpus: Path, tmp_path: Path) -> None:
    loop = LoopConfig(steps=1, batch_size=1)
    with pytest.raises(BlmError, match="cache_features"):
        Stage1Config(loop=loop, workers=1, cache_features=True, lora=Lora(rank=2))
    with pytest.raises(BlmError, match="not a corpus folder"):
        validate(tmp_path, tmp_path / "out", None)
    qwen = tiny_qwen("2.5")
    found = validate(corpus, tmp_path / "out", qwen, limits=TokenizationConfig(max_length=4), sample=0)
    config = Stage1Config(loop=loop, workers=1, limits=TokenizationConfig(max_length=4))
    with pytest.raises(BlmError, match="no conversation of 'robots' can be trained on"):
        train_stage1(qwen, [TrainingSource.of_corpus("made", found)], config, tmp_path / "out")
