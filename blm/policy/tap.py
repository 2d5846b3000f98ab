"""How a policy obtains H_k: the tapped block, the pooling, and the order of the control prompt."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from blm.backbone.model import MultimodalModel
from blm.backbone.prefix_cache import PrefixCache, why_not_exact
from blm.backbone.prompt import PromptOrder, require_order

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TapConfig:
    """The settings of H_k with which a policy was trained, and with which it acts."""

    layer: int
    """k, the block of the backbone that is tapped, counted from 1."""
    pool: int = 1
    """Side of the squares over which picture tokens of H_k are averaged."""
    prompt: PromptOrder = "pictures_first"
    """Order of text and images in the control prompt."""

    def __post_init__(self) -> None:
        require_order(self.prompt)

    def prefix_cache(self, model: MultimodalModel) -> PrefixCache | None:
        """Return a cache for the texts of control prompts; None if the pictures come first.

        Also None, with a warning, for a model for which cached states are not exact.
        """
        if self.prompt != "text_first":
            return None
        if reason := why_not_exact(model):
            log.warning("every decision reads its whole prompt, whose text is not cached: %s", reason)
            return None
        return PrefixCache(model, self.layer)
