"""Which turns of a dialogue are learnt, and which texts they are trained on."""

from __future__ import annotations

from blm.types import Image, Message

Messages = tuple[Message, ...]


def is_learnt(message: Message) -> bool:
    """Return whether training learns a turn: it is an answer, and its loss is not switched off."""
    return message.role == "assistant" and message.loss


def split_turns(messages: Messages) -> list[Messages]:
    """Split a dialogue about images into one conversation per learnt turn, each with all the images.

    Returns the dialogue unsplit if it has no images, or has them in later turns.
    """
    system = tuple(message for message in messages if message.role == "system")
    users = [message for message in messages if message.role == "user"]
    answers = [message for message in messages if message.role == "assistant"]
    roles = [message.role for message in messages[len(system) :]]
    roles_with_pictures = [message.role for message in messages if message.images]
    if roles != ["user", "assistant"] * len(users) or roles_with_pictures != ["user"] or not users[0].images:
        return [messages]
    last = max(index for index, part in enumerate(users[0].content) if isinstance(part, Image))
    pictures = users[0].content[: last + 1]
    questions = [users[0], *(Message("user", (*pictures, *message.content)) for message in users[1:])]
    pairs = zip(questions, answers, strict=True)
    return [(*system, question, answer) for question, answer in pairs if answer.loss] or [messages]
