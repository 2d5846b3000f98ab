"""A corpus that was validated: an index of its rows without faults, named after its content."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from blm.corpora.format.faults import Fault, summarise
from blm.corpora.format.messages import CORPUS_FILE
from blm.corpora.format.row_index import CorpusRows
from blm.corpora.format.scan import CorpusFacts
from blm.io import read_json, sha256_file, write_json
from blm.types import BlmError

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class ValidatedCorpus:
    """The result of validating a corpus, with or without a backbone."""

    folder: Path
    """Corpus folder."""
    index: Path
    """The .npy file (`MEASURED`) of the rows without faults."""
    digest: str
    """Hash of the index and of all that it depends on; equal corpora, media and limits have the same."""
    rows: int
    """Number of rows, with faults or without."""
    bytes: int
    """Size of the corpus file."""
    faults: tuple[Fault, ...]
    """At most 100 of each reason."""
    fault_counts: Mapping[str, int]
    """Reason -> number of rows."""
    outcomes: Mapping[str, int]
    """What tokenisation did with the rows (kept, cut, dropped); empty without a backbone."""
    facts: CorpusFacts

    def open(self) -> CorpusRows:
        """Return the rows without faults, which are read when they are used."""
        return CorpusRows(self.folder, self.index)

    def require_clean(self, *, skip_bad: bool) -> None:
        """Raise BlmError, with counts and places, if rows have faults, or if no row is left.

        With `skip_bad`, faults are only reported on stderr.
        """
        require_clean(self.folder, self.rows, self.faults, self.fault_counts, skip_bad=skip_bad)

    def save(self) -> None:
        """Write the manifest beside the index."""
        fields = {**asdict(self), "folder": str(self.folder), "index": self.index.name, "format": FORMAT}
        fields["index_sha256"] = sha256_file(self.index)
        write_json(self.index.parent / MANIFEST, fields)

    @classmethod
    def load(cls, folder: Path, corpus: Path) -> ValidatedCorpus:
        """Open a validation of `corpus` in `folder`.

        Raises BlmError if the index or the corpus file is not the one that was validated.
        """
        found = read_json(folder / MANIFEST)
        index = folder / found["index"]
        same = index.is_file() and sha256_file(index) == found["index_sha256"]
        if not same or (corpus / CORPUS_FILE).stat().st_size != found["bytes"]:
            raise BlmError(
                f"'{folder}' is not the validation of '{corpus}', or was altered: move it away, run again"
            )
        return cls(
            folder=corpus,
            index=index,
            digest=found["digest"],
            rows=found["rows"],
            bytes=found["bytes"],
            faults=tuple(Fault(**fault) for fault in found["faults"]),
            fault_counts=found["fault_counts"],
            outcomes=found["outcomes"],
            facts=CorpusFacts.from_json(found["facts"]),
        )


def require_clean(
    folder: Path, rows: int, faults: tuple[Fault, ...], counts: Mapping[str, int], *, skip_bad: bool
) -> None:
    """Raise BlmError if a corpus of `rows` rows has faults (reported, with `skip_bad`) or no row left."""
    bad = sum(counts.values())
    summary = f"{bad} of {rows} rows of '{folder}' have faults"
    listed = summarise(faults, counts)
    if bad == rows:
        raise BlmError(f"{summary}; no row is left\n{listed}".rstrip())
    if bad and not skip_bad:
        raise BlmError(
            f"{summary}; fix them (`blm corpus validate {folder}` lists them) or skip them (--skip-bad):\n"
            f"{listed}"
        )
    if bad:
        Console(stderr=True).print(f"{summary}, skipped:\n{listed}", highlight=False, markup=False)
