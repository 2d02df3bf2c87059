"""What the page brings along is what npm has, to the byte; and our own scripts are typed as their comments say."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

from ops.vendor import FILES, MODULES, ROOT, VENDOR, write


def test_the_vendored_files_are_those_of_npm(tmp_path: Path) -> None:
    assert MODULES.is_dir(), "the npm packages are missing: run npm ci"
    write(MODULES, tmp_path / "vendor")
    fresh = {each.name: each.read_bytes() for each in (tmp_path / "vendor").iterdir()}
    assert fresh == {each.name: each.read_bytes() for each in VENDOR.iterdir()}


def test_versions_licences_and_hashes_are_on_record() -> None:
    pinned = json.loads((ROOT / "package.json").read_text())["dependencies"]
    records = json.loads((VENDOR / "versions.json").read_text())
    assert {each["name"]: each["version"] for each in records} == pinned
    assert set(pinned) == set(FILES)
    for each in records:
        assert hashlib.sha256((VENDOR / each["file"]).read_bytes()).hexdigest() == each["sha256"]
        assert each["license"]
        assert (VENDOR / f"{each['name']}.LICENSE.txt").stat().st_size > 500


def test_the_scripts_of_the_page_agree_with_their_types() -> None:
    compiler = MODULES / ".bin" / "tsc"
    assert compiler.exists(), "TypeScript is missing: run npm ci"
    checked = subprocess.run([compiler, "-p", ROOT / "tsconfig.json"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    own = [*(ROOT / "streamchat/static").glob("*.js"), *(ROOT / "streamchat/static/page").glob("*.js")]
    assert all(each.read_text().startswith("// @ts-check\n") for each in own)


def test_the_client_imports_nothing() -> None:
    assert "\nimport " not in (ROOT / "streamchat" / "static" / "streamchat.js").read_text()
