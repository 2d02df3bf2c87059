"""docs/clients.md is true: each of its blocks reads a whole answer from a real server."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.clients.node import FOLDER
from tests.documents import blocks, read, run
from tests.fake_upstream import FakeUpstream, answer
from tests.live.servers import Server

TEXT = read("clients.md")
IN_NODE, IN_PYTHON = blocks(TEXT, "js"), blocks(TEXT)


def run_in_node(block: str, address: str) -> str:
    program = shutil.which("node")
    assert program, "Node is missing: install Debian's package npm"
    script = f"const ADDRESS = {address!r};\n" + block.replace('from "ai"', 'from "ai7"')
    command = [program, "--input-type=module", "-e", script]
    return subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.parametrize("block", IN_NODE)
def test_a_block_for_node_reads_the_answer(block: str, servers: dict[str, Server], upstream: FakeUpstream) -> None:
    upstream.choose = None
    upstream.script = answer(["Hello ", "reader"])
    assert "reader" in run_in_node(block, servers["keeping"].url)


@pytest.mark.parametrize("block", IN_PYTHON)
def test_a_block_for_python_reads_the_answer(
    block: str, servers: dict[str, Server], upstream: FakeUpstream, capsys: pytest.CaptureFixture[str]
) -> None:
    upstream.choose = None
    upstream.script = answer(["Hello ", "reader"])
    names = run(block, "clients.md", ADDRESS=servers["keeping"].url)
    if "client" in names:
        names["client"].close()
    assert capsys.readouterr().out == "Hello reader"
