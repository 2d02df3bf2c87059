"""The chat page as a person uses it: asking, reading, stopping, trying again, and what it says when things go wrong."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Locator, Page, expect

from tests.browser.conftest import ask
from tests.browser.shop import RETRY_AFTER
from tests.fake_upstream import (
    FakeUpstream,
    Fin,
    Gate,
    Hang,
    Step,
    answer,
    chunk,
    done,
    error,
    finish,
    head,
    last_chunk,
    text,
)
from tests.live.servers import Server, gunicorn

TOKEN = "a-token-for-the-page"


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


def log(page: Page) -> Locator:
    return page.get_by_role("log")


def newest(page: Page) -> Locator:
    return page.locator(".answer").last


def expect_state(page: Page, state: str) -> None:
    expect(newest(page)).to_have_attribute("data-state", state)


def gated(*parts: str) -> tuple[list[Gate], list[Step]]:
    """A whole answer with a gate before each part, and one before its end."""
    gates = [Gate() for _ in range(len(parts) + 1)]
    steps: list[Step] = [head()]
    for gate, part in zip(gates, parts, strict=False):
        steps += [gate, text(part)]
    return gates, [*steps, gates[-1], finish(), done(), last_chunk()]


CUT: list[Step] = [head(), text("The first half, and"), Fin()]


def test_an_answer_is_seen_to_grow(chat: Page, upstream: FakeUpstream) -> None:
    gates, upstream.script = gated("Once upon", " a time", ".")
    ask(chat, "A story, please.")
    expect(log(chat)).to_contain_text("A story, please.")
    expect(log(chat)).to_contain_text("Waiting")
    gates[0].open()
    expect(newest(chat)).to_contain_text("Once upon")
    expect(newest(chat)).to_contain_text("Writing")
    gates[1].open()
    expect(newest(chat)).to_contain_text("Once upon a time")
    for gate in gates:
        gate.open()
    expect(newest(chat)).to_contain_text("Once upon a time.")
    expect_state(chat, "done")
    expect(button(chat, "Retry")).to_be_hidden()


def test_a_conversation_is_sent_as_a_whole(chat: Page, upstream: FakeUpstream) -> None:
    for question in ("First?", "Second?"):
        ask(chat, question)
        expect_state(chat, "done")
    assert upstream.requests[-1].body["messages"] == [
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": "Hello, world!"},
        {"role": "user", "content": "Second?"},
    ]
    button(chat, "New chat").click()
    expect(log(chat)).to_be_empty()
    ask(chat, "Third?")
    expect_state(chat, "done")
    assert [each["content"] for each in upstream.requests[-1].body["messages"]] == ["Third?"]


@pytest.mark.parametrize("silent", [True, False])
@pytest.mark.parametrize("by", ["button", "key"])
def test_stop_closes_the_call_to_the_model(chat: Page, upstream: FakeUpstream, by: str, silent: bool) -> None:
    upstream.script = [head(), *([] if silent else [text("Once upon a time")]), Hang()]
    ask(chat)
    request = upstream.wait_for_requests(1)[0]
    if not silent:
        expect(newest(chat)).to_contain_text("Once upon")
    before = time.monotonic()
    button(chat, "Stop").click() if by == "button" else chat.keyboard.press("Escape")
    assert request.wait_left(5) - before < 2
    expect_state(chat, "stopped")
    expect(newest(chat)).to_contain_text("Stopped")
    expect(button(chat, "Send")).to_be_visible()
    expect(button(chat, "Stop")).to_be_hidden()
    expect(button(chat, "Retry")).to_be_visible()


def test_a_cut_answer_shows_as_cut_off_and_can_be_retried(chat: Page, upstream: FakeUpstream) -> None:
    upstream.scripts.extend([CUT, answer(["The whole of it."])])
    ask(chat)
    expect_state(chat, "cut")
    expect(newest(chat)).to_contain_text("The first half, and")
    expect(newest(chat)).to_contain_text("Cut off")
    button(chat, "Retry").click()
    expect(newest(chat)).to_contain_text("The whole of it.")
    expect_state(chat, "done")
    expect(log(chat)).not_to_contain_text("The first half")
    assert [each.message for each in upstream.requests] == ["Hello?", "Hello?"]


def test_a_failure_before_the_first_word_is_told_in_words(chat: Page, upstream: FakeUpstream) -> None:
    upstream.scripts.append(error(500))
    ask(chat)
    expect_state(chat, "failed")
    expect(newest(chat)).to_contain_text("The model's provider failed.")
    button(chat, "Retry").click()
    expect_state(chat, "done")


def test_what_a_retry_cannot_mend_has_no_retry(chat: Page, upstream: FakeUpstream) -> None:
    upstream.script = error(400, "context_length_exceeded")
    ask(chat)
    expect_state(chat, "failed")
    expect(newest(chat)).to_contain_text("too long")
    expect(button(chat, "Retry")).to_be_hidden()


def test_a_busy_server_says_when_to_come_back(chat: Page, upstream: FakeUpstream) -> None:
    upstream.script = error(429, headers={"Retry-After": "600"})
    ask(chat)
    expect_state(chat, "limited")
    expect(newest(chat)).to_contain_text(re.compile(r"The model is busy, try again in (600|59\d) s"))


def test_without_a_network_the_page_says_network_error(
    chat: Page, context: BrowserContext, upstream: FakeUpstream
) -> None:
    context.set_offline(True)
    ask(chat)
    expect_state(chat, "failed")
    expect(newest(chat)).to_contain_text("Network error")
    context.set_offline(False)
    button(chat, "Retry").click()
    expect_state(chat, "done")


def test_a_server_that_dies_in_the_middle_cuts_the_answer_off(
    page: Page, upstream: FakeUpstream, tmp_path: Path
) -> None:
    upstream.script = [head(), text("Once upon a time"), Hang()]
    with gunicorn(upstream.base_url, tmp_path) as server:
        page.goto(server.url)
        ask(page)
        expect(newest(page)).to_contain_text("Once upon")
        (worker,) = server.workers()
        os.kill(worker, signal.SIGKILL)
    expect_state(page, "cut")
    expect(newest(page)).to_contain_text("Cut off")


def test_the_end_of_an_answer_that_grew_too_long_is_named(chat: Page, upstream: FakeUpstream) -> None:
    upstream.script = answer(["As long as it"], finish_reason="length")
    ask(chat)
    expect(newest(chat)).to_contain_text("longest length")


def test_reasoning_is_kept_apart_from_the_answer(chat: Page, upstream: FakeUpstream) -> None:
    pieces = [chunk({"reasoning_content": "Let me <b>see</b>."}), text("Seen.")]
    upstream.script = [head(), *pieces, finish(), done(), last_chunk()]
    ask(chat)
    expect_state(chat, "done")
    expect(newest(chat).locator(".frozen")).to_have_text("Seen.")
    newest(chat).get_by_text("Reasoning").click()
    expect(newest(chat).locator("details")).to_contain_text("Let me <b>see</b>.")


# --- the hands ------------------------------------------------------------------------------------------


def test_enter_sends_and_shift_enter_begins_a_line(chat: Page, upstream: FakeUpstream) -> None:
    box = chat.get_by_role("textbox", name="Message")
    expect(box).to_be_focused()
    chat.keyboard.type("one")
    chat.keyboard.press("Shift+Enter")
    chat.keyboard.type("two")
    chat.keyboard.press("Enter")
    expect_state(chat, "done")
    assert upstream.requests[0].message == "one\ntwo"
    expect(box).to_have_value("")
    expect(box).to_be_focused()


def test_a_blank_message_is_not_sent(chat: Page, upstream: FakeUpstream) -> None:
    chat.get_by_role("textbox", name="Message").fill("  \n ")
    button(chat, "Send").click()
    expect(log(chat)).to_be_empty()


def test_copy_takes_the_text_as_the_model_wrote_it(chat: Page, upstream: FakeUpstream) -> None:
    written = "Some **bold** words:\n\n```python\nprint('hi')\n```\n\nEnd."
    upstream.script = answer([written[:20], written[20:]])
    ask(chat)
    button(chat, "Copy").click()
    expect(newest(chat)).to_contain_text("Copied")
    assert chat.evaluate("navigator.clipboard.readText()") == written
    button(chat, "Copy code").click()
    assert chat.evaluate("navigator.clipboard.readText()") == "print('hi')\n"


def test_a_long_code_block_is_copied_whole(chat: Page, upstream: FakeUpstream) -> None:
    """While it grows it stands in two parts."""
    code = "".join(f"line {number} of some code\n" for number in range(1500))
    gates, upstream.script = gated(f"```\n{code}", "```\n\nEnd.")
    gates[0].open()
    ask(chat)
    expect(newest(chat)).to_contain_text("line 1499 of some code")
    expect(newest(chat).locator("figure")).to_have_count(2)
    for parts in (2, 1):
        expect(newest(chat).locator("figure")).to_have_count(parts)
        expect(button(chat, "Copy code")).to_have_count(1)
        button(chat, "Copy code").click()
        assert chat.evaluate("navigator.clipboard.readText()") == code
        expect(button(chat, "Copied")).to_have_count(0)
        for gate in gates[1:]:
            gate.open()
        if parts == 2:
            expect_state(chat, "done")


def test_the_view_follows_until_the_reader_scrolls_up(chat: Page, upstream: FakeUpstream) -> None:
    paragraphs = "A paragraph.\n\n" * 60
    gates, upstream.script = gated(paragraphs, paragraphs, "The end.")
    end = "document.scrollingElement.scrollHeight - innerHeight - scrollY"
    gates[0].open()
    ask(chat)
    expect(newest(chat).locator("p", has_text="A paragraph.")).to_have_count(60)
    chat.wait_for_function(f"{end} < 2")
    chat.mouse.move(300, 300)
    chat.mouse.wheel(0, -400)
    expect(button(chat, "Latest")).to_be_visible()
    top = chat.evaluate("scrollY")
    gates[1].open()
    expect(newest(chat).locator("p", has_text="A paragraph.")).to_have_count(120)
    assert chat.evaluate("scrollY") == top
    button(chat, "Latest").click()
    chat.wait_for_function(f"{end} < 2")
    gates[2].open()
    gates[3].open()
    expect(newest(chat)).to_contain_text("The end.")
    chat.wait_for_function(f"{end} < 2")


def test_nothing_moves_while_the_text_grows(chat: Page, upstream: FakeUpstream) -> None:
    """What is finished stays where it is, also when the last block is finished, and when the buttons come."""
    parts = ["# One\n\nTwo **thr", "ee**\n\n- four\n- fi", "ve\n\n```\nsix\n", "```\n\nseven"]
    gates, upstream.script = gated(*parts)
    ask(chat)
    chat.evaluate("""() => {
        window.shifts = [];
        new PerformanceObserver((list) => {
          for (const entry of list.getEntries()) window.shifts.push(entry.value);
        }).observe({type: "layout-shift", buffered: false});
    }""")
    for gate, part in zip(gates, ["Two", "four", "six", "seven"], strict=False):
        gate.open()
        expect(newest(chat)).to_contain_text(part)
    composer = chat.locator("#composer").bounding_box()
    gates[-1].open()
    expect_state(chat, "done")
    assert chat.locator("#composer").bounding_box() == composer
    # The line under the text goes down with it; nothing else may move.
    assert sum(chat.evaluate("shifts")) < 0.1


def test_markdown_is_shown_as_it_is_meant(chat: Page, upstream: FakeUpstream) -> None:
    words = "## Ti|tle\n\nA **bo|ld** word, ~~gone~~, 20~25 or 30~35.\n\n3. three\n4. f|our\n\n"
    table = "/ a / b /\n/---|/--:/\n/ 1 / 2<br>3 /".replace("|", "").replace("/", "|")
    upstream.script = answer([*words.split("|"), table])
    ask(chat)
    expect_state(chat, "done")
    view = newest(chat)
    expect(view.get_by_role("heading", name="Title", level=4)).to_be_visible()
    expect(view.locator("strong")).to_have_text("bold")
    expect(view.locator("del")).to_have_text("gone")
    expect(view.locator("ol > li")).to_have_text(["three", "four"])
    expect(view.locator("ol")).to_have_attribute("start", "3")
    expect(view.get_by_role("cell")).to_have_text(["1", "23"])
    expect(view.get_by_role("cell").last).to_have_css("text-align", "right")


def test_a_marker_that_is_still_open_is_not_shown(chat: Page, upstream: FakeUpstream) -> None:
    gates, upstream.script = gated("Some **bold", "** words.")
    gates[0].open()
    ask(chat)
    expect(newest(chat).locator("strong")).to_have_text("bold")
    gates[1].open()
    gates[2].open()
    expect(newest(chat)).to_contain_text("Some bold words.")


# --- who may ask ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(upstream_server: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("guarded")
    with gunicorn(upstream_server.base_url, folder, public="false", tokens=f'["{TOKEN}"]') as server:
        yield server


def test_where_tokens_are_set_the_page_asks_for_one_and_keeps_it_for_the_tab(
    page: Page, guarded: Server, upstream: FakeUpstream, context: BrowserContext
) -> None:
    page.goto(guarded.url)
    ask(page, "May I?")
    field = page.get_by_label("Token", exact=True)
    field.fill("a wrong one")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("That token was not accepted.")
    field.fill(TOKEN)
    button(page, "Continue").click()
    expect_state(page, "done")
    page.reload()
    ask(page, "Again?")
    expect_state(page, "done")
    assert [each.message for each in upstream.requests] == ["May I?", "Again?"]
    stored = page.evaluate("[JSON.stringify(sessionStorage), JSON.stringify(localStorage), document.cookie]")
    assert TOKEN in stored[0]
    assert TOKEN not in stored[1] + stored[2]


def test_without_a_token_the_question_is_not_asked(page: Page, guarded: Server, upstream: FakeUpstream) -> None:
    page.goto(guarded.url)
    ask(page)
    button(page, "Cancel").click()
    expect_state(page, "failed")
    expect(newest(page)).to_contain_text("You are not signed in")
    assert upstream.requests == []


@pytest.fixture(scope="module")
def shop(upstream_server: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("shop")
    with gunicorn(upstream_server.base_url, folder, app="tests.browser.shop:create_app()") as server:
        yield server


def test_a_limit_shows_the_time_and_counts_down(page: Page, shop: Server, upstream: FakeUpstream) -> None:
    page.goto(f"{shop.url}/help/chat/")
    ask(page, "limited")
    expect_state(page, "limited")
    expect(newest(page)).to_contain_text(re.compile(rf"Limited, try again in [1-{RETRY_AFTER}] s"))
    expect(button(page, "Retry")).to_be_visible()
    expect(newest(page)).to_contain_text("Limited, try again now")
    assert upstream.requests == []


def test_a_shop_mounts_the_page_where_it_likes_with_its_words_and_its_csrf_token(
    page: Page, shop: Server, upstream: FakeUpstream
) -> None:
    page.goto(f"{shop.url}/help/chat/")
    expect(page).to_have_title("The shop's help")
    expect(page.get_by_text("How can we help?")).to_be_visible()
    ask(page)
    expect(newest(page)).to_contain_text("Hello, world!")


def test_the_page_of_a_blueprint_is_off_unless_it_is_asked_for(context: BrowserContext, shop: Server) -> None:
    assert context.request.get(f"{shop.url}/").status == 404


def test_a_shop_uses_the_client_in_a_page_of_its_own(page: Page, shop: Server, upstream: FakeUpstream) -> None:
    page.goto(f"{shop.url}/own")
    expect(page.locator("#output")).to_have_text("Hello, world!")


def test_a_narrow_screen_scrolls_sideways_nowhere(page: Page, server: Server, upstream: FakeUpstream) -> None:
    page.set_viewport_size({"width": 320, "height": 640})
    page.goto(server.url)
    wide = "| " + " | ".join(["a-wide-column"] * 12) + " |"
    upstream.script = answer([f"{'x' * 200}\n\n```\n{'y' * 300}\n```\n\n{wide}\n|{'-|' * 12}\n{wide}\n\n`{'z' * 200}`"])
    ask(page, "q" * 200)
    expect_state(page, "done")
    assert page.evaluate("document.scrollingElement.scrollWidth - document.scrollingElement.clientWidth") == 0
    expect(button(page, "Send")).to_be_in_viewport()
