"""The playground's page in a real browser, its colours, and the questions that it suggests."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from blm.backbone.prompt import question_prompt
from blm.corpora.scenes.annotations import Annotation
from blm.corpora.scenes.episodes import PHRASES
from blm.corpora.scenes.observation import SceneObserver
from blm.corpora.scenes.questions import scene_annotations
from blm.corpora.scenes.templates import TEMPLATES
from blm.robots import ROBOTS
from blm.serving.app import create_app
from blm.serving.playground import PATH, add_playground, session
from blm.serving.playground.suggestions import BY_TASK, QUESTIONS, suggested_questions
from blm.tasks import SUITE24, TASKS, Env
from blm.tasks.wordings import expand
from blm.types import BlmError, Message, Sampling
from tests.support.playground import CONTRACT, StillPolicy
from tests.support.serving import EchoGenerator, Words, running_app

# --- suggested questions ---

KINDS = {
    "next": "generative_affordance",
    "colour": "attribute_color",
    "held": "affordance_held",
    "table": "location_table",
    "side": "left_right",
    "depth": "front_behind",
    "roll": "affordance_roll",
    "air": "location_goal",
    "way": "forecasting_direction",
    "height": "metric_height",
    "distance": "metric_goal_distance",
    "count": "counting",
    "other": "existence",
    "point": "point_base",
}
"""Kind of a suggested question -> kind of the corpora."""


def trained_fields(kind: str) -> str:
    """The question in the field names of the corpora."""
    question = QUESTIONS[kind]
    if kind == "distance":
        return question.replace("{other}", "{goal}")
    return question.replace("{other}", "{goal}") if kind == "way" else question


@pytest.mark.parametrize("kind", QUESTIONS)
def test_a_suggested_question_is_worded_as_trained(kind: str) -> None:
    trained = {text for pattern in TEMPLATES[KINDS[kind]].seen for text in expand(pattern)}
    assert trained_fields(kind) in trained
    assert BY_TASK.keys() == TASKS.keys()
    assert any(kind in dict(questions) for questions in BY_TASK.values())


def test_a_question_with_two_right_answers_is_not_suggested() -> None:
    env = Env("panda", "stack_cube", cameras=("base",))
    env.reset(seed=4100)
    side = "Is the red cube left or right of the green cube?"
    assert side in suggested_questions(env)
    cube, lower = (env.objects()[name].position for name in ("cube", "lower"))
    env.shift_object("cube", np.array([0.0, lower[1] - cube[1] + 0.01, 0.0]))
    assert side not in suggested_questions(env)
    env.close()


def answered_rightly(answer: str, fact: Annotation) -> bool:
    """Exactly, or with numbers within 2 cm or 4 hundredths of the picture."""
    answer = re.sub(r"<think>.*?</think>", "", answer, flags=re.DOTALL).strip().rstrip(".")
    if not fact.kind.startswith(("point", "metric")):
        return answer.lower() == fact.answer
    said, right = (re.findall(r"-?\d+", text) for text in (answer, fact.answer))
    near = 40 if fact.kind.startswith("point") else 2
    pairs = zip(map(int, said), map(int, right), strict=False)
    return len(said) == len(right) and all(abs(a - b) <= near for a, b in pairs)


def test_the_released_model_answers_what_is_suggested() -> None:
    from blm.app.model import BLM

    model = BLM.from_pretrained("blm-nano")
    cameras, right, asked = model.contract.cameras, list[str](), list[str]()
    for index, task in enumerate(SUITE24):
        robot = list(ROBOTS)[index % len(ROBOTS)]
        env = Env(robot, task, cameras=cameras, image_size=model.contract.image_size)
        with closing(env), closing(SceneObserver(env, cameras)) as observer:
            env.reset(seed=4000 + index)
            scene = observer.observe()
            facts = [
                Annotation("generative_affordance", f"approach the {PHRASES[task][0]}"),
                *scene_annotations(scene),
            ]
            worded = {
                text.format(**fact.words): fact
                for fact in facts
                if fact.kind in KINDS.values()
                for pattern in TEMPLATES[fact.kind].seen
                for text in expand(pattern)
            }
            for question in suggested_questions(env):
                if question not in worded:  # its answer is not clear enough for the corpora: rare
                    continue
                asked.append(f"{task}: {question}")
                prompt = question_prompt(question, [scene.images[camera] for camera in cameras])
                if answered_rightly(model.answer(prompt, max_tokens=96), worded[question]):
                    right.append(asked[-1])
    assert len(asked) >= 28  # of some 33
    assert len(right) >= 0.85 * len(asked), sorted({*asked} - {*right})


# --- how the pages look ---

PAIRS = [
    ("ink", "card", 4.5), ("ink", "ground", 4.5), ("ink", "well", 4.5), ("soft", "card", 4.5),
    ("soft", "ground", 4.5), ("soft", "well", 4.5), ("on-accent", "accent", 4.5), ("good", "card", 4.5),
    ("bad", "card", 4.5), ("bad", "well", 4.5),
    ("control", "card", 3.0), ("accent", "card", 3.0), ("accent", "ground", 3.0),
]  # fmt: skip
"""Colours that meet, and the contrast that WCAG 2.2 asks for: 4.5 of text, 3 of borders and focus rings."""


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("name", ["page.html", "login.html"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_told_apart(name: str, scheme: str) -> None:
    page = (Path(session.__file__).parent / name).read_text("utf-8")
    found = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", page)
    colours = {name: light if scheme == "light" else dark for name, light, dark in found}
    for one, other, least in PAIRS:
        if one in colours and other in colours:
            low, high = sorted(luminance(colours[name]) for name in (one, other))
            assert (high + 0.05) / (low + 0.05) >= least, (one, other)


# --- a real browser ---

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt install chromium)")


class Thinker(EchoGenerator):
    def begin(self, messages: Sequence[Message], sampling: Sampling) -> Words:
        if messages[-1].text == "too long":
            raise BlmError("the conversation has 9000 tokens, the model reads 4096")
        question, pictures = messages[-1].text, len(messages[-1].images)
        answer = "(500, 250)" if "Point to" in question else f"I see a cube, and heard: {question}"
        return Words(f"<think>{pictures} pictures</think> {answer}", 1, 50)


@needs_browser
@pytest.mark.parametrize("width, height", [(1280, 800), (390, 844)])
def test_the_page_in_a_browser(tmp_path: Path, width: int, height: int) -> None:
    from playwright.sync_api import expect, sync_playwright

    app = create_app(StillPolicy(), Thinker())
    add_playground(app, CONTRACT, name="BLM")
    with running_app(app) as address, sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height})
        expect.set_options(timeout=20_000)
        faults = list[str]()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)

        def fits() -> bool:
            return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))

        page.goto(f"http://{address}{PATH}")
        state, step = page.locator("#state-0"), page.locator("#step-0")
        expect(state).to_have_text("Ready")  # a preview, before anything is pressed
        expect(page.get_by_alt_text("wrist camera")).to_have_attribute("src", re.compile("^data:image/jpeg"))
        assert page.locator(".views img").count() == len(CONTRACT.cameras) and fits()
        page.get_by_label("Task").select_option("pick_cube")
        expect(page.locator("#chips")).to_contain_text("Point to the red cube in the base view.")
        page.get_by_role("button", name="Start").focus()
        page.keyboard.press("Enter")
        expect(state).to_have_text("Driving")
        expect(step).to_have_text(re.compile(r"^step ([5-9]|\d\d+)/200$"))
        expect(page.locator("#latency-0")).to_have_text(re.compile(r"^latency \d+ ms$"))
        page.get_by_role("button", name="Towards the robot").click()
        page.get_by_role("button", name="Pause").click()
        expect(state).to_have_text("Paused")
        page.get_by_role("button", name="Resume").click()
        page.get_by_label("Your question").fill("What is red?")
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.get_by_text("I see a cube, and heard: What is red?")).to_be_visible()
        thoughts = page.locator("details.thoughts")
        expect(thoughts).to_contain_text("Thoughts")
        expect(thoughts).to_contain_text("3 pictures")
        expect(page.locator(".words").last).not_to_contain_text("think")
        page.get_by_role("button", name="Point to the red cube in the base view.").click()
        expect(page.locator(".pointed svg circle").last).to_have_attribute("cx", "500")
        view = page.locator(".views").bounding_box()
        assert view is not None and 0 <= view["y"] <= height / 2  # the pictures stay while one asks
        page.get_by_role("button", name="Stop").click()
        expect(state).to_have_text(re.compile(r"^Stopped at step \d+$"))
        page.get_by_role("button", name="Next seed").click()
        expect(state).to_have_text("Ready")
        assert page.get_by_label("Seed").input_value() == "101" and fits() and not faults
        fields = "[...document.querySelectorAll('input, select, textarea')]"
        assert page.evaluate(f"{fields}.filter(field => !field.labels.length).length") == 0
        page.screenshot(path=tmp_path / f"page{width}.png", full_page=True)
        assert (tmp_path / f"page{width}.png").stat().st_size > 10_000
        page.get_by_label("Seed").evaluate("field => { field.removeAttribute('min'); field.value = -5; }")
        page.get_by_role("button", name="Start").click()
        expect(page.get_by_role("alert")).to_contain_text("the seed is -5")
        page.get_by_label("Your question").fill("too long")
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.locator(".failed")).to_contain_text("9000 tokens")
        browser.close()


@needs_browser
def test_signing_in_with_a_browser() -> None:
    from playwright.sync_api import expect, sync_playwright

    app = create_app(StillPolicy(), Thinker(), api_key="sesame")
    add_playground(app, CONTRACT, name="BLM")
    with running_app(app) as address, sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"http://{address}{PATH}")
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("alert")).to_contain_text("wrong API key")
        page.get_by_label("API key").fill("sesame")
        page.keyboard.press("Enter")
        expect(page.locator("#state-0")).to_have_text("Ready", timeout=20_000)
        page.get_by_role("button", name="Start").click()
        expect(page.locator("#state-0")).to_have_text("Driving", timeout=20_000)
        page.get_by_role("button", name="What can the robot do now?").click()
        expect(page.get_by_text("I see a cube, and heard: What can the robot do now?")).to_be_visible()
        stored = page.evaluate(
            "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"
        )
        assert "sesame" not in stored and "blm_session" not in stored  # the cookie is out of reach of scripts
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_label("API key")).to_be_visible()
        browser.close()


@needs_browser
def test_the_page_without_a_policy_and_after_a_disconnect() -> None:
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        app = create_app(None, Thinker())
        add_playground(app, None, name="BLM")
        with running_app(app) as address:
            page.goto(f"http://{address}{PATH}")
            expect(page.get_by_text("cannot control a robot")).to_be_visible()
            expect(page.get_by_role("button", name="Start")).to_be_hidden()
            page.get_by_role("button", name="What can the robot do now?").click()
            expect(page.get_by_text("I see a cube, and heard")).to_be_visible(timeout=20_000)
        expect(page.get_by_role("alert")).to_be_visible(timeout=20_000)
        expect(page.get_by_role("button", name="Reconnect")).to_be_visible()
        app = create_app(StillPolicy(), None)
        add_playground(app, CONTRACT, name="BLM")
        with running_app(app) as address:
            page.goto(f"http://{address}{PATH}")
            expect(page.get_by_text("This server has no chat")).to_be_visible()
            expect(page.get_by_label("Your question")).to_be_hidden()
        browser.close()
