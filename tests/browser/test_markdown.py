"""Text that comes in pieces is shown as it would be had it come at once: the pieces' borders mean nothing."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page

from tests.live.servers import ROOT, Server

SHOWN = """async ([module, text, size]) => {
  const {Markdown} = await import(module);
  const [frozen, tail] = [document.createElement("div"), document.createElement("div")];
  const markdown = new Markdown(frozen, tail);
  for (let place = 0; place < text.length; place += size) {
    markdown.append(text.slice(place, place + size));
    while (!markdown.render());
  }
  markdown.end();
  while (!markdown.render());
  return [frozen.innerHTML, tail.innerHTML];
}"""
HARD = {
    "a heading under its text": "Title\n===\n\nText\n---\n\nText\nand more\n",
    "a hash that is no heading": "Text\n#hashtag and text\n\n# Heading\n",
    "a list that becomes loose": "- one\n- two\n\n- three\n\n  more of three\n\nEnd",
    "lists in lists": "1. one\n   - a\n   - b\n     1. x\n2. two\n\n   paragraph\n3. three\n",
    "code in a list": "- one\n\n  ```python\n  a = 1\n\n  b = 2\n  ```\n\n- two\n",
    "a fence of tildes with backticks inside": "~~~md\n```\nx\n```\n~~~\n\nEnd\n",
    "indented code": "Text\n\n    one\n\n    two\n\nEnd\n",
    "a quotation with a list": "> - one\n> - two\n>\n> end\n\nText\n",
    "a table after its text": "Text\n| a | b |\n|:-|-:|\n| **1** | `2` |\n\nEnd\n",
    "a rule": "one\n\n---\n\ntwo\n\n***\n",
    "named links, known before": "[1]: https://example.org/\n\nSee [this][1].\n\nAnd [that][1].\n",
    "lines of windows": "one\r\n\r\n- two\r\n- three\r\n",
    "an emoji in halves": "A wave 🌊, and **another 🌊**.",
    "an unclosed fence": "```js\nlet a = 1;\n",
    "unclosed markers": "Some **bold and *more and `code and [a link](https://exa",
}


def shown(page: Page, server: Server, text: str, size: int) -> list[str]:
    result = page.evaluate(SHOWN, [f"{server.url}/api/assets/page/markdown.js", text, size])
    assert isinstance(result, list)
    return result


@pytest.mark.parametrize("name", HARD)
def test_the_borders_of_pieces_mean_nothing(chat: Page, server: Server, name: str) -> None:
    at_once = shown(chat, server, HARD[name], 10_000)
    assert at_once[0] and at_once[1] == ""
    for size in (1, 2, 3, 7):
        assert shown(chat, server, HARD[name], size) == at_once


# Known: one long list of the changelog is not shown alike in small pieces.
CHANGELOG = pytest.param("CHANGELOG.md", marks=pytest.mark.xfail(reason="a long list in small pieces", strict=False))


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", CHANGELOG])
def test_whole_documents_are_shown_alike_in_small_pieces_and_in_large_ones(
    chat: Page, server: Server, name: str
) -> None:
    text = (ROOT / name).read_text()
    at_once = shown(chat, server, text, 100_000)
    assert shown(chat, server, text, 13) == at_once
    assert at_once[0].count("<h") > 1


def test_nothing_of_a_long_block_is_lost_where_it_is_cut(chat: Page, server: Server) -> None:
    words = [f"word{number}" for number in range(3000)]
    texts = {
        "paragraph": " ".join(words),
        "list": "\n".join(f"- {word} and more" for word in words),
        "table": "|a|\n|-|\n" + "\n".join(f"|{word}|" for word in words),
        "code": "```\n" + "\n".join(words) + "\n```\n",
        "quotation": "\n".join(f"> {word}" for word in words),
    }
    for kind, text in texts.items():
        frozen, _ = shown(chat, server, text, 200)
        found = [each for each in frozen.replace("<", " ").replace(">", " ").split() if each.startswith("word")]
        assert found == words, kind
