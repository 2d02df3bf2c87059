"""What a model writes is text: no script of it runs, and nothing that it names is loaded, looked up, or obeyed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

import pytest
from playwright.sync_api import Browser, Dialog, Page, Request, expect

from tests.browser.conftest import Foreign, ask
from tests.browser.payloads import PAYLOADS
from tests.fake_upstream import FakeUpstream, RecordedRequest, Step, answer
from tests.live.servers import Server

COUNT_HITS = "window.hits = 0; window.hit = () => { window.hits += 1; };"
# What a page shows of an answer, for whoever can see it: no element but these, no attribute but these.
TAGS = {
    "A",
    "BLOCKQUOTE",
    "BR",
    "BUTTON",
    "CODE",
    "DEL",
    "DIV",
    "EM",
    "FIGCAPTION",
    "FIGURE",
    "H3",
    "H4",
    "H5",
    "H6",
    "HR",
}
TAGS |= {"LI", "OL", "P", "PRE", "STRONG", "TABLE", "TBODY", "TD", "TH", "THEAD", "TR", "UL"}
ATTRIBUTES = {"align", "aria-label", "aria-live", "class", "href", "rel", "role", "start", "tabindex", "target", "type"}
CLASSES = {"wide", "continued", "goes-on", ""}
INVENTORY = """(root) => [...root.querySelectorAll("*")].map((each) => ({
  tag: each.tagName, names: each.getAttributeNames(), class: each.className, protocol: each.protocol ?? "",
  href: each.getAttribute("href"), rel: each.getAttribute("rel"),
}))"""


class Tab:
    """A page that notes dialogs, runs of `hit()`, and every request that leaves for another site."""

    def __init__(self, page: Page, own: str) -> None:
        self.page = page
        self.dialogs: list[str] = []
        self.strays: list[str] = []
        page.add_init_script(COUNT_HITS)
        self.own = own
        page.on("dialog", self._dialog)
        page.on("request", self._request)

    def _dialog(self, dialog: Dialog) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def _request(self, request: Request) -> None:
        if not request.url.startswith(self.own):
            self.strays.append(request.url)

    @property
    def hits(self) -> int:
        return int(self.page.evaluate("window.hits"))

    def harm(self, foreign: Foreign) -> list[object]:
        return [self.hits, self.dialogs, self.strays, foreign.asked]


NO_HARM: list[object] = [0, [], [], []]


def echo(request: RecordedRequest) -> Step:
    """The payload whose number is asked for, in pieces of every size from 1 up."""
    payload = PAYLOADS[int(request.message)]
    return answer(list(pieces(payload, 1 + int(request.message) % 7)))


def pieces(text: str, size: int) -> Iterator[str]:
    return (text[start : start + size] for start in range(0, len(text), size))


def check_inventory(elements: Iterable[dict[str, object]]) -> None:
    for each in elements:
        assert each["tag"] in TAGS, each
        assert set(each["names"]) <= ATTRIBUTES, each  # type: ignore[call-overload]
        assert set(str(each["class"]).split(" ")) <= CLASSES, each
        if each["href"] is not None:
            assert each["protocol"] in ("http:", "https:", "mailto:"), each
            assert each["rel"] == "noopener noreferrer nofollow", each


def open_bare(page: Page, origin: str) -> None:
    """An empty page of an origin, which forbids nothing."""
    page.route(f"{origin}/bare", lambda route: route.fulfill(content_type="text/html", body="<main></main>"))
    page.goto(f"{origin}/bare")


def test_the_list_has_sixty_payloads_and_more() -> None:
    assert len(set(PAYLOADS)) == len(PAYLOADS) >= 60


def test_no_payload_in_an_answer_runs_or_asks_or_leaves_the_page_changed(
    page: Page, server: Server, upstream: FakeUpstream, foreign: Foreign
) -> None:
    tab = Tab(page, server.url)
    upstream.choose = echo
    page.goto(server.url)
    for number, payload in enumerate(PAYLOADS):
        ask(page, str(number))
        page.locator(f"section:nth-of-type({2 * number + 2})[data-state=done]").wait_for()
        assert tab.harm(foreign) == NO_HARM, payload
    for shown in page.locator(".frozen").all():
        check_inventory(shown.evaluate(INVENTORY))
    # What comes late (timers, refreshes, lazy loads) has had its chance: the page still works.
    upstream.choose = lambda _: answer(["All well."])
    ask(page, "Still there?")
    expect(page.get_by_role("log")).to_contain_text("All well.")
    assert tab.harm(foreign) == NO_HARM
    assert page.url == f"{server.url}/"


def test_the_cleaning_alone_stops_every_payload_without_a_policy_of_the_page(
    page: Page, server: Server, foreign: Foreign
) -> None:
    """The second line of defence, seen by itself: raw HTML goes in, and no Content-Security-Policy helps."""
    tab = Tab(page, server.url)
    open_bare(page, server.url)
    module = f"{server.url}/api/assets/page/markdown.js"
    for payload in PAYLOADS:
        script = f"""async () => {{
          const {{clean}} = await import({json.dumps(module)});
          document.querySelector("main").replaceChildren(clean({json.dumps(payload)}));
        }}"""
        page.evaluate(script)
        check_inventory(page.locator("main").evaluate(INVENTORY))
        assert tab.harm(foreign) == NO_HARM, payload


def test_the_same_payloads_do_harm_where_nothing_cleans_them(browser: Browser, foreign: Foreign) -> None:
    """So the detectors of the tests above detect."""
    foreign.page = "<main></main>"
    page = browser.new_page()
    tab = Tab(page, foreign.url)
    hits = 0
    for payload in PAYLOADS:
        if "http-equiv" not in payload:  # which would take this very test to another page
            page.goto(foreign.url)
            page.evaluate("(html) => { document.querySelector('main').innerHTML = html; }", payload)
            page.evaluate("() => new Promise((resolve) => setTimeout(resolve, 10))")
            hits += bool(tab.hits)
    page.close()
    assert hits >= 15
    assert len({url for url in tab.strays if "evil.test" in url}) >= 10
    assert any("evil.test" in each for each in foreign.asked)


@pytest.mark.parametrize(
    ("written", "href"),
    [
        ("[a](https://example.org/x?y=1)", "https://example.org/x?y=1"),
        ("<http://example.org/>", "http://example.org/"),
        ("www.example.org", "http://www.example.org"),
        ("[a](mailto:someone@example.org)", "mailto:someone@example.org"),
        ("![a picture](https://example.org/p.png)", "https://example.org/p.png"),
    ],
)
def test_good_links_lead_where_they_say(chat: Page, upstream: FakeUpstream, written: str, href: str) -> None:
    upstream.script = answer([written])
    ask(chat)
    link = chat.get_by_role("log").get_by_role("link")
    expect(link).to_have_attribute("href", href)
    expect(link).to_have_attribute("rel", "noopener noreferrer nofollow")


def test_what_the_model_writes_as_html_is_shown_as_it_was_written(chat: Page, upstream: FakeUpstream) -> None:
    upstream.script = answer(["Use <b>bold</b>, &amp; not ", "<script>alert(1)</script>."])
    ask(chat)
    expect(chat.get_by_role("log")).to_contain_text("Use <b>bold</b>, & not <script>alert(1)</script>.")
