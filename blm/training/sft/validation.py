"""Validate a corpus once for a training: in parallel, resumable, and kept with the corpus.

    corpora/robots/validated/<rows>/                     scan.json places.npy media.json
    corpora/robots/validated/<rows>/<media>/             media.npy media-faults.json
    corpora/robots/validated/<rows>/<media>/<limits>/    index.npy manifest.json

Each folder is named after the content that its files depend on: the rows, the names, sizes and times
of the media files, and the tokenizer with the limits. So nothing becomes stale: a change of the
limits measures the rows again, and a changed picture decodes all media again. Process 0 validates
with worker processes; the others open the same index and compare its hash.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from blm.backbone import Backbone
from blm.backbone.outline import BackboneOutline, save_outline
from blm.corpora.format.faults import Fault
from blm.corpora.format.media_index import check_media, media_signature
from blm.corpora.format.messages import corpus_file
from blm.corpora.format.scan import Scan, limit_faults, scan_in_parts
from blm.corpora.format.validated import FORMAT, MANIFEST, ValidatedCorpus
from blm.io import sha256_file, write_array
from blm.jobs import MAX_WORKERS
from blm.training.caches.processes import by_first
from blm.training.loop.distributed import Processes
from blm.training.run_inputs import require_same_facts, run_together
from blm.training.sft.measure import MeasureSetup, measure_rows, sizes_only
from blm.training.sft.sampling import sample_lengths
from blm.training.sft.tokenize import TokenizationConfig

FOLDER = "validated"
"""Folder of the validations, in the corpus folder."""
NAME_LENGTH = 16


@dataclass(frozen=True, kw_only=True)
class Validator:
    """Validates corpora for one training."""

    backbone: Backbone | None
    """The backbone to train; None checks the format and the media only."""
    limits: TokenizationConfig
    out: Path
    """Folder of the run; validations are stored there if the corpus folder cannot be written."""
    processes: Processes
    workers: int = 0
    """Number of worker processes that validate for each training process; 0: none."""
    sample: int = 500
    """Conversations that are measured before the whole corpus."""

    def validate(self, corpus: Path) -> ValidatedCorpus:
        """Return the validation of a corpus, from its folder if nothing has changed.

        All processes call this. Raises BlmError, in every process, for a folder that is not a corpus,
        and if all sampled conversations are too long.
        """
        outline = self._outline()
        place = by_first(self.processes, self.out, lambda: str(self._validate(corpus, outline)))
        found = run_together(self.processes, lambda: ValidatedCorpus.load(Path(place), corpus))
        require_same_facts(self.processes, f"corpus '{corpus}'", {"validation": found.digest})
        return found

    def _outline(self) -> BackboneOutline | None:
        if self.backbone is None or not self.processes.first:
            return None
        return save_outline(self.backbone, self.out / "outline")

    def _validate(self, corpus: Path, outline: BackboneOutline | None) -> Path:
        """Validate a corpus; return the folder of the result."""
        rows = sha256_file(corpus_file(corpus))
        base = corpus if os.access(corpus, os.W_OK) else self.out / corpus.name
        folder = base / FOLDER / rows[:NAME_LENGTH]
        limits = _limits_key(outline, self.limits)
        known = list(folder.glob(f"*/{limits}/{MANIFEST}"))
        if outline is not None and not known and self.sample:
            self._sample(outline, corpus)
        scan = scan_in_parts(corpus, folder, workers=self._workers)
        references = scan.media()
        media = media_signature(corpus, references)
        folder /= media[:NAME_LENGTH]
        check_media(corpus, references, folder, workers=self._workers)
        folder /= limits
        if not (folder / MANIFEST).exists():
            setup = MeasureSetup(
                corpus=corpus,
                places=scan.folder / "places.npy",
                media=folder.parent,
                outline=outline,
                limits=self.limits,
            )
            self._measure(scan, setup, folder, f"{FORMAT} {rows} {media} {limits}")
        return folder

    @property
    def _workers(self) -> int:
        return min(self.workers * self.processes.count, os.cpu_count() or 1, MAX_WORKERS)

    def _sample(self, outline: BackboneOutline, corpus: Path) -> None:
        backbone = sizes_only(outline.load())
        sampled = sample_lengths(backbone, corpus, self.limits, self.sample)
        console = Console(stderr=True)
        console.print(sampled.summary, soft_wrap=True, highlight=False)
        if warning := sampled.warning:
            console.print(f"warning: {warning}", soft_wrap=True, highlight=False)

    def _measure(self, scan: Scan, setup: MeasureSetup, folder: Path, key: str) -> None:
        """Measure the rows, and write the index and its manifest."""
        index, faults, outcomes = measure_rows(setup, folder, workers=self._workers)
        write_array(folder / "index.npy", index)
        kept, counts = limit_faults(faults)
        every = sorted((*scan.faults, *kept), key=_line)
        digest = hashlib.sha256(f"{key} {sha256_file(folder / 'index.npy')}".encode()).hexdigest()
        ValidatedCorpus(
            folder=setup.corpus,
            index=folder / "index.npy",
            digest=digest,
            rows=scan.rows,
            bytes=corpus_file(setup.corpus).stat().st_size,
            faults=tuple(every),
            fault_counts=dict((Counter(scan.counts) + Counter(counts)).most_common()),
            outcomes=dict(outcomes),
            facts=scan.facts,
        ).save()
        for part in folder.glob("rows-*.npy"):
            part.unlink()


def _line(fault: Fault) -> int:
    return int(fault.where.rpartition(":")[2])


def _limits_key(outline: BackboneOutline | None, limits: TokenizationConfig) -> str:
    """Return a name for the tokenizer and the limits; "format" without a backbone."""
    if outline is None:
        return "format"
    text = json.dumps({"outline": outline.digest, **asdict(limits)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:NAME_LENGTH]
