"""Every command that README and docs/ show is carried out, in their order, in one folder, with less to do.

Where a page says of a command what it needs (a key, a GPU), it is not run. `make` targets are what CI runs.
"""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch

from blm.backbone.backbone import RELEASED
from tests.support.backbones import tiny_qwen
from tests.support.benchmarks import (
    make_cosmos,
    make_scene,
    make_sharerobot,
    picture,
    write_json,
    write_picture,
)
from tests.support.documents import COMMANDS, ROOT
from tests.support.serving import free_port

pytestmark = pytest.mark.slow

BLM, ACCELERATE = (str(Path(sys.executable).with_name(name)) for name in ("blm", "accelerate"))

CELLS = "--robots panda xarm6 --tasks push_cube pick_cube"
STEPS = "--loop.steps 4 --loop.batch-size 4"
LESS = {
    "collect data --verify": "",
    "collect data": f"--episodes 1 {CELLS} --workers 2",
    "collect more": "--episodes 1 --robots panda --tasks push_cube",
    "eval physical --model": "--robots panda --tasks push_cube --episodes 1 --workers 2",
    "eval physical --recipe": "--evaluation.max-steps 20",
    "train stage1 runs": STEPS,
    "train stage2 OUT": f"{STEPS} --loop.eval-every 4 --drive 1 --intents.stride 8",
    "train stage2 runs": f"{STEPS} --intents.stride 8",
    "train baseline": STEPS,
    "study": f"{CELLS} --evaluation.max-steps 20",
    "corpus build scenes": "--scenes 8",
    "corpus replay": "--count 4",
    "corpus sharerobot": "--episodes 2",
}
"""What a command begins with -> what is put after it: the last value of an option counts."""


def prepare_robovqa(place: Path) -> None:
    if not (place / "data/cosmos").exists():
        make_cosmos(place / "data/cosmos", "robovqa")
    if not (place / "runs/qwen/backbone").exists():
        tiny_qwen("2.5").save(place / "runs/qwen/backbone")


def prepare_share(place: Path) -> None:
    make_sharerobot(place / "DATA", part="train", episodes=range(6))


def prepare_pair(place: Path) -> None:
    for name in "ab":
        shutil.copytree(place / "runs/eval/robovqa", place / "runs/eval" / name)


def prepare_rows(place: Path) -> None:
    said = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A square."}]
    rows = [{"id": str(n), "image": f"{n}.png", "conversations": said} for n in range(4)]
    write_json(place / "rows.json", rows)
    for number in range(4):
        write_picture(place / f"pictures/{number}.png", picture(number))
    make_scene(place / "held_out")


def prepare_stock(place: Path) -> None:
    tiny_qwen("2.5").save(place / "runs/mine/backbone")


def prepare_three_cameras(place: Path) -> None:
    run(
        "blm collect episodes --episodes 1 --hold 10 --cameras base side wrist --image-size 112 " + CELLS,
        place,
    )
    shutil.copytree(RELEASED / "blm-nano/backbone", place / "runs/nano/stage1/backbone")


def prepare_own_data(place: Path) -> None:
    run("blm collect data --episodes 100", place)


FIRST: dict[str, Callable[[Path], None]] = {
    "doctor data/panda": prepare_own_data,
    "eval digital --benchmark robovqa": prepare_robovqa,
    "compare runs/eval/a": prepare_pair,
    "corpus sharerobot": prepare_share,
    "corpus build scenes": prepare_rows,
    "export vllm": prepare_stock,
    "train stage2 OUT": prepare_three_cameras,
}
"""What a command begins with -> what a user has before it."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("walk")
    shutil.copytree(RELEASED / "blm-nano/backbone", folder / "runs/stage1")
    return folder


def shorter(line: str) -> list[str]:
    """The words of a command with less to do, by the programs of this environment."""
    line = re.sub(r" --push \S+", "", line).replace("--recipe demo", "--recipe ci")
    words = shlex.split(line, comments=True)
    bare = " ".join(words).split("blm ", 1)[-1]
    more = next((LESS[begin] for begin in LESS if bare.startswith(begin)), "")
    programs = {
        ".venv/bin/blm": BLM,
        "blm": BLM,
        ".venv/bin/python": sys.executable,
        ".venv/bin/accelerate": ACCELERATE,
        "accelerate": ACCELERATE,
    }
    words = [programs.get(word, word) for word in words]
    return [str(ROOT / word) if word.startswith("examples/") else word for word in (*words, *more.split())]


def run(line: str, place: Path) -> None:
    words = []
    for word in shorter(line):  # as a shell does
        words += [str(path) for path in sorted(place.glob(word))] if "*" in word else [word]
    done = subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@contextmanager
def served(line: str, place: Path, port: int = 0, end: int = signal.SIGTERM) -> Iterator[int]:
    """A server, ready; its port. `end` ends it."""
    port = port or free_port()
    words = [*shorter(line), "--port", str(port)]
    server = subprocess.Popen(words, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while not healthy(port):
            assert server.poll() is None and time.monotonic() < until, f"{words} is not ready"
            time.sleep(0.2)
        yield port
    finally:
        server.send_signal(end)
        assert server.wait(20) == -end  # uvicorn ends well and then says what ended it


def healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("line", [line for line in COMMANDS if not line.startswith(("make", "git", "cd"))])
def test_a_command(line: str, place: Path) -> None:
    if needs := re.search(r"#.*(?:needs|requires) (.*)", line):
        pytest.skip(f"needs {needs[1]}")
    if "--device cuda" in line and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    bare = line.split("blm ", 1)[-1]
    for begin in (begin for begin in FIRST if bare.startswith(begin)):
        FIRST[begin](place)
    if bare.startswith("serve"):
        with served(line, place) as port:
            models = httpx.get(f"http://127.0.0.1:{port}/v1/models").json()
            assert [model["id"] for model in models["data"]] == ["BLM"]
    elif "ws://127.0.0.1:8000" in line:
        ours = "demo/stage2/checkpoint" if bare.startswith("eval") else "blm-nano"
        with served(f"blm serve {ours}", place) as port:
            run(line.replace("127.0.0.1:8000", f"127.0.0.1:{port}"), place)
    else:
        run(line, place)


def test_an_arm_outlives_its_server(place: Path) -> None:
    """`examples/real_robot.py` holds while a killed server is away, and solves its task with the next one."""
    with served("blm serve blm-nano", place, end=signal.SIGKILL) as port:
        line = f".venv/bin/python examples/real_robot.py --address ws://127.0.0.1:{port} --patience 60"
        arm = subprocess.Popen(shorter(line), cwd=place, stdout=subprocess.PIPE, text=True)
        time.sleep(6)
        assert arm.poll() is None
    with served("blm serve blm-nano", place, port=port):
        said = arm.communicate(timeout=120)[0]
    assert "STOPPED" not in said and " 1 reconnections" in said, said
    assert "solved" in said.splitlines(), said
