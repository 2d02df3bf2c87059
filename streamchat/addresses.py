"""Where a webhook may go: what a target's URL may look like, and the networks in which nobody's endpoint is.

Pure: asks no resolver. A NAT64 prefix that an operator chose himself (RFC 6052) cannot be told from other addresses.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import urlsplit

IPv4 = ipaddress.IPv4Address
IPv6 = ipaddress.IPv6Address
Network = TypeVar("Network", ipaddress.IPv4Network, ipaddress.IPv6Network)

# The registries of special purpose addresses (RFC 6890), and what clouds add to them. ipaddress.is_global is not
# enough: it lets multicast, 6to4, NAT64 and 168.63.129.16 through.
CLOSED_4 = {
    "this network": ["0.0.0.0/8"],
    "private": ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"],
    "carrier-grade NAT": ["100.64.0.0/10"],  # and the metadata of Alibaba's machines, 100.100.100.200
    "loopback": ["127.0.0.0/8"],
    "link-local": ["169.254.0.0/16"],  # and the metadata of most clouds, 169.254.169.254
    "protocol assignments": ["192.0.0.0/24"],  # and the metadata of Oracle's older machines, 192.0.0.192
    "documentation": ["192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24"],
    "AS112": ["192.31.196.0/24", "192.175.48.0/24"],
    "AMT": ["192.52.193.0/24"],
    "6to4 relay": ["192.88.99.0/24"],
    "benchmarking": ["198.18.0.0/15"],
    "Azure's own": ["168.63.129.16/32"],
    "multicast": ["224.0.0.0/4"],
    "reserved": ["240.0.0.0/4"],  # and broadcast
}
# Only 2000::/3 is given to anybody: outside it are loopback, fc00::/7, fe80::/10, fec0::/10, ff00::/8, 64:ff9b::/96,
# 5f00::/16 and the forms that hold an IPv4 address (mapped, compatible, translated).
UNICAST_6 = ipaddress.IPv6Network("2000::/3")
CLOSED_6 = {
    "protocol assignments": ["2001::/23"],  # Teredo, ORCHID and benchmarking among them
    "documentation": ["2001:db8::/32", "3fff::/20"],
    "6to4": ["2002::/16"],
    "AS112": ["2620:4f:8000::/48"],
    "6bone": ["3ffe::/16"],
}
ISATAP = 0x00005EFE  # RFC 5214: the interface's upper half; two of its bits say who gave it out
ISATAP_MASK = 0xFCFFFFFF


def _listed(table: dict[str, list[str]], kind: type[Network]) -> list[tuple[str, Network]]:
    return [(name, kind(network)) for name, networks in table.items() for network in networks]


_NETWORKS_4 = _listed(CLOSED_4, ipaddress.IPv4Network)
_NETWORKS_6 = _listed(CLOSED_6, ipaddress.IPv6Network)


def closed_network(address: str) -> str | None:
    """The name of the network that closes this address to webhooks; None for a public one. Raises ValueError."""
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, IPv4):
        return next((name for name, network in _NETWORKS_4 if parsed in network), None)
    if parsed.scope_id is not None or parsed not in UNICAST_6:
        return "not public IPv6"
    if (int(parsed) >> 32) & ISATAP_MASK == ISATAP:
        return "ISATAP"
    return next((name for name, network in _NETWORKS_6 if parsed in network), None)


def is_loopback(address: str) -> bool:
    """127.0.0.0/8 and ::1, in no other form."""
    parsed = ipaddress.ip_address(address)
    return parsed == IPv6("::1") or (isinstance(parsed, IPv4) and parsed.is_loopback)


URL_CHARS = 2048
PORTS = {"https": 443, "http": 80}
LABEL = r"(?!-)[a-z0-9_-]{1,63}(?<!-)"
NAME = re.compile(rf"(?:{LABEL}\.)*{LABEL}")
NAME_CHARS = 253
# What resolvers read as a number: 127.1, 2130706433, 0x7f000001. RFC 1123 2.1: a name's last label is not one.
NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")


@dataclass(frozen=True, slots=True)
class Target:
    """A webhook's address, taken apart once: nobody reads the URL a second time in another way."""

    scheme: str
    host: str  # a name in lower case, or an address without brackets
    port: int
    path: str = field(repr=False)  # and query: it may hold a token
    local: bool  # this machine's own: for development

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"

    def admits(self, address: str) -> bool:
        """Whether one of the host's resolved addresses may be connected to. A local host's are loopback alone."""
        return is_loopback(address) if self.local else closed_network(address) is None


def parse_target(url: str, *, loopback: bool) -> Target:
    """Raises ValueError, whose words begin "must" and hold nothing of the URL.

    `loopback` allows localhost and loopback addresses, also by http.
    """
    if len(url) > URL_CHARS or not re.fullmatch(r"[!-\[\]-~]+", url):  # urlsplit drops tabs and line breaks
        raise ValueError(f"must be a URL of at most {URL_CHARS} ASCII characters without spaces and backslashes")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise ValueError("must be a URL such as https://shop.example/hook") from None
    bracketed = parts.netloc.startswith("[")
    if bracketed and not re.fullmatch(r"\[[^]]*\](:[0-9]*)?", parts.netloc):  # older Pythons drop what follows ]
        host = ""
    if parts.scheme not in PORTS or not host or port == 0:
        raise ValueError("must be a URL such as https://shop.example/hook")
    if "@" in parts.netloc or "#" in url:
        raise ValueError("must be a URL without a user's name and without a fragment")
    local = _local(check_host(host, bracketed=bracketed))
    if local and not loopback:
        raise ValueError("must not lead to this machine")
    if parts.scheme == "http" and not local:
        raise ValueError("must begin https://")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(parts.scheme, host, port or PORTS[parts.scheme], path, local)


def check_host(host: str, *, bracketed: bool = False) -> str:
    """The host of a URL, in lower case: a full name or a public address, in its usual spelling. Raises ValueError."""
    if bracketed or NUMBER.fullmatch(host):
        try:
            literal = IPv6(host) if bracketed else IPv4(host)
        except ValueError:
            raise ValueError("must write an address in its usual form") from None
        if closed_network(str(literal)) and not is_loopback(str(literal)):
            raise ValueError("must not lead into a private network")
    elif not NAME.fullmatch(host) or len(host) > NAME_CHARS:
        raise ValueError("must name a host in ASCII (xn--... for other letters)")
    elif "." not in host and host != "localhost":
        raise ValueError("must name a host in full, such as shop.example")
    return host


def _local(host: str) -> bool:
    """Whether the host is called this machine: by a name of RFC 6761 or a loopback address."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    return (":" in host or bool(NUMBER.fullmatch(host))) and is_loopback(host)


def is_listed(target: Target, hosts: Collection[str]) -> bool:
    """Whether an allow-list has the target: its host by name, or a name under `.example.com`; the usual port alone."""
    if target.port != PORTS["https"] and not target.local:
        return False
    return target.host in hosts or any(host.startswith(".") and target.host.endswith(host) for host in hosts)
