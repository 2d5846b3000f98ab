"""Public corpora for Stage I of pretrained backbones: what they hold, and how to place them.

Nothing is downloaded here. A corpus is present when `FOLDER/NAME` is a corpus folder, as `blm
corpus convert` writes it. The paper does not name its corpora; its gains point to the first five
(docs/stage1.md). Numbers of rows are those that the publishers or others report; we have not
counted them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from blm.corpora.format.faults import RowError
from blm.corpora.format.messages import CORPUS_FILE, Conversation, scan_corpus
from blm.types import BlmError, lookup

CHECKED_ROWS = 200
"""Rows at the beginning of a corpus that are read before a run begins."""
HUB = "https://huggingface.co/datasets/"


@dataclass(frozen=True, kw_only=True)
class PublicCorpus:
    """A published corpus that one of our converters reads."""

    holds: str
    """What the questions are about."""
    origin: str
    """Where it is published."""
    layout: str
    """Files below the download folder that the converter needs."""
    convert: str
    """Arguments of `blm corpus convert`; DOWNLOAD and CORPORA stand for the two folders."""
    licence: str
    rows: int | None = None
    """Reported number of rows."""
    note: str = ""
    """What to know before training on it."""

    def steps(self, corpora: Path) -> str:
        """Return where to get the corpus and how to place it, as text."""
        command = self.convert.replace("CORPORA", str(corpora))
        return f"get {self.origin} ({self.layout}), then run `blm corpus convert {command}`"


def _cosmos(name: str, holds: str, rows: int, media: str) -> PublicCorpus:
    """Return one of the sets of the SFT data of Cosmos-Reason1."""
    return PublicCorpus(
        holds=holds,
        origin=f"{HUB}nvidia/Cosmos-Reason1-SFT-Dataset",
        layout=f"{name}/**/*.json; {media}",
        convert=f"cosmos_reason1 DOWNLOAD/{name} CORPORA/{name} --source-name {name}",
        licence="texts CC-BY-4.0; clips have their own licences",
        rows=rows,
        note="the numbers of rows are second-hand",
    )


ELSEWHERE = "its clips come from the original data set, by file name anywhere below the folder"
PUBLIC_CORPORA: dict[str, PublicCorpus] = {
    "sharerobot": PublicCorpus(
        holds="planning, affordance and success questions about up to 30 frames of robot episodes",
        origin=f"{HUB}BAAI/ShareRobot",
        layout="planning/train/*.json, planning/images/rt_frames_success/ unpacked",
        convert="sharerobot DOWNLOAD/planning/train CORPORA/sharerobot",
        licence="see the card; its frames come from 23 sets of Open X-Embodiment",
        rows=1_027_990,
        note="run `blm corpus sharerobot DOWNLOAD` first, and curate with --evaluation, to keep the "
        "held-out episodes out (docs/digital.md)",
    ),
    "robovqa": _cosmos(
        "robovqa", "questions about clips of robots and people at work", 1_140_000, "clips included"
    ),
    "agibot": _cosmos("agibot", "next subtasks in clips of a humanoid", 38_900, ELSEWHERE),
    "holoassist": _cosmos("holoassist", "egocentric clips of people at a task", 273_000, ELSEWHERE),
    "bridgev2": _cosmos("bridgev2", "clips of a table-top robot arm", 258_000, ELSEWHERE),
    "refspatial": PublicCorpus(
        holds="spatial relations and pointing in photos, scans and simulated rooms",
        origin=f"{HUB}JingkunAn/RefSpatial",
        layout="JSON files with `conversations`, and their image folders",
        convert="robopoint DOWNLOAD/FILE.json CORPORA/refspatial --media DOWNLOAD --source-name refspatial",
        licence="Apache-2.0; images from OpenImages and CA-1M",
        rows=2_500_000,
        note="points 0..1 become integers 0..1000, as ours. The published files themselves were not tried",
    ),
    "robopoint": PublicCorpus(
        holds="pointing to objects and free space, and general questions",
        origin=f"{HUB}wentao-yuan/robopoint-data",
        layout="a JSON file with `conversations`, and its image folder",
        convert="robopoint DOWNLOAD/FILE.json CORPORA/robopoint --media DOWNLOAD --source-name robopoint",
        licence="see the card",
        note="points 0..1 become integers 0..1000, as ours. The published files themselves were not tried",
    ),
    "general": PublicCorpus(
        holds="general questions about pictures: LLaVA-Instruct, LLaVA-NeXT, Cambrian, ALLaVA, ..",
        origin=f"{HUB}liuhaotian/LLaVA-Instruct-150K, or any set of LLaVA's format",
        layout="a JSON, JSONL or parquet file with `conversations`, and the images that it refers to",
        convert="llava DOWNLOAD/FILE.json CORPORA/general --media DOWNLOAD --source-name general",
        licence="see the card; texts written by GPT models and images have their own terms",
        note="for language and vision in general. Parquet files of LLaVA-OneVision (llava) and FineVision "
        "(finevision) are read as they are",
    ),
}
"""Name -> corpus. The folder of each is named after it."""


@dataclass(frozen=True, kw_only=True)
class PlacedCorpus:
    """One corpus of a mixture: its name, folder and weight."""

    name: str
    folder: Path
    weight: float

    @property
    def present(self) -> bool:
        """Whether the folder exists."""
        return self.folder.exists()

    @property
    def advice(self) -> str:
        """Where to get a missing corpus and how to place it."""
        if self.name in PUBLIC_CORPORA:
            return PUBLIC_CORPORA[self.name].steps(self.folder.parent)
        return f"put a corpus folder (`blm corpus convert`) at {self.folder}"


def place(text: str, folder: Path) -> PlacedCorpus:
    """Return the corpus that NAME:WEIGHT or PATH:WEIGHT stands for.

    A name of `PUBLIC_CORPORA` is looked for in `folder`; anything with a slash is a path. Raises
    BlmError for an unknown name and a weight that is not positive.
    """
    name, colon, weight = text.rpartition(":")
    try:
        number = float(weight) if colon else 1.0
    except ValueError:
        name, number = text, 1.0
    name = name if colon else text
    if not 0 < number < float("inf"):
        raise BlmError(f"the weight of corpus '{name}' is {number:g}; it must be positive, or leave it out")
    if "/" in name:
        return PlacedCorpus(name=Path(name).name, folder=Path(name), weight=number)
    lookup("public corpus", name, PUBLIC_CORPORA)
    return PlacedCorpus(name=name, folder=folder / name, weight=number)


def require_sound(corpus: PlacedCorpus) -> list[Conversation]:
    """Return the first conversations of a present corpus.

    Raises BlmError that names file and line, for a folder that is no corpus, is empty or has a
    faulty row. Later rows and the media are checked when they are read.
    """
    place = f"corpus '{corpus.name}' is present but faulty"
    if not (corpus.folder / CORPUS_FILE).is_file():
        raise BlmError(
            f"{place}: '{corpus.folder / CORPUS_FILE}' is missing; {corpus.advice}, or move the folder away"
        )
    rows = list[Conversation]()
    for number, row in scan_corpus(corpus.folder):
        if isinstance(row, RowError):
            raise BlmError(f"{place}: {corpus.folder / CORPUS_FILE}:{number}: {row}")
        rows.append(row)
        if len(rows) == CHECKED_ROWS:
            break
    if not rows:
        raise BlmError(f"{place}: '{corpus.folder / CORPUS_FILE}' has no row; {corpus.advice}")
    return rows
