"""What tests do with a document: its blocks of code, its generated parts, its headings and links; and the apps in it.

Knows no document in particular.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flask import Flask

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^(?: {4}|\t).*$", re.MULTILINE)
HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)
LINK = re.compile(r"!?\[(?:[^\]\[]|!?\[[^\]]*\]\([^)]*\))*\]\(([^)\s]+)\)")
MADE = re.compile(r"<!-- (\w+) -->\n(.*?)<!-- /\1 -->", re.DOTALL)


def read(name: str) -> str:
    """A document of docs/."""
    return (DOCS / name).read_text()


def documents() -> list[Path]:
    """All Markdown that a reader is given."""
    return sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob("bench/*.md")])


def blocks(text: str, language: str = "python") -> list[str]:
    """The fenced blocks of a language, in their order."""
    return [body for kind, body in FENCE.findall(text) if kind == language]


# --- generated parts --------------------------------------------------------------------------------------


def made_parts(text: str) -> dict[str, str]:
    """What stands between `<!-- name -->` and `<!-- /name -->`, by its name."""
    return {name: body.strip("\n") for name, body in MADE.findall(text)}


def filled(text: str, makers: Mapping[str, Callable[[], str]]) -> str:
    """The text with those of its parts made anew that have a maker."""

    def fill(found: re.Match[str]) -> str:
        name = found[1]
        return f"<!-- {name} -->\n{makers[name]()}\n<!-- /{name} -->" if name in makers else found[0]

    return MADE.sub(fill, text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0].replace("|  |", "| |"), "|" + "---|" * len(head), *lines[1:]])


# --- headings and links -----------------------------------------------------------------------------------


def prose(text: str) -> str:
    """The text without its code: what stands there is no link and no heading."""
    return re.sub(r"`[^`\n]+`", "`code`", INDENTED.sub("", FENCE.sub("", text)))


def anchors(text: str) -> set[str]:
    """What a link to a heading may name, as GitHub makes it: lower case, words and dashes, a number from the second."""
    found: dict[str, int] = {}
    made = set()
    for heading in HEADING.findall(FENCE.sub("", text)):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        count = found[slug] = found.get(slug, -1) + 1
        made.add(f"{slug}-{count}" if count else slug)
    return made


def links(text: str) -> list[str]:
    """Where the links and images of a text lead, to other hosts too."""
    return LINK.findall(prose(text))


def dead_links(document: Path) -> Iterator[str]:
    """The links into this project that lead nowhere."""
    for link in links(document.read_text()):
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            yield link


# --- programs ---------------------------------------------------------------------------------------------


def run(block: str, name: str, **known: Any) -> dict[str, Any]:
    """The names that a block has when it has run; those of `known` are there before."""
    names: dict[str, Any] = {"__name__": "shop", **known}
    exec(compile(block, name, "exec", dont_inherit=True), names)  # not the imports of this file from __future__
    return names


def app_of(block: str, name: str, **known: Any) -> Flask:
    """The app that a block makes, as `app`."""
    app = run(block, name, **known)["app"]
    assert isinstance(app, Flask)
    return app


@contextmanager
def closing_mounts(app: Flask) -> Iterator[Flask]:
    """The app, whose connections and threads end with the block."""
    try:
        yield app
    finally:
        for mount in app.extensions.get("streamchat", {}).values():
            mount.close()
