"""Load the processors of transformers without torchvision, and save them whole."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, Idefics3Processor, SmolVLMProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available

from blm.backbone.video import FrameProcessor, video_settings


def load_processor(source: str) -> Any:
    """Load a processor that reads pictures; without torchvision, one that has no video part, which needs it.

    Qwen's gets `FrameProcessor` for that part, and its settings are saved with the folder. SmolVLM gets
    the processor of Idefics3, which it descends from: they read pictures alike, but SmolVLM's own asks for
    num2words and a video part. Both would cut a picture into up to 17 tiles of 64 or more tokens; that is
    switched off, as for frames of videos, so a picture costs the same whatever its size.
    """
    config = AutoConfig.from_pretrained(source)
    kind: Any = PROCESSOR_MAPPING[type(config)]
    if kind is SmolVLMProcessor:
        kind = Idefics3Processor
    if "video_processor" in kind.get_attributes() and not is_torchvision_available():
        processor = without_video(kind).from_pretrained(source)
        if settings := video_settings(source, config.model_type):
            processor.video_processor = FrameProcessor(settings)
    else:
        processor = kind.from_pretrained(source)
    if hasattr(processor.image_processor, "do_image_splitting"):
        processor.image_processor.do_image_splitting = False
    return processor


def without_video(kind: Any) -> Any:
    """Return the processor class `kind` with an image processor and a tokenizer only, under the same name.

    Its instances may be given a `FrameProcessor` as `video_processor`.
    transformers reads the parts of a processor off the signature of its constructor.
    """

    def init(
        self: Any, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
    ) -> None:
        kind.__init__(self, image_processor, tokenizer, None, chat_template=chat_template)

    def to_dict(self: Any) -> dict[str, Any]:
        """Add the settings of the video part, as a whole processor has them in processor_config.json."""
        part = getattr(self, "video_processor", None)
        video = {} if part is None else {"video_processor": dict(part.settings)}
        return {**kind.to_dict(self), **video}

    members = {"__init__": init, "to_dict": to_dict, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), members)
