"""Export backbones for vLLM, and datasets and checkpoints with cards; upload them to the hub."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blm.io import new_folder
from blm.types import BlmError

if TYPE_CHECKING:
    from blm.backbone import Backbone

VLLM_MODEL_TYPES = ("qwen2_5_vl", "qwen3_vl", "llava", "idefics3", "smolvlm")
"""`model_type` of the models that both this package and vLLM support."""
TOLERANCE = 1e-4
"""Maximum difference between logits of our model and those of plain transformers."""
COMPUTE_LOGITS = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
folder, given, out, count = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
inputs = load_file(given)
with torch.no_grad():
    logits = [model(**{k.split("/")[1]: v for k, v in inputs.items() if k.startswith(f"{n}/")}).logits[:, -1]
              for n in range(int(count))]
assert not any(name.split(".")[0] == "blm" for name in sys.modules)
save_file({"logits": torch.cat(logits).contiguous()}, out)
"""
"""Program that computes logits with plain transformers. It never imports this package."""


def export_vllm(source: str, out: Path, *, images: int = 8, context: int = 8192) -> str:
    """Write a backbone as a stock transformers folder; return its `vllm serve` command.

    `source` is a checkpoint of Stage II, a backbone's folder or a name of BACKBONES. The folder is
    verified: plain transformers, in a process without this package, must compute the same logits
    for an image and a text. `images` and `context` [tokens] limit a request. Raises BlmError, and
    writes nothing, for a model that vLLM does not support or that has parts of our own.
    """
    from blm.backbone import Backbone

    for name, value in (("images", images), ("context", context)):
        if not 1 <= value <= 10**9:
            raise BlmError(f"{name} is {value}; it must be 1 or more")
    inside = Path(source) / "backbone"
    backbone = Backbone.load(inside if inside.is_dir() else source)
    config = backbone.model.config
    kind = config.model_type
    vision_tower = config.vision_config.model_type
    if kind not in VLLM_MODEL_TYPES or vision_tower.startswith("blm_"):
        raise BlmError(
            f"vLLM cannot serve '{source}': it is a {kind} with the vision tower {vision_tower}; vLLM knows "
            f"{', '.join(VLLM_MODEL_TYPES)} with their own towers. `blm serve` serves every checkpoint"
        )

    limit = json.dumps({"image": images})
    command = (
        f"vllm serve {shlex.quote(str(out))} --served-model-name BLM --max-model-len {context} "
        f"--limit-mm-per-prompt '{limit}'"
    )
    with new_folder(out) as work:
        backbone.write_into(work)
        pictures = backbone.processor.image_processor.to_dict()
        (work / "preprocessor_config.json").write_text(json.dumps(pictures, indent=1))
        if video := backbone.processor.to_dict().get("video_processor"):
            (work / "video_preprocessor_config.json").write_text(json.dumps(video, indent=1))
        _verify(backbone, work)
        (work / "README.md").write_text(_backbone_card(command, kind, source))
    return command


def export_dataset(source: Path, out: Path) -> None:
    """Copy a dataset, and add the dataset card that the hub and LeRobot's viewer read.

    Raises BlmError, which names file and fix, for a damaged dataset.
    """
    from blm.datasets.files import MANIFEST, verify_files
    from blm.datasets.lerobot import open_dataset

    data = open_dataset(source)
    if (source / MANIFEST).is_file():
        for fault in verify_files(source):
            raise fault
    info = json.loads((source / "meta/info.json").read_text())

    with new_folder(out) as work:
        shutil.copytree(source, work, dirs_exist_ok=True)
        (work / "README.md").write_text(_dataset_card(info, list(data.tasks)))


def export_checkpoint(source: str, out: Path) -> None:
    """Copy a checkpoint with its model card. Raises BlmError for a damaged checkpoint."""
    from blm.policy.checkpoint import checkpoint_folder, read_config

    folder = checkpoint_folder(source)
    read_config(folder)
    with new_folder(out) as work:
        shutil.copytree(folder, work, dirs_exist_ok=True)


def push_to_hub(folder: Path, repo: str, *, private: bool = False, endpoint: str | None = None) -> str:
    """Upload an exported folder to the Hugging Face hub and return its address.

    `repo` is ORG/NAME. A dataset is tagged with the version of its format, which LeRobot requires.
    The token comes from `hf auth login` or HF_TOKEN, the address of the hub from `endpoint` or
    HF_ENDPOINT. Raises BlmError with the hub's reason. The files become visible together, after all
    of them have arrived.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    api = HfApi(endpoint=endpoint)
    info = folder / "meta/info.json"
    kind = "dataset" if info.is_file() else "model"
    try:
        where = api.create_repo(repo, repo_type=kind, private=private, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=repo, repo_type=kind, commit_message="Upload with blm export"
        )
        if kind == "dataset":
            tag = json.loads(info.read_text())["codebase_version"]
            api.create_tag(repo, tag=tag, repo_type=kind, exist_ok=True)
    except HFValidationError as error:
        raise BlmError(f"'{repo}' is not the name of a repository; write ORG/NAME ({error})") from error
    except (HTTPError, RuntimeError) as error:  # RuntimeError: the upload of a large file failed
        reason = str(error).strip().splitlines()[0]
        raise BlmError(f"'{folder}' was not uploaded to '{repo}': {reason}; {_remedy(error)}") from error
    return str(where)


def _remedy(error: Exception) -> str:
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    status = getattr(response, "status_code", None)
    if status in (401, 403):
        return "log in with `hf auth login` as a user who may write there, or set HF_TOKEN"
    return "the exported folder is complete: run the same command again"


def _verify(backbone: Backbone, folder: Path) -> None:
    """Raise BlmError unless plain transformers computes our probe logits from the folder alone."""
    from safetensors.torch import load_file, save_file

    prompts = [backbone.encode([prompt]) for prompt in backbone.probe_prompts()]
    given = {
        f"{n}/{name}": value.contiguous() for n, one in enumerate(prompts) for name, value in one.items()
    }
    with tempfile.TemporaryDirectory() as place:
        inputs, logits = Path(place) / "inputs.safetensors", Path(place) / "logits.safetensors"
        save_file(given, inputs)
        words = [
            sys.executable,
            "-c",
            COMPUTE_LOGITS,
            str(folder),
            str(inputs),
            str(logits),
            str(len(prompts)),
        ]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip() or "no reason given").splitlines()[-1]
            raise BlmError(f"plain transformers cannot load the exported folder: {last}")
        gap = float((load_file(logits)["logits"] - backbone.probe_logits()).abs().max())
    if not gap <= TOLERANCE:
        raise BlmError(f"logits of plain transformers differ from ours by {gap:.2g}; nothing was exported")


def _backbone_card(command: str, kind: str, source: str) -> str:
    import transformers

    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [robotics, embodied-question-answering]
---

# Backbone of a BLM checkpoint, after Stage I

A {kind} model that answers questions about scenes, in the stock format of transformers, exported from
`{source}`. It was written with transformers {transformers.__version__}; versions 4.x may read its rotary
embedding wrongly. It does not predict actions: these need the full checkpoint and `blm serve`.

Serve it with vLLM:

```bash
{command}
```
"""


def _dataset_card(info: dict[str, Any], tasks: list[str]) -> str:
    features = [(name, feature["dtype"], feature["shape"]) for name, feature in info["features"].items()]
    rows = "\n".join(f"| `{name}` | {dtype} | {shape} |" for name, dtype, shape in features)
    return f"""---
task_categories: [robotics]
tags: [LeRobot]
configs:
- config_name: default
  data_files: data/*/*.parquet
---

# {info["robot_type"]}: {", ".join(tasks)}

A LeRobotDataset {info["codebase_version"]} with {info["total_episodes"]:,} episodes and
{info["total_frames"]:,} frames at {info["fps"]} Hz. Datasets collected with Boundless list scene seeds and
software versions in `meta/manifest.json`.

| feature | type | shape |
|---|---|---|
{rows}
"""
