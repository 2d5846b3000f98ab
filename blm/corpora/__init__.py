"""Corpora for Stage I: the messages format, curation, and questions about our own scenes."""

from blm.corpora.build import SceneCorpusConfig, build_scene_corpus
from blm.corpora.curation import CurationReport, curate
from blm.corpora.messages import Conversation, load_image, read_corpus, with_pixels, write_corpus

__all__ = [
    "Conversation",
    "CurationReport",
    "SceneCorpusConfig",
    "build_scene_corpus",
    "curate",
    "load_image",
    "read_corpus",
    "with_pixels",
    "write_corpus",
]
