"""Fixtures: a pretended GPU, and backbones of several model families."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from blm.backbone import Backbone
from tests.support.backbones import MAKERS
from tests.support.pretended_gpu import PretendedGpu
from tests.support.pretended_gpu.comparison import twin


@pytest.fixture
def gpu() -> Iterator[PretendedGpu]:
    with PretendedGpu() as machine:
        yield machine


@pytest.fixture(scope="module")
def made() -> dict[str, Backbone]:
    return {}


@pytest.fixture
def backbone(request: pytest.FixtureRequest, made: dict[str, Backbone]) -> Backbone:
    if request.param not in made:
        made[request.param] = MAKERS[request.param]()
    return twin(made[request.param])
