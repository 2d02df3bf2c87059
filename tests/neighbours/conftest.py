"""One server a case: all tests of a case share it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.neighbours.cases import Shop, opened


@pytest.fixture(scope="session")
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with opened(request.param, tmp_path_factory.mktemp("neighbours")) as shop:
        yield shop


@pytest.fixture(autouse=True)
def _no_answer_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each question that reached the model has its record: what one test leaves would be seen by the next."""
    yield
    if "shop" in request.fixturenames:
        shop: Shop = request.getfixturevalue("shop")
        shop.last_record()
