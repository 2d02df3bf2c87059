"""What to change for each finding, in each proxy: a table of advice. It knows no chain and decides nothing."""

from __future__ import annotations

PROXIES = ("nginx", "Apache", "Caddy", "HAProxy", "ALB", "Cloudflare", "Heroku")

# By what a response or a request says of the hops it passed: (header, a part of its value).
MARKS = {
    "nginx": ("server", "nginx"),
    "Apache": ("server", "apache"),
    "Caddy": ("via", "caddy"),
    "HAProxy": ("via", "haproxy"),
    "ALB": ("server", "awselb"),
    "Cloudflare": ("server", "cloudflare"),
    "Heroku": ("via", "vegur"),
}

# In the order of PROXIES.
_TABLE = {
    "buffered": (
        "`proxy_buffering off;`, and no `proxy_ignore_headers X-Accel-Buffering`. With nginx behind nginx, the inner"
        " one needs `proxy_pass_header X-Accel-Buffering;` or the outer one `proxy_buffering off;`.",
        "mod_proxy_http passes pieces on. Take out what collects them: mod_deflate, mod_buffer, mod_cache,"
        " `SecResponseBodyAccess` of mod_security.",
        "`reverse_proxy` passes on at once what has no Content-Length. Leave the path out of `encode`; no"
        " `response_buffers`; no `flush_interval -1`, which keeps answers running when callers leave.",
        "`option http-no-delay`; no `filter compression` and no `filter cache` for the path.",
        "It holds nothing back in front of instances and addresses; a Lambda target is collected whole.",
        "Response Buffering off (Network); a Cache Rule that bypasses the cache for the path.",
        "The router holds nothing back: look at what stands in front of gunicorn in the dyno.",
    ),
    "compressed": (
        "`gzip off;` for the path (and `brotli off;` where that module is loaded).",
        '`SetEnvIf Request_URI "/diagnostics/|/get-response|/chat" no-gzip no-brotli`.',
        "Leave the path out of `encode` by a matcher.",
        "No `compression algo` in the backend of the path.",
        "It compresses nothing: look at the hop behind it.",
        'A Compression Rule for the path: "Disable compression".',
        "The router compresses nothing: look at the hop behind it.",
    ),
    "http10": (
        '`proxy_http_version 1.1;` and `proxy_set_header Connection "";`: HTTP/1.0 is the default before 1.29.7.',
        "No `SetEnv force-proxy-request-1.0`, and no `proxy-nokeepalive` beside it.",
        "`transport http { versions 1.1 }`, which is within its default.",
        "It speaks HTTP/1.1 by itself: an HTTP/1.0 hop stands before or behind it.",
        "Protocol version HTTP1 of the target group (that is HTTP/1.1).",
        "It speaks HTTP/1.1 to the origin: look at the hop behind it.",
        "The router speaks HTTP/1.1: look at what stands in front of gunicorn in the dyno.",
    ),
    "swallowed": (
        "No `error_page` or `proxy_intercept_errors` on the path, no cache or `proxy_store`; HTTP/1.1 on every hop.",
        "No `SetEnv force-proxy-request-1.0`; no output filter that rewrites the path.",
        "Nothing to set; look for a plugin that rewrites responses.",
        "Nothing to set in `mode http`; in `mode tcp` it passes an end on as it is.",
        "Nothing to set in front of instances and addresses; a Lambda target hides it.",
        "No Worker or Snippet that rewrites the body of the path.",
        "Nothing to set: look at what stands in front of gunicorn in the dyno.",
    ),
    "silence": (
        "`proxy_read_timeout 600s;` (60 s by default).",
        "`ProxyTimeout 600`, or `timeout=600` on the ProxyPass line (60 s by default).",
        "No `read_timeout` in `transport http`; no `write` in the `timeouts` of the server.",
        "`timeout server 600s` and `timeout client 600s`.",
        "`idle_timeout.timeout_seconds` 600 (60 by default, at most 4000).",
        "It ends a silence of about 100 to 120 s; STREAMCHAT_HEARTBEAT must be less, and text/plain has no heartbeat.",
        "First byte within 30 s, then at most 55 s of silence, both fixed: a short STREAMCHAT_HEARTBEAT, and a format"
        " that has heartbeats.",
    ),
    "hangup": (
        "`proxy_ignore_client_abort off;` (the default); no `proxy_cache` or `proxy_store` on the path.",
        "It notices at its next write: a shorter STREAMCHAT_HEARTBEAT has it write sooner.",
        "No `flush_interval -1`: it keeps the request running when the caller leaves.",
        "`option abortonclose`.",
        "It closes its side by itself: look at the hop behind it.",
        "It closes its side by itself, later than others: look at the hop behind it first.",
        "The router closes its side by itself: look at what stands in front of gunicorn in the dyno.",
    ),
    "headers": (
        "No `proxy_hide_header`; `proxy_pass_header X-Accel-Buffering;` where another proxy stands before it.",
        "No `Header unset` and no `Header set` of Cache-Control for the path.",
        "No `header_down -...` and no `header -...` for the path.",
        "No `http-response del-header` and no `http-response set-header` of Cache-Control.",
        "Header modification off for these names.",
        "No Transform Rule that removes them; Browser Cache TTL: respect existing headers.",
        "The router changes none of them.",
    ),
}
REMEDIES = {finding: dict(zip(PROXIES, words, strict=True)) for finding, words in _TABLE.items()}

# What is no proxy's business: the server's own side.
OWN = {
    "worker": "gunicorn with conf/gunicorn.conf.py: its gevent workers hold many answers at a time.",
    "patched_late": "`from gevent import monkey; monkey.patch_all()` as the first lines of gunicorn's configuration"
    " file, as in conf/gunicorn.conf.py; nothing of the app may be imported before.",
    "limits": "Raise the limit of open files (`ulimit -n`, `LimitNOFILE=` of systemd): two for each answer, and 256.",
    "http2": "Browsers open six connections to a site that speaks HTTP/1.1, and a seventh tab waits: turn HTTP/2 on"
    " where TLS ends (`listen 443 ssl http2;` in nginx before 1.25.1, `http2 on;` from then on).",
}


def seen_proxies(headers: dict[str, str], added: list[str]) -> list[str]:
    """Those that a response (names in lower case) or a request made themselves known by."""
    found = [name for name, (header, mark) in MARKS.items() if mark in headers.get(header, "").lower()]
    cloudflare = "CF-Ray" in added or "cf-ray" in headers
    return found + ["Cloudflare"] * (cloudflare and "Cloudflare" not in found)
