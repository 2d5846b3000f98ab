"""The report: self-contained, complete, honest about what is missing."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest

from blm.evaluation import PhysicalProtocol, RandomPolicy, ZeroPolicy, evaluate_digital, evaluate_physical
from blm.evaluation.physical.outcome import REASONS
from blm.evaluation.physical.result import EpisodeResult, Execution, PhysicalResult, SharedPolicy
from blm.evaluation.physical.summary import summarise
from blm.evaluation.protocol import digest, phrasing_of
from blm.evaluation.report import ReportData, build_report
from blm.evaluation.result_files import write_result
from blm.evaluation.results import this_machine
from blm.robots import ROBOTS
from blm.tasks import SUITE24, TASKS
from blm.types import BlmError, Image, Message, PolicyContract, Question

CONTRACT = PolicyContract(
    action_spaces={name: robot.action_space for name, robot in ROBOTS.items()},
    cameras=(),
    image_size=32,
    horizon=4,
    execute=4,
)


class Shout:
    def answer(self, messages: object, *, max_tokens: int = 128) -> str:
        return "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a result of each kind."""
    out = tmp_path_factory.mktemp("run")
    protocol = PhysicalProtocol.for_policy(
        CONTRACT, robots=["panda", "widowxai"], tasks=["push_cube"], episodes=3, max_steps=5
    )
    for name, policy in (("model", RandomPolicy), ("still", ZeroPolicy)):
        evaluate_physical(partial(policy, CONTRACT), protocol, out / name, workers=0)
    messages = (Message("user", (Image(np.zeros((2, 2, 3), np.uint8)), "Where?")),)
    about = {"id": "q", "kind": "point_base", "group": "g", "scorer": "point"}
    question = Question(messages=messages, answer="(1, 2)", **about)
    evaluate_digital(Shout(), [question], out / "digital", train_questions=[question], model="m")
    rows = [{"step": step, "loss": 2.0 / (1 + step), "lr": 1e-3} for step in range(30)]
    (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cell = {"attempts": 9, "kept": 1234, "rejected": {"unreachable": 56}, "frames": 98765}
    (out / "summary.json").write_text(json.dumps({"robots": {"panda": {"push_cube": cell}}, "seconds": 3.0}))
    return out


def full(run: Path) -> ReportData:
    return ReportData(
        title="Run <7>",
        commands=["blm collect", "blm report"],
        recipe={"name": "tiny", "steps": 4711},
        seconds={"collect": 3700.0, "stage 1": 65.0},
        collection=run / "summary.json",
        questions={"training": 5000},
        logs={"Stage I": run / "log.jsonl", "Stage II": run / "absent.jsonl"},
        digital={"ours": run / "digital/result.json"},
        physical={"ours": run / "model/result.json", "holds still": run / "still/result.json"},
    )


def page(data: ReportData, out: Path) -> str:
    build_report(data, out / "sub" / "report.html")
    return (out / "sub" / "report.html").read_text()


class Balance(HTMLParser):
    """Raises on a tag that is closed without being open, and collects what the page loads."""

    void = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        loading = {"src", "srcset", "data", "poster", *(["href"] if tag in ("link", "image") else [])}
        self.loads += [value or "" for name, value in attributes if name in loading]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_well_formed_and_loads_nothing(run: Path, tmp_path: Path) -> None:
    text = page(full(run), tmp_path)
    parser = Balance()
    parser.feed(text)
    assert parser.open == []
    assert parser.loads and all(load.startswith("data:video/mp4;base64,") for load in parser.loads)
    assert "@import" not in text and "<script" not in text and not re.search(r"url\((?!#)", text)
    assert len(text) < 500_000


def test_the_page_shows_the_content_of_the_files(run: Path, tmp_path: Path) -> None:
    text = page(full(run), tmp_path)
    for shown in [
        "Run &lt;7&gt;", "blm collect", "4711", "1 h 01 min", "1 min 05 s", "1,234", "98,765",
        "56 unreachable", "5,000", "Franka Emika Panda", "0 of 6 episodes", "0 of 1 questions", "holds still",
        "p = 1", "&lt;script&gt;alert(1)&lt;/script&gt;", "3 episodes per cell", "mujoco 3", "0–39 %",
    ]:  # fmt: skip
        assert shown in text, shown
    assert "with one seed, in simulation only" in text
    assert page(full(run), tmp_path) == text


def test_videos_are_inside_and_play(run: Path, tmp_path: Path) -> None:
    films = re.findall(r"data:video/mp4;base64,([^\"]+)", page(full(run), tmp_path))
    assert len(films) == 4  # one per cell of each policy
    with av.open(io.BytesIO(base64.b64decode(films[0]))) as film:
        assert sum(1 for _ in film.decode(video=0)) == 5


def test_a_conversation_is_shown_with_its_picture(run: Path, tmp_path: Path) -> None:
    PIL.Image.new("RGB", (4, 2)).save(tmp_path / "seen.png")
    lines = [["Where is <it>?", "(1, 2)"]]
    (tmp_path / "dialogue.json").write_text(json.dumps({"picture": "seen.png", "lines": lines}))
    text = page(replace(full(run), dialogue=tmp_path / "dialogue.json"), tmp_path)
    assert "Where is &lt;it&gt;?</td>" in text and "<b>(1, 2)</b>" in text
    (shown,) = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="The picture of the dialogue"', text)
    assert base64.b64decode(shown) == (tmp_path / "seen.png").read_bytes()


def test_curves_follow_the_theme(run: Path, tmp_path: Path) -> None:
    text = page(full(run), tmp_path)
    svg = text[text.index("<svg") : text.index("</svg>")]
    assert "currentColor" in svg and "#000000" not in svg and "<text" in svg
    assert text.count("<svg") == 1 and 'Stage II</b> <span class="none">not run' in text


def test_missing_parts_are_called_not_run(tmp_path: Path) -> None:
    absent = tmp_path / "absent.json"
    text = page(ReportData(title="Empty", physical={"ours": absent}, collection=absent), tmp_path)
    assert text.count("not run") == 9
    assert not re.search(r"\d+ %", text[text.index("<main>") :])


def test_unlike_protocols_are_shown_but_not_compared(run: Path, tmp_path: Path) -> None:
    other = json.loads((run / "still/result.json").read_text())
    other["protocol"]["max_steps"] = 6
    other["protocol_hash"] = digest(other["protocol"])
    for row in other["rows"]:
        row["video"] = None
    (tmp_path / "result.json").write_text(json.dumps(other))
    data = ReportData(title="x", physical={"a": run / "model/result.json", "b": tmp_path / "result.json"})
    assert "p = " not in page(data, tmp_path)


def test_lost_video_is_an_error(run: Path, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text((run / "model/result.json").read_text())
    with pytest.raises(BlmError, match=r"panda-push_cube-0.mp4' of the result is missing"):
        page(ReportData(title="x", physical={"a": tmp_path / "result.json"}), tmp_path)


# --- the table of 24 cells ---


def synthetic(out: Path, model: str, rate: float) -> Path:
    """A made-up result of suite24: cell c has about rate * (1 + c) / 24 solved, failures take turns."""
    protocol, episodes = PhysicalProtocol.named("suite24", CONTRACT), []
    cells = list(dict.fromkeys((key.robot, key.task) for key in protocol.keys))
    for key in protocol.keys:
        robot, task, seed = key.robot, key.task, key.seed
        solved = seed < 50 * rate * (1 + cells.index((robot, task))) / len(cells)
        episodes.append(
            EpisodeResult(
                id=f"{robot}/{task}/{seed}",
                robot=robot,
                task=task,
                seed=seed,
                scene="s",
                instruction="Do it.",
                phrasing=phrasing_of(protocol, seed),
                video=None,
                seconds_policy=0.1,
                seconds_physics=0.1,
                seconds_rendering=0.1,
                act_ms=9.0,
                success_once=solved,
                success_at_end=solved,
                steps=200,
                first_success=None,
                reason="" if solved else REASONS[seed % len(REASONS)],
                success_at_limit=solved and seed != 1,
            )
        )
    execution = Execution(
        workers=2,
        shared_policy=SharedPolicy(max_batch=64, calls=100, observations=250),
        seconds_policy=60.0,
        seconds_physics=60.0,
        seconds_rendering=60.0,
    )
    result = PhysicalResult(
        protocol=protocol,
        machine=this_machine(),
        seconds=1.0,
        model=model,
        summary=summarise(episodes),
        execution=execution,
        episodes=tuple(episodes),
    )
    write_result(out, result)
    return out / "result.json"


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("suite")
    rates = {"BLM": 0.8, "expert": 1.0, "hold still": 0.0}
    physical = {name: synthetic(out / name, name, rate) for name, rate in rates.items()}
    return page(ReportData(title="Suite", physical=physical), out)


def table(text: str, kind: str) -> list[list[str]]:
    """Rows of cells of one table, without tags."""
    body = text[text.index(f'<table class="{kind}">') :]
    rows = body[: body.index("</table>")].split("<tr>")[1:]
    tags = re.compile(r"<[^>]+>")
    return [[" ".join(tags.sub(" ", cell).split()) for cell in re.split(r"<t[dh]", row)[1:]] for row in rows]


def test_heat_map_has_every_cell_with_count_and_interval(suite: str) -> None:
    rows = table(suite, "heat")
    assert len(rows) == 1 + len(ROBOTS) + 1 and {len(row) for row in rows} == {1 + len(SUITE24) + 1}
    head = [cell.rpartition(">")[2].strip() for cell in rows[0]]
    assert head[1:-1] == [TASKS[task].title for task in SUITE24] and head[-1] == "All tasks"
    cells = [cell for row in rows[1:-1] for cell in row[1:-1]]
    assert "4 % 1–13 % · 2/50 at end 2, at step 200 1 expert 6 % hold still 0 %" in cells[0]
    assert "80 % 67–89 % · 40/50 at end 40, at step 200 39 expert 100 % hold still 0 %" in cells[-1]
    assert re.search(r"\d+ % \d+–\d+ % \d+/1200", rows[-1][-1])
    shades = [float(rate) for rate in re.findall(r"--rate:([\d.]+)\" title", suite)]
    assert len(shades) == 24 and shades == sorted(shades) and shades[-1] == 0.8


def test_every_cell_says_how_its_episodes_ended(suite: str) -> None:
    rows = table(suite, "heat why")
    assert [len(row) for row in rows] == [7] * 5
    assert all(re.search(r"\d+ (never|dropped|missed|timeout)", cell) for row in rows[1:] for cell in row[1:])
    for reason in REASONS:
        assert f"--{reason}:" in suite and f"<i></i>{reason.replace('_', ' ')} (" in suite
    assert suite.count('class="stack"') == 24 and "2.5</td>" in suite  # observations per call
    assert "held-out wordings" in suite and "the simulation waits for the policy" in suite


def test_a_replay_check_is_no_result(run: Path, tmp_path: Path) -> None:
    result = json.loads((run / "still/result.json").read_text())
    result["protocol"] |= {"purpose": "replay check", "recorded": [["panda", "push_cube", 10_000]]}
    result["protocol_hash"] = digest(result["protocol"])
    (tmp_path / "result.json").write_text(json.dumps(result))
    with pytest.raises(BlmError, match="'replay' is a replay check, which is not a score"):
        page(ReportData(title="x", physical={"replay": tmp_path / "result.json"}), tmp_path)
