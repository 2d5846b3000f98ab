"""Corpora for Stage I: format, converters, curation, validation and scene questions."""

from blm.corpora.converters import CONVERTERS, ConverterConfig, convert
from blm.corpora.curation.report import CurationReport
from blm.corpora.curation.steps import (
    CurationConfig,
    EvaluationSet,
    Source,
    curate,
    curate_sources,
    write_curated,
)
from blm.corpora.format.messages import Conversation, read_corpus, read_questions, scan_corpus
from blm.corpora.format.validate import clean_corpus, validate_corpus
from blm.corpora.format.writing import write_corpus
from blm.corpora.scenes.build import SceneCorpusConfig, build_scene_corpus

__all__ = [
    "CONVERTERS",
    "Conversation",
    "ConverterConfig",
    "CurationConfig",
    "CurationReport",
    "EvaluationSet",
    "SceneCorpusConfig",
    "Source",
    "build_scene_corpus",
    "clean_corpus",
    "convert",
    "curate",
    "curate_sources",
    "read_corpus",
    "read_questions",
    "scan_corpus",
    "validate_corpus",
    "write_corpus",
    "write_curated",
]
