import pytest
import torch

from blm.bridge import BridgeConfig, Perceiver
from blm.types import BlmError

B, L, D = 3, 11, 20
CONFIG = BridgeConfig(width=16, latents=4, blocks=2, heads=2)


@pytest.fixture
def bridge() -> Perceiver:
    torch.manual_seed(0)
    return Perceiver(CONFIG, D)


@pytest.fixture
def prompt() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([L, 7, 4])
    return torch.randn(B, L, D, generator=generator), torch.arange(L) < lengths[:, None]


def test_shape(bridge, prompt):
    assert bridge(*prompt).shape == (B, 4, 16)


def test_padding_content_and_amount_do_not_matter(bridge, prompt):
    hidden, mask = prompt
    z = bridge(hidden, mask)
    changed = torch.where(mask[..., None], hidden, 1e3 * torch.ones(()))
    torch.testing.assert_close(bridge(changed, mask), z)
    torch.testing.assert_close(bridge(hidden[2:, :4], mask[2:, :4]), z[2:])


def test_order_of_positions_and_side_of_padding_do_not_matter(bridge, prompt):
    hidden, mask = prompt
    order = torch.randperm(L, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(bridge(hidden[:, order], mask[:, order]), bridge(hidden, mask))
    torch.testing.assert_close(bridge(hidden.flip(1), mask.flip(1)), bridge(hidden, mask))


def test_gradient_reaches_every_parameter_and_only_real_positions(bridge, prompt):
    hidden, mask = prompt
    hidden.requires_grad_(True)
    bridge(hidden, mask)[..., 0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in bridge.parameters() if p.ndim > 1)
    assert (hidden.grad[~mask] == 0).all() and (hidden.grad[mask].abs().sum(-1) > 0).all()


def test_config_refuses_heads_that_do_not_divide_the_width():
    with pytest.raises(BlmError, match="multiple of heads"):
        BridgeConfig(width=10, heads=4)
