"""Corpora for Stage I: the messages format, curation, and questions about our own scenes."""

from blm.corpora.build import SceneCorpusConfig, build_scene_corpus
from blm.corpora.curation import CurationReport, curate
from blm.corpora.messages import Conversation, read_corpus, write_corpus

__all__ = [
    "Conversation",
    "CurationReport",
    "SceneCorpusConfig",
    "build_scene_corpus",
    "curate",
    "read_corpus",
    "write_corpus",
]
