"""The page by axe-core's rules, in every state, light and dark; and what a screen reader is told while text grows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import ask
from tests.browser.test_page import CUT, gated, newest
from tests.fake_upstream import FakeUpstream, Hang, answer, error, head
from tests.live.servers import Server

AXE = Path(__file__).parents[2] / "node_modules" / "axe-core" / "axe.min.js"
RICH = (
    "# Title\n\nSome **bold**, `code`, a [link](https://example.org/) and\n\n> a quotation\n\n- one\n- [x] two\n\n"
    "| a | b |\n|---|--:|\n| 1 | 2 |\n\n```python\n" + "print('a line that is wide') " * 9 + "\n```\n"
)


def show_answer(page: Page, upstream: FakeUpstream) -> None:
    upstream.script = answer([RICH])
    ask(page)
    expect(newest(page)).to_have_attribute("data-state", "done")


def show_waiting(page: Page, upstream: FakeUpstream) -> None:
    upstream.script = [head(), Hang()]
    ask(page)
    expect(newest(page)).to_have_attribute("data-state", "waiting")


def show_cut(page: Page, upstream: FakeUpstream) -> None:
    upstream.script = CUT
    ask(page)
    expect(newest(page)).to_have_attribute("data-state", "cut")


def show_limited(page: Page, upstream: FakeUpstream) -> None:
    upstream.script = error(429, headers={"Retry-After": "600"})
    ask(page)
    expect(newest(page)).to_have_attribute("data-state", "limited")


def show_token(page: Page, upstream: FakeUpstream) -> None:
    page.locator("#token").evaluate("(dialog) => dialog.showModal()")


STATES: dict[str, Callable[[Page, FakeUpstream], None]] = {
    "empty": lambda page, upstream: None,
    "answer": show_answer,
    "waiting": show_waiting,
    "cut": show_cut,
    "limited": show_limited,
    "token": show_token,
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("state", STATES)
def test_axe_finds_nothing_serious(
    browser: Browser, server: Server, upstream: FakeUpstream, state: str, scheme: str
) -> None:
    assert AXE.exists(), "axe-core is missing: run npm ci"
    # axe is a script of the test's, which the page's own policy would not let in.
    page = browser.new_page(color_scheme=scheme, bypass_csp=True, reduced_motion="reduce")  # type: ignore[arg-type]
    page.goto(server.url)
    STATES[state](page, upstream)
    page.add_script_tag(content=AXE.read_text())
    violations = page.evaluate("axe.run().then((results) => results.violations)")
    page.close()
    found = [(each["id"], each["impact"], [node["html"] for node in each["nodes"]]) for each in violations]
    assert [each for each in found if each[1] in ("serious", "critical")] == []
    assert found == []


def test_a_screen_reader_is_told_finished_blocks_and_not_every_token(chat: Page, upstream: FakeUpstream) -> None:
    """Live regions speak what is added to them: finished blocks are, the growing one says aria-live=off."""
    gates, upstream.script = gated("One two", " three.\n\nFour", " five.")
    chat.evaluate("""() => {
      window.spoken = [];
      const log = document.querySelector("[role=log]");
      new MutationObserver((records) => {
        for (const {target, addedNodes} of records) {
          const element = target instanceof Element ? target : target.parentElement;
          if (element?.closest("[aria-live=off]")) continue;
          for (const node of addedNodes) window.spoken.push(node.textContent.trim());
        }
      }).observe(log, {subtree: true, childList: true, characterData: true});
    }""")
    gates[0].open()
    ask(chat, "Count!")
    expect(newest(chat)).to_contain_text("One two")
    for gate in gates[1:]:
        gate.open()
    expect(newest(chat)).to_have_attribute("data-state", "done")
    spoken = [each for each in chat.evaluate("spoken") if "One" in each or "Four" in each]
    assert spoken == ["One two three.", "Four five."]


def test_names_and_roles_are_those_that_are_promised(chat: Page, upstream: FakeUpstream) -> None:
    upstream.scripts.append(CUT)
    expect(chat.get_by_role("textbox", name="Message", exact=True)).to_be_visible()
    expect(chat.get_by_role("button", name="Send", exact=True)).to_be_visible()
    expect(chat.get_by_role("log")).to_have_count(1)
    ask(chat)
    for name in ("Retry", "Copy"):
        expect(chat.get_by_role("log").get_by_role("button", name=name, exact=True)).to_be_visible()
    upstream.scripts.append([head(), Hang()])
    chat.get_by_role("button", name="Retry", exact=True).click()
    expect(chat.get_by_role("button", name="Stop", exact=True)).to_be_visible()
