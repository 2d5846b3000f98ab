"""Verifiable instructions in the style of IFEval, to measure what fine-tuning preserves.

Each prompt has one rule that a program checks (Zhou et al. 2023, arXiv:2311.07911, strict
accuracy): no preamble is stripped and no emphasis removed. A few prompts check knowledge instead.
All are text only; compare a fine-tuned model with its base model item by item.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blm.evaluation.digital.answers import answer_all
from blm.evaluation.statistics import Rate, success_rate
from blm.types import Chat, Message, Question

MAX_TOKENS = 128
"""Maximum length of an answer [tokens]."""
BATCH = 20
"""Number of instructions per batch."""
Rule = Callable[[str], bool]
"""Answer -> whether it follows the rule."""


@dataclass(frozen=True, kw_only=True)
class VerifiableInstruction:
    """A prompt with one rule, and the program that checks whether an answer follows it."""

    question: Question
    check: Rule


@dataclass(frozen=True, kw_only=True)
class InstructionAnswer:
    """A model's answer to one instruction."""

    id: str
    kind: str
    """instruction_<family>; prompts of the family "knowledge" check knowledge."""
    group: str
    question: str
    raw: str
    """The answer, or the reason why there is none."""
    correct: bool


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z0-9']+(?:-[A-Za-z0-9']+)*", text)


def sentences(text: str) -> int:
    """Count the sentences: runs that end in . ! or ? before a space or the end, unlike "3.5"."""
    parts = re.split(r"(?<=[.!?])[\"')\]]*\s+", text.strip())
    return sum(bool(words(part)) for part in parts)


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def bullets(count: int) -> Rule:
    """Check that exactly `count` lines begin with * or -, and that there are no other lines."""
    return lambda text: len(lines(text)) == count == sum(line[:2] in ("* ", "- ") for line in lines(text))


def numbered(count: int) -> Rule:
    return lambda text: [line[:2] for line in lines(text)] == [f"{i}." for i in range(1, count + 1)]


def mentions(*wanted: str) -> Rule:
    """Check that every one of these words occurs, in any case."""
    return lambda text: {word.lower() for word in wanted} <= {word.lower() for word in words(text)}


def avoids(*letters_or_words: str) -> Rule:
    """Check that none of these strings occurs, in any case, in a non-empty answer."""
    return lambda text: bool(words(text)) and not any(s.lower() in text.lower() for s in letters_or_words)


def word_count(low: int, high: int) -> Rule:
    return lambda text: low <= len(words(text)) <= high


def is_json(kind: type, *keys: str) -> Rule:
    """Check that the whole answer is JSON of this kind; an object has exactly these keys."""

    def keeps(text: str) -> bool:
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            return False
        return isinstance(value, kind) and (not isinstance(value, dict) or set(value) == set(keys))

    return keeps


def equals(answer: str) -> Rule:
    return lambda text: text.strip() == answer


def _upper(text: str) -> bool:
    return text.isupper()


def _lower(text: str) -> bool:
    return text.islower()


_RULES: tuple[tuple[str, str, Rule], ...] = (
    ("case", "What is the sea? Answer in capital letters only.", _upper),
    ("case", "Name a colour of the rainbow. Write your whole answer in capital letters.", _upper),
    ("case", "Describe a cat. Use lower-case letters only, no capital letters at all.", _lower),
    ("case", "Where do fish live? Write everything in lower case.", _lower),
    ("length", "Describe the moon in exactly two sentences.", lambda text: sentences(text) == 2),
    ("length", "Why do people sleep? Answer in exactly one sentence.", lambda text: sentences(text) == 1),
    ("length", "What is a bridge? Use exactly three sentences.", lambda text: sentences(text) == 3),
    ("length", "Describe a forest in at most 12 words.", word_count(1, 12)),
    ("length", "Explain what a robot is in at least 40 words.", word_count(40, 10_000)),
    ("length", "What is the opposite of hot? Answer with a single word.", word_count(1, 1)),
    ("length", "Tell me about bread in 20 to 40 words.", word_count(20, 40)),
    ("end", "Tell me about rain. End your answer with the words: That is all.",
     lambda text: text.rstrip().endswith("That is all.")),
    ("end", "What is a chair for? End your answer with a question mark.",
     lambda text: text.rstrip().endswith("?")),
    ("start", "Tell me about the sun. Begin your answer with the word Certainly.",
     lambda text: text.startswith("Certainly")),
    ("start", "What do bees make? Begin your answer with: My answer is",
     lambda text: text.startswith("My answer is")),
    ("quote", "Give me a good title for a story. Put your whole answer in double quotation marks.",
     lambda text: len(text) > 2 and text[0] == text[-1] == '"'),
    ("letters", "Name an animal, without using the letter e.", avoids("e")),
    ("letters", "Describe winter without using the word snow.", avoids("snow")),
    ("letters", "Write one sentence about dogs, and use no comma.", avoids(",")),
    ("words", "Write a sentence about a kitchen that uses the words spoon and window.",
     mentions("spoon", "window")),
    ("words", "Write about the sea. Use the word blue at least twice.",
     lambda text: [word.lower() for word in words(text)].count("blue") >= 2),
    ("list", "Give 3 bullet points about water, each on a line that begins with '* '. Write nothing else.",
     bullets(3)),
    ("list", "Give 2 reasons to read, each on a line that begins with '- '. Write nothing else.",
     bullets(2)),
    ("list", "Name four fruits as a numbered list: 1. 2. 3. 4. Write nothing else.", numbered(4)),
    ("list", "Name three colours, separated by commas. Write nothing else.",
     lambda text: len(text.split(",")) == 3 and len(lines(text)) == 1 and len(words(text)) <= 6),
    ("json", 'Give the name and the age of a person as JSON with the keys "name" and "age". Write only JSON.',
     is_json(dict, "name", "age")),
    ("json", "Give the numbers one to three as a JSON list. Write only JSON.", is_json(list)),
    ("repeat", "Repeat this sentence exactly and write nothing else: The red cube is on the table.",
     equals("The red cube is on the table.")),
    ("repeat", "Write the word hello three times, separated by spaces, and nothing else.",
     equals("hello hello hello")),
    ("choice", "Is fire hot? Answer with yes or no only, in lower case, without a full stop.", equals("yes")),
    ("format", "Write two short paragraphs about trees, separated by one blank line.",
     lambda text: len([part for part in re.split(r"\n\s*\n", text.strip()) if words(part)]) == 2),
    ("knowledge", "What is the capital of France?", mentions("Paris")),
    ("knowledge", "What is the capital of Japan?", mentions("Tokyo")),
    ("knowledge", "What is the capital of Italy?", mentions("Rome")),
    ("knowledge", "What is 2 + 3?", mentions("5")),
    ("knowledge", "What is 7 - 4? Give the number.", mentions("3")),
    ("knowledge", "How many days does a week have? Give a number in digits.", mentions("7")),
    ("knowledge", "Which planet do we live on?", mentions("Earth")),
    ("knowledge", "At how many degrees Celsius does water boil? Give a number in digits.", mentions("100")),
    ("knowledge", "What is the chemical formula of water?", lambda text: "H2O" in text or "H₂O" in text),
)  # fmt: skip
"""Family, prompt and rule. A change makes results incomparable with earlier ones."""


def verifiable_instructions() -> list[VerifiableInstruction]:
    """Return all instructions, in a fixed order."""
    instructions = []
    for number, (family, prompt, check) in enumerate(_RULES):
        question = Question(
            id=f"instruction/{number:02d}",
            kind=f"instruction_{family}",
            messages=(Message("user", (prompt,)),),
            answer="",
            group=f"instruction/{number:02d}",
        )
        instructions.append(VerifiableInstruction(question=question, check=check))
    return instructions


def follows(instruction: VerifiableInstruction, answer: str) -> bool:
    """Return whether the unedited answer follows the rule. An empty answer never does."""
    return bool(answer.strip()) and instruction.check(answer.strip())


def run_instructions(
    chat: Chat, instructions: Sequence[VerifiableInstruction] | None = None
) -> list[InstructionAnswer]:
    """Ask all instructions, or the given ones. A refused one counts as wrong."""
    chosen = verifiable_instructions() if instructions is None else instructions
    answers: list[InstructionAnswer] = []
    for start in range(0, len(chosen), BATCH):
        batch = chosen[start : start + BATCH]
        replies = answer_all(chat, [one.question.messages for one in batch], MAX_TOKENS)
        for instruction, reply in zip(batch, replies, strict=True):
            question = instruction.question
            answers.append(
                InstructionAnswer(
                    id=question.id,
                    kind=question.kind,
                    group=question.group,
                    question=question.messages[-1].text,
                    raw=str(reply),
                    correct=isinstance(reply, str) and follows(instruction, reply),
                )
            )
    return answers


def summarise(answers: Sequence[InstructionAnswer]) -> dict[str, Rate]:
    """Return the rates of "all", "instructions" and "knowledge", if they have answers."""
    knowledge = [a.correct for a in answers if a.kind == "instruction_knowledge"]
    instructions = [a.correct for a in answers if a.kind != "instruction_knowledge"]
    parts = {"all": [*instructions, *knowledge], "instructions": instructions, "knowledge": knowledge}
    return {name: success_rate(part) for name, part in parts.items() if part}
