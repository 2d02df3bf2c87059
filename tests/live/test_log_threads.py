"""The log under gunicorn's threaded worker: resumed and stopped from another server, and nothing is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fake_upstream import Gate
from tests.live.pair import STORES, ask, cancel, look, pair_over, resume, seqs, text_of, words

pytestmark = pytest.mark.live


@pytest.mark.parametrize("kind", STORES)
def test_threads_keep_resume_and_stop_answers_as_greenlets_do(kind: str, tmp_path: Path) -> None:
    threaded = ("-k", "gthread", "--threads", "20")
    with pair_over(kind, tmp_path, *threaded, users=True, on_disconnect="finish") as pair:
        gate = Gate()
        message = pair.model.say("resumed", words(0, 5), gate, words(5, 9))
        with ask(pair.first, message, "ann") as caller:
            before = caller.until(3)
        with resume(pair.second, caller.id, 3, "ann") as reader:
            gate.open()
            told = before + reader.rest()
        assert seqs(told) == list(range(len(told)))
        assert text_of(told) == "".join(words(0, 9))
        assert look(pair.second, caller.id, "ann")["status"] == "completed"
        held = Gate()
        message = pair.model.say("stopped", words(0, 5), held, words(5, 9))
        with ask(pair.first, message, "ann") as caller:
            caller.until(3)
            assert cancel(pair.second, caller.id, "ann")["status"] == "cancelled"
            assert caller.rest()[-1]["code"] == "cancelled"
        held.open()
        pair.wait_for_none()
        for server in (pair.first, pair.second):
            assert "Traceback" not in server.log
