"""One server a case: all tests of a case share it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.neighbours.cases import Case, Shop, opened


class Starts:
    """Starts the next case while the tests of one run: most of a start is a worker that imports."""

    def __init__(self, cases: list[Case], folders: pytest.TempPathFactory) -> None:
        self._cases, self._folders = cases, folders
        self._started: dict[Case, tuple[ExitStack, Shop]] = {}

    def start(self, case: Case) -> tuple[ExitStack, Shop]:
        if case not in self._started:
            stack = ExitStack()
            self._started[case] = stack, stack.enter_context(opened(case, self._folders.mktemp("neighbours")))
        return self._started[case]

    def start_after(self, case: Case) -> None:
        for following in self._cases[self._cases.index(case) + 1 :][:1]:
            self.start(following)

    def end(self, case: Case) -> None:
        self._started.pop(case)[0].close()

    def end_all(self) -> None:
        for case in list(self._started):
            self.end(case)


@pytest.fixture(scope="session")
def starts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starts]:
    specs = [item.callspec for item in request.session.items if hasattr(item, "callspec")]
    cases = [spec.params["shop"] for spec in specs if isinstance(spec.params.get("shop"), Case)]
    starts = Starts(list(dict.fromkeys(cases)), tmp_path_factory)
    yield starts
    starts.end_all()


@pytest.fixture(scope="session")
def shop(request: pytest.FixtureRequest, starts: Starts) -> Iterator[Shop]:
    _, shop = starts.start(request.param)
    starts.start_after(request.param)
    yield shop
    starts.end(request.param)


@pytest.fixture(autouse=True)
def _no_answer_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each question that reached the model has its record: what one test leaves would be seen by the next."""
    yield
    if "shop" in request.fixturenames:
        shop: Shop = request.getfixturevalue("shop")
        shop.last_record()
