"""An untrained nano continues a text as it went on before."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from blm.backbone import build_nano


@cache
def untrained(seed: int):
    return build_nano(seed=seed)


def decoded(seed: int, ids: torch.Tensor):
    backbone = untrained(seed)
    text = backbone.model.base_model.language_model
    text.config._attn_implementation = "eager"
    with torch.no_grad():
        made = text(inputs_embeds=text.embed_tokens(ids), output_attentions=True)
        return made.attentions, made.last_hidden_state @ text.embed_tokens.weight.T


@pytest.mark.parametrize("seed", range(3))
def test_half_of_the_heads_attend_to_previous_tokens_and_half_copy(seed):
    ids = torch.randperm(300, generator=torch.Generator().manual_seed(seed))[None, :30] + 10
    attentions, logits = decoded(seed, torch.cat([ids, ids], dim=1))
    for head, back in ((0, 1), (1, 1), (2, 2), (3, 2)):
        assert attentions[0][0, head].diagonal(-back)[10:].mean() > 0.9
    again = torch.arange(32, 59)
    found = attentions[1][0][:, again, again - 29].mean(-1)
    assert found[:2].min() > 0.3 and found[2:].max() < 0.1, found
    right = (logits[0, again].argmax(-1) == ids[0, again - 29]).float().mean()
    assert right > 0.1, "chance is 1 in 400"


def test_induction_heads_match_two_tokens():
    """Names share words: what followed "red cube" is found, not what followed "red ball" or "blue cube"."""
    found = torch.zeros(4)
    for seed in range(50):
        red, blue, cube, ball, *others = (
            torch.randperm(380, generator=torch.Generator().manual_seed(seed)) + 10
        ).tolist()
        a, b, c, d, *before = others[:8]
        text = [*before, red, ball, a, blue, cube, b, red, cube, c, blue, ball, d, red, cube]
        attentions, _ = decoded(0, torch.tensor([text]))
        found += attentions[1][0, :2, -1, [6, 9, 12, 15]].mean(0) / 50
    assert found[2] > 0.4 and found[[0, 1, 3]].max() < 0.2, found
