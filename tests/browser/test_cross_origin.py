"""Pages of other sites spend nobody's money: whatever they send from a visitor's browser, the model is not asked."""

from __future__ import annotations

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.browser.conftest import Foreign, ask
from tests.fake_upstream import FakeUpstream
from tests.live.servers import Server

BODY = '{"message": "Spend!"}'
TRIES = {
    "fetch of JSON": "fetch(URL, {method: 'POST', headers: {'Content-Type': 'application/json'}, body: BODY})",
    "fetch with cookies": "fetch(URL, {method: 'POST', credentials: 'include', body: BODY,"
    " headers: {'Content-Type': 'application/json'}})",
    "fetch of text": "fetch(URL, {method: 'POST', body: BODY})",
    "fetch without CORS": "fetch(URL, {method: 'POST', mode: 'no-cors', body: BODY})",
    "fetch of a JSON blob without CORS": "fetch(URL, {method: 'POST', mode: 'no-cors',"
    " body: new Blob([BODY], {type: 'application/json'})})",
    "beacon": "navigator.sendBeacon(URL, new Blob([BODY], {type: 'text/plain'}))",
    "form of text": "form('text/plain')",
    "form of fields": "form('application/x-www-form-urlencoded')",
    "form of files": "form('multipart/form-data')",
    "fetch of an address": "fetch(URL + '?message=Spend!', {mode: 'no-cors'})",
}
# A form of text/plain sends name=value: this name and value make JSON of it.
FORM = """
function form(enctype) {
  const element = document.createElement("form");
  Object.assign(element, {method: "POST", action: URL, enctype});
  const input = document.createElement("input");
  Object.assign(input, {name: '{"message": "Spend!", "context": {"', value: '": 1}}'});
  element.append(input);
  document.body.append(element);
  element.submit();
}
"""


@pytest.mark.parametrize("how", TRIES)
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])  # another site; and another port of the same site
def test_another_page_makes_no_call_to_the_model(
    page: Page, server: Server, upstream: FakeUpstream, foreign: Foreign, host: str, how: str
) -> None:
    foreign.page = "<body></body>"
    page.goto(f"http://{host}:{foreign.server.port}/")
    target = f"{server.url}/api/get-response"
    script = f"const URL = '{target}', BODY = '{BODY}'; {FORM} return await {TRIES[how]};"
    if how.startswith("form"):
        with page.expect_navigation(url=target):
            page.evaluate(f"() => {{ {script.replace('await', '')} }}")
    elif how == "beacon":
        with page.expect_event("response"):
            page.evaluate(f"async () => {{ {script} }}")
    else:
        page.evaluate(f"async () => {{ try {{ {script} }} catch {{}} }}")
    # An own question afterwards: whatever was sent before it has been judged by then.
    page.goto(server.url)
    ask(page, "Mine.")
    expect(page.get_by_role("log")).to_contain_text("Hello, world!")
    assert [each.message for each in upstream.requests] == ["Mine."]


def test_the_page_may_not_be_framed_by_another_site(context: BrowserContext, server: Server, foreign: Foreign) -> None:
    foreign.page = f"<iframe src='{server.url}'></iframe>"
    page = context.new_page()
    with page.expect_console_message(lambda message: "frame-ancestors" in message.text):
        page.goto(f"http://localhost:{foreign.server.port}/")
    assert page.frames[1].locator("#message").count() == 0


def test_the_page_lets_nothing_but_its_own_server_be_loaded(page: Page, server: Server) -> None:
    response = page.goto(server.url)
    assert response is not None
    policy = response.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
