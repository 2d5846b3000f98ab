"""Stage I on a million rows: time to the first step, memory of a process, share of waiting for data.

    python benchmarks/million_rows.py FOLDER [--rows 1000000] [--frames 8] [--workers 1] [--steps 20]

A synthetic corpus in FOLDER has a question in each row about 8 frames; the frames are shared by the
rows of an episode, and the episodes repeat after `--episodes`, because a benchmark needs no terabyte
of pictures. A new process then trains a Qwen2.5-VL of 11.4 M random weights. Everything
is measured as a user meets it: the hash of the rows and the times of all media files are compared,
and the row index is opened, before the first step.

The rows are scanned and the media decoded completely. Their lengths are measured on the first
`--templates` rows, whose texts repeat; `--measure-all` measures every row instead. With
`--written-index` the rows are not scanned either: their places are those of the program that wrote
them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import PIL.Image
import torch
import tyro
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from blm.backbone import Backbone
from blm.backbone.nano.model import train_tokenizer
from blm.backbone.processors import without_video
from blm.backbone.stand_in import SPECIAL_TOKENS
from blm.backbone.video import FrameProcessor, completed
from blm.corpora.format.row_index import MEASURED, PLACE
from blm.corpora.format.scan import scan_in_parts
from blm.evaluation.results import this_machine
from blm.io import read_json_lines, write_json
from blm.training.loop.distributed import Processes
from blm.training.loop.loop import LoopConfig
from blm.training.sft import validation
from blm.training.sft.measure import MeasureSetup, measure_rows
from blm.training.sft.tokenize import TokenizationConfig
from blm.training.sft.tokenize_corpora import TrainingSource
from blm.training.sft.train import Stage1Config, train_stage1

ROWS_PER_EPISODE = 20
"""As in ShareRobot."""
TEMPLATE = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' }}{%- for p in m.content -%}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if p.type == 'image' else p.text }}"
    "{%- endfor -%}{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{{ '<|im_start|>assistant\\n' if add_generation_prompt else '' }}"
)


@dataclass(frozen=True, kw_only=True)
class Options:
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """Folder for the corpus and the run; a corpus that is there is used again."""
    rows: int = 1_000_000
    frames: int = 8
    """Frames of a row."""
    episodes: int = 1_000
    """Different episodes, each with its own frames."""
    side: int = 112
    """Height and width of a frame [px]."""
    templates: int = 1_000
    """Rows whose texts differ."""
    measure_all: bool = False
    """Measure the length of every row."""
    written_index: bool = False
    """Take the places of the rows from the program that wrote them, and scan only the templates."""
    workers: int = 1
    steps: int = 20
    batch_size: int = 8
    part: str = ""
    """For internal use."""


def make_corpus(options: Options) -> Path:
    """Write the corpus, unless it is there; return its folder."""
    corpus = options.folder / f"corpus-{options.rows}-{options.frames}"
    if (corpus / "corpus.jsonl").exists():
        return corpus
    frames, rng = corpus / "frames", np.random.default_rng(0)
    frames.mkdir(parents=True, exist_ok=True)
    for episode in range(options.episodes):
        base = (
            rng.integers(0, 256, (7, 7, 3), np.uint8)
            .repeat(options.side // 7, 0)
            .repeat(options.side // 7, 1)
        )
        for number in range(options.frames):
            PIL.Image.fromarray(np.roll(base, 3 * number, 1)).save(
                frames / f"{episode}-{number}.jpg", quality=80
            )
    sizes = np.zeros(options.rows, dtype=np.int64)
    with (corpus / "corpus.jsonl.part").open("w") as file:
        for number in range(options.rows):
            episode = number // ROWS_PER_EPISODE % options.episodes
            text = number % options.templates
            sizes[number] = file.write(_row(number, episode, options.frames, text))
    places = np.zeros(options.rows, dtype=PLACE)
    places["offset"] = np.cumsum(sizes) - sizes
    places["size"], places["line"] = sizes, np.arange(1, options.rows + 1)
    np.save(corpus / "written.npy", places)
    (corpus / "corpus.jsonl.part").rename(corpus / "corpus.jsonl")
    return corpus


def _row(number: int, episode: int, frames: int, text: int) -> str:
    shown = "".join(
        f'{{"type": "image_url", "image_url": {{"url": "frames/{episode}-{frame}.jpg"}}}}, '
        for frame in range(frames)
    )
    question = f"The robot is to put thing {text} onto thing {text // 7}. What does it do next?"
    answer = f"It moves to thing {text}, closes the gripper and lifts it by {text % 13} cm."
    asked = f'{{"role": "user", "content": [{shown}{{"type": "text", "text": "{question}"}}]}}'
    said = f'{{"role": "assistant", "content": "{answer}"}}'
    group = f"e{number // ROWS_PER_EPISODE}"
    return f'{{"id": "q{number}", "group": "{group}", "messages": [{asked}, {said}]}}\n'


def small_qwen(side: int) -> Backbone:
    """Return a Qwen2.5-VL of 11.4 million random parameters."""
    tokenizer = train_tokenizer(["The robot is to put thing 0 onto thing 1. What does it do next?"])
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(SPECIAL_TOKENS), "eos_token": "<|im_end|>"}
    )
    numbers: Any = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    ids = dict(zip(SPECIAL_TOKENS, numbers, strict=True))
    text: dict[str, Any] = {"vocab_size": len(tokenizer), "hidden_size": 256, "intermediate_size": 1024}
    text |= {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}}
    text |= {"eos_token_id": ids["<|im_end|>"], "pad_token_id": tokenizer.pad_token_id}
    vision: dict[str, Any] = {"depth": 6, "hidden_size": 192, "intermediate_size": 512, "num_heads": 4}
    vision |= {"out_hidden_size": 256, "window_size": 56, "fullatt_block_indexes": [2, 5]}
    torch.manual_seed(0)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    media: dict[str, Any] = dict(
        zip(names, (ids[t] for t in ("<|image_pad|>", "<|video_pad|>", *SPECIAL_TOKENS[2:4])), strict=True)
    )
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, **media)
    )
    size = {"shortest_edge": side**2, "longest_edge": side**2}
    pictures = Qwen2VLImageProcessorPil(size=size, patch_size=14)
    processor = without_video(Qwen2_5_VLProcessor)(pictures, tokenizer, chat_template=TEMPLATE)
    processor.video_processor = FrameProcessor(completed({"size": size}, model.config.model_type))
    return Backbone(model, processor)


def validator(options: Options, backbone: Backbone) -> validation.Validator:
    return validation.Validator(
        backbone=backbone,
        limits=TokenizationConfig(),
        out=options.folder / "out",
        processes=Processes.join("cpu"),
        workers=options.workers,
    )


def validate(options: Options, corpus: Path) -> dict[str, float]:
    """Validate the corpus; return how long its parts took [s]."""
    seconds = dict[str, float]()

    def measured(setup: MeasureSetup, folder: Path, *, workers: int) -> Any:
        begin = time.perf_counter()
        places = np.load(setup.places)
        some = folder / "templates.npy"
        folder.mkdir(parents=True, exist_ok=True)
        np.save(some, places[: options.templates])
        short = MeasureSetup(**{**vars(setup), "places": some})
        index, faults, _ = measure_rows(short, folder, workers=workers)
        seconds["measuring a row"] = (time.perf_counter() - begin) / len(index)
        whole = np.zeros(len(places), dtype=MEASURED)
        for name in ("offset", "size", "line"):
            whole[name] = places[name]
        for name in ("tokens", "answers"):
            whole[name] = index[name][np.arange(len(places)) % len(index)]
        return whole, faults, Counter(kept=len(whole))

    def written(corpus: Path, folder: Path, *, workers: int) -> Any:
        if not (folder / "scan.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "places.npy").write_bytes((corpus / "written.npy").read_bytes())
            write_json(
                folder / "media.json", sorted(f"frames/{p.name}" for p in (corpus / "frames").iterdir())
            )
            facts = {"training": ["unknown"], "orders": [], "reserved": {}}
            found = {"rows": options.rows, "faults": [], "counts": {}, "facts": facts}
            write_json(folder / "scan.json", found)
        return scan_in_parts(corpus, folder, workers=workers)

    if options.written_index:
        validation.scan_in_parts = written
    if not options.measure_all:
        validation.measure_rows = measured
    begin = time.perf_counter()
    validator(options, Backbone.load(options.folder / "backbone")).validate(corpus)
    return {"validation": time.perf_counter() - begin, **seconds}


def train(options: Options, corpus: Path) -> None:
    """Train as a user does, in this process, and print what was measured as JSON."""
    begin, peak = float(os.environ["BEGUN"]), Counter[str]()
    threading.Thread(target=_watch_memory, args=(peak,), daemon=True).start()
    backbone = Backbone.load(options.folder / "backbone")
    found = validator(options, backbone).validate(corpus)
    opened = time.time() - begin
    loop = LoopConfig(steps=options.steps, batch_size=options.batch_size, log_every=1, save_every=10**6)
    out = options.folder / f"run-{os.getpid()}"
    first = list[float]()

    def watch_log() -> None:
        while not ((out / "log.jsonl").exists() and (out / "log.jsonl").stat().st_size):
            time.sleep(0.05)
        first.extend((time.time() - begin, time.process_time()))

    threading.Thread(target=watch_log, daemon=True).start()
    config = Stage1Config(loop=loop, workers=options.workers)
    train_stage1(backbone, [TrainingSource.of_corpus("made", found)], config, out)
    rows = read_json_lines(out / "log.jsonl")
    later = rows[len(rows) // 4 :]
    report = {
        "rows": found.rows,
        "million parameters": sum(p.numel() for p in backbone.model.parameters()) / 1e6,
        "tokens of a row": float(found.open().places["tokens"].mean()),
        "bytes of index a row": found.open().places.dtype.itemsize,
        "s until the index is open": opened,
        "s until the first step is done": first[0],
        "processor s of this process until then": first[1],
        "peak MiB of the training process": peak["own"] / 1024,
        "peak MiB of a worker": peak["worker"] / 1024,
        "share of waiting for data": sum(row["data_share"] for row in later) / len(later),
        "samples/s": sum(row["samples_per_s"] for row in later) / len(later),
    }
    print(json.dumps(report))


def _watch_memory(peak: Counter[str]) -> None:
    """Keep the peak resident memory [KiB] of this process and of the processes below it."""
    while True:
        parents, sizes = dict[int, int](), dict[int, int]()
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                lines = status.read_text().splitlines()
            except OSError:
                continue
            fields = dict(line.split(":", 1) for line in lines if ":" in line)
            if "VmRSS" in fields:
                parents[int(fields["Pid"])] = int(fields["PPid"])
                sizes[int(fields["Pid"])] = int(fields["VmRSS"].split()[0])
        for process, size in sizes.items():
            above = process
            while above in parents and above != os.getpid():
                above = parents[above]
            if above == os.getpid():
                kind = "own" if process == above else "worker"
                peak[kind] = max(peak[kind], size)
        time.sleep(0.2)


def main() -> None:
    options = tyro.cli(Options)
    corpus = options.folder / f"corpus-{options.rows}-{options.frames}"
    if options.part == "train":
        train(options, corpus)
        return
    begin = time.perf_counter()
    make_corpus(options)
    print(f"{this_machine()}\ncorpus made in {time.perf_counter() - begin:.0f} s: {corpus}", flush=True)
    if not (options.folder / "backbone").exists():
        small_qwen(options.side).save(options.folder / "backbone")
    print(json.dumps(validate(options, corpus)), flush=True)
    environment = {**os.environ, "BEGUN": str(time.time())}
    command = [sys.executable, __file__, *sys.argv[1:], "--part", "train"]
    subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    main()
