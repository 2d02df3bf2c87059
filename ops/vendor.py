"""`python -m ops.vendor`: the npm packages that the chat page brings along become files of this package.

package.json pins the versions, `npm ci` has fetched them; licences, versions and hashes are written beside the files.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = ROOT / "node_modules"
VENDOR = ROOT / "streamchat" / "static" / "vendor"
# As it is in the package, and as it is here. No build: what is served is what was published.
FILES = {
    "marked": ("lib/marked.esm.js", "marked.js"),
    "dompurify": ("dist/purify.es.mjs", "purify.js"),
    "remend": ("dist/index.js", "remend.js"),
}


class NotFetched(Exception):
    """There is no such package in node_modules."""


def main() -> None:
    try:
        print(f"{VENDOR.relative_to(ROOT)}: {', '.join(write(MODULES, VENDOR))}")
    except NotFetched as failure:
        sys.exit(f"vendor: {failure}")


def write(modules: Path, vendor: Path) -> list[str]:
    """Writes all of it anew. Returns each package's name and version."""
    shutil.rmtree(vendor, ignore_errors=True)
    vendor.mkdir(parents=True)
    records = [copy(modules / name, vendor, name) for name in FILES]
    (vendor / "versions.json").write_text(json.dumps(records, indent=2) + "\n")
    return [f"{record['name']} {record['version']}" for record in records]


def copy(package: Path, vendor: Path, name: str) -> dict[str, str]:
    if not package.is_dir():
        raise NotFetched(f"{name} is not in node_modules: run npm ci")
    described = json.loads((package / "package.json").read_text())
    source, target = FILES[name]
    shutil.copyfile(package / source, vendor / target)
    shutil.copyfile(package / "LICENSE", vendor / f"{name}.LICENSE.txt")
    return {
        "name": name,
        "version": described["version"],
        "license": described["license"],
        "source": source,
        "file": target,
        "sha256": hashlib.sha256((vendor / target).read_bytes()).hexdigest(),
    }


if __name__ == "__main__":
    main()
