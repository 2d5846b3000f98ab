"""The prompt engine: system text, robot, cameras, instruction and video frames -> chat messages.

In a question, images come first, in the order given, and the text after them. In a control prompt,
the order of text and images is a choice, see `PromptOrder`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from blm.backbone.video import VideosAs, parts_of
from blm.types import BlmError, Image, ImageArray, Message, lookup

PromptOrder = Literal["pictures_first", "text_first", "query_last"]
"""Order of text and images in a control prompt.

pictures_first: the images, then the text. In a causal model the tokens of the images then see the
same prefix in a question and in a control prompt.
text_first: robot, views and task, then the images, then a short question. The text in front of the
images is the same in all decisions of an episode, so its keys and values can be cached
(`blm.backbone.prefix_cache`).
query_last: the images, then robot, views and task, and last the object, the goal and the gripper of
each view by name. In a causal model only tokens behind the task can depend on it, so these words
are where a backbone can gather what the task means in each view.
"""


QUERY_LAST = re.compile(r"In ([^:]+): (object), (goal), (gripper)\.")
"""What query_last asks of each view."""


def require_order(order: str) -> None:
    """Raise BlmError for an unknown order of the control prompt."""
    lookup("prompt order", order, dict.fromkeys(get_args(PromptOrder)))


def order_of(question: Message) -> PromptOrder:
    """Return the order of a control prompt, given its turn of a conversation.

    The turn begins with all images shown so far (`Conversation.turns`).
    """
    if isinstance(question.content[0], str):
        return "text_first"
    return "query_last" if QUERY_LAST.search(question.text) else "pictures_first"


def control_prompt(
    instruction: str,
    robot: str,
    images: Mapping[str, ImageArray],
    *,
    order: PromptOrder = "pictures_first",
    system: str = "",
) -> tuple[Message, ...]:
    """Return the prompt at whose hidden states a policy is trained.

    `images` maps camera names to uint8 [height, width, 3]. Raises BlmError for an unknown order.
    """
    before, question = control_texts(instruction, robot, list(images), order)
    return question_prompt(question, list(images.values()), system=system, before=before)


def control_texts(
    instruction: str, robot: str, cameras: Sequence[str], order: PromptOrder
) -> tuple[str, str]:
    """Return the texts of the control prompt before and after its images; the first is empty if the
    images come first. `robot` is its name ("panda").

    It asks for object, goal, gripper and next primitive although nobody waits for the words: a
    model that was taught to answer such questions gathers the answers at their positions, where the
    bridge reads them. Raises BlmError for an unknown order.
    """
    require_order(order)
    views, question = f"Robot: {robot}. Views: {', '.join(cameras)}.", "What is the next primitive?"
    if order == "query_last":
        points = " ".join(f"In {camera}: object, goal, gripper." for camera in cameras)  # QUERY_LAST
        return "", f"{views} Task: {instruction} {points} {question}"
    task = f"{views} Point to the object, the goal and the gripper in each view. Task: {instruction}"
    return (task, question) if order == "text_first" else ("", f"{task} {question}")


def question_prompt(
    question: str, images: Sequence[ImageArray] = (), *, system: str = "", before: str = ""
) -> tuple[Message, ...]:
    """Return one user turn: the text `before` the images, the images, if any, and the question."""
    first = (before,) if before else ()
    user = Message("user", (*first, *(Image(pixels) for pixels in images), question))
    return (Message("system", (system,)), user) if system else (user,)


def video_prompt(
    question: str, frames: Sequence[ImageArray], rate_hz: float, *, count: int = 8
) -> tuple[Message, ...]:
    """Return one user turn with at most `count` evenly spaced frames and their times [s].

    A backbone with video inputs (`Backbone.videos_as`) receives them as one video.
    """
    if len(frames) == 0 or count < 1:
        raise BlmError(f"a video prompt needs frames; got {len(frames)} and room for {count}")
    picked = np.unique(np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int))
    times = ", ".join(f"{index / rate_hz:.1f}" for index in picked)
    images = [Image(frames[index], f"frames#t={index / rate_hz:.6f}") for index in picked]
    return (Message("user", (*images, f"Frames at {times} s. {question}")),)


def to_chat(messages: Sequence[Message], videos_as: VideosAs = "frames") -> list[dict[str, Any]]:
    """Return messages in the form that chat templates of transformers read."""
    if not messages:
        raise BlmError("a conversation has no messages")
    return [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part}
                if isinstance(part, str)
                else {"type": "image" if isinstance(part, Image) else "video"}
                for part in parts_of(message.content, videos_as)
            ],
        }
        for message in messages
    ]
