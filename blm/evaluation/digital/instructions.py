"""Verifiable instructions and dialogues, to measure what fine-tuning preserves.

Two hundred instructions in the style of IFEval have one rule each that a program checks (Zhou et
al. 2023, arXiv:2311.07911, strict accuracy): no preamble is stripped and no emphasis removed. Some
of them check knowledge instead. Sixty questions of general dialogue have a key that a right answer
contains. All are text only; compare a fine-tuned model with its base model item by item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blm.evaluation.digital.answers import answer_all
from blm.evaluation.digital.probes.checks import Rule
from blm.evaluation.digital.probes.dialogues import DIALOGUES
from blm.evaluation.digital.probes.instructions import INSTRUCTIONS
from blm.evaluation.digital.probes.knowledge import KNOWLEDGE
from blm.evaluation.statistics import Difference, Rate, paired_difference, success_rate
from blm.types import Chat, Message, Question

MAX_TOKENS = 128
"""Maximum length of an answer [tokens]."""
BATCH = 20
"""Number of instructions per batch."""


@dataclass(frozen=True, kw_only=True)
class VerifiableInstruction:
    """A prompt, and the program that checks whether an answer follows its rule or contains its key."""

    question: Question
    check: Rule


@dataclass(frozen=True, kw_only=True)
class InstructionAnswer:
    """A model's answer to one instruction or question."""

    id: str
    kind: str
    """instruction_<family> or dialogue_<family>; the family "knowledge" checks knowledge."""
    group: str
    question: str
    raw: str
    """The answer, or the reason why there is none."""
    correct: bool


def verifiable_instructions() -> list[VerifiableInstruction]:
    """Return all instructions, in a fixed order: those with a rule, then those of knowledge."""
    return _numbered("instruction", (*INSTRUCTIONS, *KNOWLEDGE))


def dialogue_questions() -> list[VerifiableInstruction]:
    """Return the questions of general dialogue, in a fixed order."""
    return _numbered("dialogue", DIALOGUES)


def _numbered(name: str, rows: Sequence[tuple[str, str, Rule]]) -> list[VerifiableInstruction]:
    found = []
    for number, (family, prompt, check) in enumerate(rows):
        question = Question(
            id=f"{name}/{number:03d}",
            kind=f"{name}_{family}",
            messages=(Message("user", (prompt,)),),
            answer="",
            group=f"{name}/{number:03d}",
        )
        found.append(VerifiableInstruction(question=question, check=check))
    return found


def follows(instruction: VerifiableInstruction, answer: str) -> bool:
    """Return whether the unedited answer follows the rule. An empty answer never does."""
    return bool(answer.strip()) and instruction.check(answer.strip())


def run_instructions(
    chat: Chat, instructions: Sequence[VerifiableInstruction] | None = None
) -> list[InstructionAnswer]:
    """Ask all instructions and dialogues, or the given ones. A refused one counts as wrong."""
    everything = [*verifiable_instructions(), *dialogue_questions()]
    chosen = everything if instructions is None else instructions
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


def by_part(answers: Sequence[InstructionAnswer]) -> dict[str, list[InstructionAnswer]]:
    """Return the answers of "all", "instructions", "knowledge" and "dialogue", without empty parts."""
    parts: dict[str, list[InstructionAnswer]] = {
        name: [] for name in ("all", "instructions", "knowledge", "dialogue")
    }
    for answer in answers:
        dialogue = answer.kind.startswith("dialogue_")
        knowledge = answer.kind == "instruction_knowledge"
        part = "dialogue" if dialogue else "knowledge" if knowledge else "instructions"
        parts[part].append(answer)
        parts["all"].append(answer)
    return {name: part for name, part in parts.items() if part}


def summarise(answers: Sequence[InstructionAnswer]) -> dict[str, Rate]:
    """Return the rate of each part of `by_part`."""
    return {
        name: success_rate([answer.correct for answer in part]) for name, part in by_part(answers).items()
    }


def compare_parts(
    base: Sequence[InstructionAnswer], tuned: Sequence[InstructionAnswer]
) -> dict[str, Difference]:
    """Return the paired difference, tuned minus base, of each part; both answered the same prompts."""
    parts = by_part(base)
    return {
        name: paired_difference(
            [answer.correct for answer in part], [answer.correct for answer in parts[name]]
        )
        for name, part in by_part(tuned).items()
    }
