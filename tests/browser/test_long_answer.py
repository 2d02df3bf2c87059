"""Long answers stay smooth: while 20,000 words stream, no task of the page's main thread takes 50 ms.

A task is measured by the processor time that it took, as Chromium's trace has it: other programs share the cores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from tests.browser.conftest import ask
from tests.fake_upstream import FakeUpstream, done, event, finish, head, http_chunk, last_chunk

WORDS = 20_000
LONGEST_MS = 50  # what the Long Tasks specification calls long
PIECE_CHARS = 12
READ_CHARS = 300  # pieces that arrive together

# For the record: by the clock, as the browser itself reports tasks of 50 ms and more.
OBSERVE = """
window.longTasks = [];
new PerformanceObserver((list) => {
  for (const {duration} of list.getEntries()) window.longTasks.push(Math.round(duration));
}).observe({type: "longtask", buffered: true});
"""

SENTENCE = "The *sea* was calm and **the wind** came from `the west`, as it often does in autumn. "
SHAPES = {
    "articles": "## A heading\n\n"
    + SENTENCE * 6
    + "\n\n- "
    + SENTENCE
    + "\n- "
    + SENTENCE
    + "\n\n```python\nfor wave in sea:\n"
    "    print(wave)\n```\n\n| Name | Height |\n|---|---|\n| calm | 0.1 |\n| storm | 9.5 |\n\n",
    "one paragraph": "word ",
    "sentences of one paragraph": SENTENCE,
    "one list": "- " + SENTENCE + "\n",
    "one code block": "    result = first_value + second_value  # a comment of some words\n",
    "one table": "| a wave of the sea | came from the west | in autumn |\n",
}
OPENINGS = {"one code block": "```python\n", "one table": "| What | Where | When |\n|---|---|---|\n"}


def text_of(shape: str) -> str:
    unit = SHAPES[shape]
    return OPENINGS.get(shape, "") + unit * (WORDS // len(re.findall(r"\w+", unit)) + 1)


def batches(text: str) -> Iterator[bytes]:
    """The answer as an upstream at full speed writes it: small pieces, many in a read."""
    pieces = (text[start : start + PIECE_CHARS] for start in range(0, len(text), PIECE_CHARS))
    while batch := list(islice(pieces, READ_CHARS // PIECE_CHARS)):
        yield http_chunk(b"".join(event({"content": piece}) for piece in batch))


def main_thread_tasks(trace: bytes) -> list[float]:
    """Milliseconds of processor time of each task, from a trace of one page. Chromium leaves out a time of 0."""
    events: list[dict[str, Any]] = json.loads(trace)["traceEvents"]
    names = [each for each in events if each["name"] == "thread_name"]
    mains = {(each["pid"], each["tid"]) for each in names if each["args"]["name"] == "CrRendererMain"}
    tasks = [each for each in events if each["ph"] == "X" and each["name"] == "ThreadControllerImpl::RunTask"]
    return [each.get("tdur", 0) / 1000 for each in tasks if (each["pid"], each["tid"]) in mains]


@pytest.mark.parametrize("shape", SHAPES)
def test_twenty_thousand_words_stream_without_a_long_task(
    browser: Browser, chat: Page, upstream: FakeUpstream, shape: str
) -> None:
    upstream.choose = lambda _: [head(), batches(text_of(shape)), finish(), done(), last_chunk()]
    chat.evaluate(OBSERVE)
    browser.start_tracing(page=chat, categories=["toplevel"])
    ask(chat, "A long answer, please.")
    # Not expect(): while that waits, it describes the whole page again and again, in tasks of its own.
    chat.locator(".answer[data-state=done]").wait_for(timeout=60_000)
    tasks = main_thread_tasks(browser.stop_tracing())
    print(f"{shape}: longest {max(tasks):.0f} ms of {len(tasks)} tasks; by the clock {chat.evaluate('longTasks')}")
    assert len(re.findall(r"\w+", chat.locator(".answer").text_content() or "")) > WORDS * 0.9
    assert len([task for task in tasks if task]) > 100
    assert max(tasks) < LONGEST_MS
