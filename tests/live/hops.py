"""nginx between the caller and the server: as shipped, and as an old one that speaks HTTP/1.0 to the server."""

from __future__ import annotations

from collections.abc import Callable


def speak_http10(configuration: str) -> str:
    """An old hop: nginx before 1.29.7 as its defaults are, or told so."""
    assert configuration.count("proxy_http_version 1.1;") == 1
    return configuration.replace("proxy_http_version 1.1;", "proxy_http_version 1.0;")


HOPS: dict[str, Callable[[str], str] | None] = {"nginx": None, "nginx by HTTP/1.0": speak_http10}
