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
BLOCKS_OF = SHOWN.replace(
    "[frozen.innerHTML, tail.innerHTML]",
    "[...frozen.children].map((each) => ({tag: each.tagName, class: each.className, text: each.innerText}))",
)
WORDS = [f"word{number}" for number in range(1500)]
LONG = {
    "paragraph": ("P", " ".join(WORDS)),
    "list": ("UL", "\n".join(f"- {word}" for word in WORDS)),
    "numbered list": ("OL", "\n".join(f"1. {word}" for word in WORDS)),
    "table": ("DIV", "|a|\n|-|\n" + "\n".join(f"|{word}|" for word in WORDS)),
    "code": ("FIGURE", "```\n" + "\n".join(WORDS) + "\n```\n"),
    "quotation": ("BLOCKQUOTE", "\n".join(f"> {word}" for word in WORDS)),
}
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


# What comes at once is taken on in steps of so many characters: markdown.js' STEP_CHARS.
STEP = 500
SHOWN_BEHIND = """async ([module, text, step]) => {
  const {Markdown} = await import(module);
  return Array.from({length: text.length}, (_, place) => {
    const [frozen, tail] = [document.createElement("div"), document.createElement("div")];
    const markdown = new Markdown(frozen, tail);
    markdown.append("x".repeat(step - place - 2) + "\\n\\n" + text);
    markdown.end();
    while (!markdown.render());
    frozen.firstElementChild.remove();
    return frozen.innerHTML.trimStart();
  });
}"""


@pytest.mark.parametrize("name", HARD)
def test_a_text_is_shown_alike_wherever_in_an_answer_it_stands(chat: Page, server: Server, name: str) -> None:
    """Behind so many other characters that a step ends at each of its places."""
    alone, _ = shown(chat, server, HARD[name], 10_000)
    module = f"{server.url}/api/assets/page/markdown.js"
    assert set(chat.evaluate(SHOWN_BEHIND, [module, HARD[name], STEP])) == {alone}


@pytest.mark.parametrize("size", [13, 700])
@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_whole_documents_are_shown_alike_in_small_pieces_and_in_large_ones(
    chat: Page, server: Server, name: str, size: int
) -> None:
    text = (ROOT / name).read_text()
    at_once = shown(chat, server, text, 100_000)
    assert shown(chat, server, text, size) == at_once
    assert at_once[0].count("<h") > 1


@pytest.mark.parametrize("size", [200, 100_000])
@pytest.mark.parametrize("kind", LONG)
def test_a_long_block_that_was_cut_is_one_block_again(chat: Page, server: Server, kind: str, size: int) -> None:
    """So a screen reader counts one list, and code is read and copied as one."""
    tag, text = LONG[kind]
    module = f"{server.url}/api/assets/page/markdown.js"
    blocks = chat.evaluate(BLOCKS_OF, [module, text, size])
    assert [(each["tag"], each["class"] in ("", "wide")) for each in blocks] == [(tag, True)]
    assert [each for each in blocks[0]["text"].replace("Copy code", " ").split() if each.startswith("word")] == WORDS


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
