"""Stage I of a pretrained recipe in two processes (gloo): the mixture, replay and reports of one process.

This file is also the program of each process.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from blm.app.pipeline import read_ledger
from blm.cli import main
from blm.io import read_json, read_json_lines
from blm.policy.policy import CheckpointPolicy
from blm.training.loop.distributed import Processes
from blm.types import BlmError
from tests.support.launch import launch
from tests.support.recipes import collect_and_ask, flags_of, prepare, shrink

RECIPE = "qwen2_5_vl_7b"
KINDS = {"ddp": (), "fsdp2": ("--stage1.training.loop.shard",)}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of one process, "alone", and of two: "ddp", "fsdp2", "faulty"."""
    folder = tmp_path_factory.mktemp("runs")
    prepare(RECIPE, folder)
    made = collect_and_ask(folder / "made", "sentence")
    for name in ("alone", "faulty", *KINDS):
        shutil.copytree(made, folder / name)
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr, cut=True)
        main(["train", "stage1", *flags_of(RECIPE, folder, "alone")])
    launch(__file__, str(folder), BLM_PROCESS_TIMEOUT="100")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_on_the_mixture_like_one(runs: Path, kind: str) -> None:
    mine, other = runs / kind, runs / "alone"
    for file in ("replay/corpus.jsonl", "stage1/corpus.json", "stage1/drawn.json", "stage1/rows.json"):
        assert (mine / file).read_bytes() == (other / file).read_bytes(), file
    require_close(read_json(mine / "stage1/mixture.json"), read_json(other / "stage1/mixture.json"))
    measured, wanted = (read_json(run / "stage1/retention.json") for run in (mine, other))
    assert measured["rows"] == wanted["rows"] and measured["probes"] == wanted["probes"]
    require_close(measured["text"], wanted["text"])
    rows, others = (read_json_lines(run / "stage1/log.jsonl") for run in (mine, other))
    assert len(rows) == len(others) and rows[-1].keys() == others[-1].keys()
    for name in [name for name in rows[-1] if name.startswith(("loss", "kl", "perplexity", "grad"))]:
        assert rows[-1][name] == pytest.approx(others[-1][name], rel=1e-4, abs=1e-6), name
    weights, expected = (load_file(run / "stage1/backbone/model.safetensors") for run in (mine, other))
    apart = torch.cat([(weights[name] - value).abs().flatten() for name, value in expected.items()])
    assert apart.max() < 2e-5, "AdamW turns the rounding of a small gradient into a part of the rate, 1e-5"
    assert apart.mean() < 1e-7
    assert read_ledger(mine)["stage1"].done and not list(mine.glob("*.shards"))


def require_close(found: Any, wanted: Any) -> None:
    """Compare JSON values; numbers to rounding, and no names of folders."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for name in wanted:
            require_close(found[name], wanted[name])
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for pair in zip(found, wanted, strict=True):
            require_close(*pair)
    else:
        assert found == (wanted if isinstance(wanted, str) else pytest.approx(wanted, rel=1e-4, abs=1e-6))


def test_the_first_process_alone_prints(runs: Path) -> None:
    first, second = ((runs / f"ddp-{rank}.txt").read_text() for rank in range(2))
    for line in ("epochs of the mixture", "replay: 20 conversations", "perplexity of held-out text"):
        assert first.count(line) == 1 and line not in second
    assert "missing corpus 'robovqa'" in first and "missing" not in second


def test_a_stage_continues_with_stage_two_in_both_processes(runs: Path) -> None:
    assert read_ledger(runs / "ddp")["stage2"].done
    assert CheckpointPolicy.load(runs / "ddp/stage2/checkpoint").contract.cameras == ("base", "wrist")


def test_an_error_in_one_process_ends_both(runs: Path) -> None:
    for rank in range(2):
        assert "process 1 of 2: general is unreadable" in (runs / f"faulty-{rank}.txt").read_text()
        assert "run in one process, but 2 were launched" in (runs / f"demo-{rank}.txt").read_text()
    assert not read_ledger(runs / "faulty")["stage1"].done and not (runs / "demo").exists()


def work(folder: Path) -> None:
    patch, processes = pytest.MonkeyPatch(), Processes.join("cpu")
    assert processes.count == 2
    shrink(patch.setattr, cut=True)
    leave = Processes.leave
    patch.setattr(Processes, "leave", lambda self: None)  # the command leaves; here, more follow

    def run(name: str, command: list[str], *more: str, status: int = 0) -> None:
        printed, found = io.StringIO(), 0
        with contextlib.redirect_stderr(printed):
            try:
                main([*command, *flags_of(RECIPE, folder, name), *more])
            except SystemExit as ended:
                found = int(ended.code or 0)
        (folder / f"{name}-{processes.rank}.txt").write_text(printed.getvalue())
        assert found == status, printed.getvalue()[-3000:]

    run("demo", ["demo"], status=2)
    for name, flags in KINDS.items():
        run(name, ["train", "stage1"], *flags)
    with pytest.MonkeyPatch.context() as broken:
        if processes.rank:
            broken.setattr("blm.app.mixture.read_corpus", refuse)
        run("faulty", ["train", "stage1"], status=2)
    printed = (folder / f"ddp-{processes.rank}.txt").read_text()
    run("ddp", ["train", "stage2"])
    (folder / f"ddp-{processes.rank}.txt").write_text(printed)
    leave(processes)


def refuse(folder: Path) -> Any:
    raise BlmError(f"{folder.name} is unreadable")


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(Path(sys.argv[1]))
