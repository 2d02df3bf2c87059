"""What a piece costs in instructions: the same on every machine, so that a slower way of a piece is seen in any run."""

from __future__ import annotations

import pytest

from tests.live import instructions

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]  # where the deployment's environment is not there yet

# By the Python that counts, then by format. Written by `python -m tests.live.instructions`.
RECORDED: dict[str, dict[str, int]] = {
    "3.11 x86_64 plain": {"text/plain": 118802, "text/event-stream": 142102},
}
SPARE = 0.10  # runs differ by less than one in a hundred
CEILING = 250_000  # for any other Python


def test_a_piece_takes_as_many_instructions_as_are_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    found, recorded = instructions.count(), RECORDED.get(instructions.build())
    assert set(found) == set(instructions.FORMATS)
    if recorded is None:
        with capsys.disabled():
            print(f"\nNo figure is recorded for Python {instructions.build()}; {found} is held against a ceiling only.")
        assert max(found.values()) < CEILING
        return
    for accept, figure in found.items():
        assert abs(figure - recorded[accept]) <= SPARE * recorded[accept], (
            f"{figure} instructions a piece of {accept}, {recorded[accept]} are recorded. "
            "If that is meant: python -m tests.live.instructions"
        )


def test_a_machine_without_valgrind_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(AssertionError, match="install Debian's package valgrind"):
        instructions.count()
