"""conf/nginx.conf becomes a copy with other ports, paths and account: for `./serve --nginx` and for tests.

Changes what is named here and nothing else; what is no longer in the file is an error, so the copy cannot drift.
"""

import os
import re
from pathlib import Path

SHIPPED = Path(__file__).parent.parent / "conf" / "nginx.conf"
# nginx makes all of these folders when it starts, whatever the configuration uses.
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def write_copy(folder: Path, *, listen: str, upstream: str, limits: bool = True) -> Path:
    """The copy, in `folder` with its logs and temporary files. `limits=False` leaves out what one address may do."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / "nginx.conf"
    copy.write_text(_render(SHIPPED.read_text(), folder, listen, upstream, limits))
    return copy


def command(nginx: str, copy: Path) -> list[str]:
    """nginx in the foreground on such a copy; what it says before it has read the copy goes beside it, too."""
    folder = copy.parent
    return [nginx, "-e", f"{folder}/error.log", "-p", str(folder), "-c", str(copy), "-g", "daemon off;"]


def _render(text: str, folder: Path, listen: str, upstream: str, limits: bool) -> str:
    for old, new in _changes(folder, listen, upstream).items():
        if text.count(old) != 1:
            raise ValueError(f"conf/nginx.conf has {old!r} {text.count(old)} times, not once")
        text = text.replace(old, new)
    return text if limits else re.sub(r"^ *limit_(conn|req) .*;$", "", text, flags=re.MULTILINE)


def _changes(folder: Path, listen: str, upstream: str) -> dict[str, str]:
    temporary = " ".join(f'{kind}_temp_path "{folder}/{kind}";' for kind in TEMPORARY)
    # Only root may choose the account; for anybody else nginx stays who it is and warns about the line.
    account = "user root;" if os.geteuid() == 0 else ""
    return {
        "user www-data;\n": f"{account}\n",
        "pid /run/nginx.pid;": f'pid "{folder}/nginx.pid";',
        "error_log /var/log/nginx/error.log ": f'error_log "{folder}/error.log" ',
        "access_log /var/log/nginx/access.log ": f'access_log "{folder}/access.log" ',
        "http {\n": f"http {{\n    {temporary}\n",
        "listen 80 sndbuf": f"listen {listen} sndbuf",
        "server 127.0.0.1:8000;": f"server {upstream};",
    }
