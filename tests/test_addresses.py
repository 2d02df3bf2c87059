"""The table of addresses that no webhook is sent to, and what a target's URL may look like."""

from __future__ import annotations

import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from requests_hardened.ip_filter import filter_host

from streamchat.addresses import closed_network, is_listed, is_loopback, parse_target

# Every kind with its first, its last and a known address.
CLOSED = {
    "this network": ["0.0.0.0", "0.0.0.1", "0.255.255.255"],
    "private": ["10.0.0.0", "10.255.255.255", "172.16.0.0", "172.31.255.255", "192.168.0.0", "192.168.255.255"],
    "carrier-grade NAT": ["100.64.0.0", "100.127.255.255"],
    "loopback": ["127.0.0.0", "127.0.0.1", "127.255.255.255"],
    "link-local": ["169.254.0.0", "169.254.255.255"],
    "metadata": [
        "169.254.169.254", "169.254.170.2", "169.254.169.253", "100.100.100.200", "192.0.0.192", "fd00:ec2::254",
    ],
    "Azure": ["168.63.129.16"],
    "protocol assignments": ["192.0.0.0", "192.0.0.9", "192.0.0.170", "192.0.0.255"],
    "documentation": ["192.0.2.1", "198.51.100.1", "203.0.113.1", "2001:db8::1", "3fff::1", "3fff:fff::1"],
    "AS112": ["192.31.196.1", "192.175.48.1", "2620:4f:8000::1"],
    "AMT": ["192.52.193.1"],
    "6to4 relay": ["192.88.99.0", "192.88.99.1", "192.88.99.255"],
    "benchmarking": ["198.18.0.0", "198.19.255.255", "2001:2::1"],
    "multicast": ["224.0.0.0", "224.0.0.1", "239.255.255.255", "ff00::", "ff02::1", "ff0e::1"],
    "reserved": ["240.0.0.0", "255.255.255.254"],
    "broadcast": ["255.255.255.255"],
    "unspecified": ["::"],
    "IPv6 loopback": ["::1"],
    "unique local": ["fc00::", "fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"],
    "IPv6 link-local": ["fe80::", "fe80::1", "fe80::1%eth0", "febf::1"],
    "site-local": ["fec0::", "fec0::1", "feff::1"],
    "v4-mapped": ["::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:7f00:1", "::ffff:8.8.8.8"],
    "v4-compatible": ["::127.0.0.1", "::7f00:1", "::a9fe:a9fe"],
    "v4-translated": ["::ffff:0:127.0.0.1", "::ffff:0:7f00:1"],
    "NAT64": ["64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b::8.8.8.8", "64:ff9b:1::1", "64:ff9b:1:ffff::1"],
    "6to4": ["2002::", "2002:7f00:1::", "2002:a9fe:a9fe::1", "2002:808:808::1"],
    "Teredo": ["2001::", "2001:0:7f00:1::", "2001:0:ffff::1"],
    "ORCHID": ["2001:10::1", "2001:20::1", "2001:1ff:ffff::1"],
    "ISATAP": [
        "2606:4700::5efe:7f00:1", "2606:4700::200:5efe:10.0.0.1", "2606:4700::5efe:8.8.8.8", "2a00:1::100:5efe:1.1.1.1",
    ],
    "discard": ["100::1", "100:0:0:1::1"],
    "segment routing": ["5f00::1"],
    "6bone": ["3ffe::1"],
    "outside 2000::/3": ["1fff:ffff::1", "4000::1", "8000::1", "c000::1", "e000::1"],
    "with a scope": ["2606:4700::1111%eth0"],
}  # fmt: skip
# The last before a network and the first after it, and addresses that people know.
OPEN = [
    "1.0.0.0", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255", "128.0.0.0",
    "168.63.129.15", "168.63.129.17", "169.253.255.255", "169.255.0.0", "172.15.255.255", "172.32.0.0",
    "191.255.255.255", "192.0.1.0", "192.0.3.0", "192.167.255.255", "192.169.0.0", "198.17.255.255", "198.20.0.0",
    "223.255.255.255", "8.8.8.8", "93.184.215.14",
    "2001:200::1", "2001:4860:4860::8888", "2003::1", "2606:4700:4700::1111", "2a00:1450::1", "3ffd:ffff::1",
    "2606:4700::5eff:1.1.1.1", "2001:db9::1",
]  # fmt: skip


@pytest.mark.parametrize(
    "address", [address for addresses in CLOSED.values() for address in addresses], ids=lambda text: text
)
def test_an_address_where_nobodys_endpoint_is_is_closed(address: str) -> None:
    assert closed_network(address)


@pytest.mark.parametrize("address", OPEN)
def test_a_public_address_is_open(address: str) -> None:
    assert closed_network(address) is None


@given(st.ip_addresses())
def test_what_python_knows_to_be_not_global_is_closed(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    if not address.is_global or address.is_multicast or address.is_reserved:
        assert closed_network(str(address))


@given(st.ip_addresses(v=4), st.sampled_from(["::ffff:", "::", "::ffff:0:", "64:ff9b::", "2606:4700::5efe:"]))
def test_no_ipv6_form_of_an_ipv4_address_is_open(address: ipaddress.IPv4Address, prefix: str) -> None:
    assert closed_network(f"{prefix}{address}")


def _refused_by_requests_hardened(address: str) -> bool:
    try:
        filter_host(address, 443, allow_loopback=False)
    except OSError:  # its InvalidIPAddress is one, as every error of requests
        return True
    return False


# What its table lets through, and ours does not: the reason why we have one.
ONLY_OURS = {
    "168.63.129.16", "192.31.196.1", "192.175.48.1", "192.52.193.1", "2620:4f:8000::1",
    "::7f00:1", "::127.0.0.1", "::a9fe:a9fe", "::ffff:0:7f00:1", "::ffff:0:127.0.0.1",
    "2606:4700::5efe:7f00:1", "2606:4700::200:5efe:10.0.0.1", "2606:4700::5efe:8.8.8.8", "2a00:1::100:5efe:1.1.1.1",
    "fec0::", "fec0::1", "feff::1", "3ffe::1", "1fff:ffff::1", "4000::1", "8000::1", "c000::1", "e000::1",
    "::ffff:8.8.8.8", "100:0:0:1::1",
}  # fmt: skip
NUMERIC = [address for addresses in CLOSED.values() for address in addresses if "%" not in address]


@pytest.mark.parametrize("address", [*NUMERIC, *OPEN])
def test_what_requests_hardened_refuses_we_refuse(address: str) -> None:
    assert not _refused_by_requests_hardened(address) or closed_network(address)


def test_requests_hardened_refuses_most_of_the_table_so_it_is_a_judge_of_it() -> None:
    lets_through = {address for address in NUMERIC if not _refused_by_requests_hardened(address)}
    assert lets_through <= ONLY_OURS


# --- targets ---------------------------------------------------------------------------------------------

# 127.0.0.1 and others, as people hide them. The system's resolver takes most of them.
CIRCLED, FULL_WIDTH = "①②⑦.⓪.⓪.①", "\uff11\uff12\uff17.\uff10.\uff10.\uff11"
ODD = [
    "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.0.0.1", "0177.0.0.1", "127.0.0.01", "0x7f.1", "017700000001",
    CIRCLED, FULL_WIDTH, "127。0。0。1", "127.0.0.1.", "localhost.", "0", "0x", "0.0", "169.254.43518",
    "0xa9fea9fe", "2852039166", "1.2.3.4.5", "256.1.1.1", "shop.0x7f", "shop.1",
]  # fmt: skip


@pytest.mark.parametrize("host", ODD)
@pytest.mark.parametrize("loopback", [False, True])
def test_a_number_in_an_odd_spelling_is_no_host(host: str, loopback: bool) -> None:
    with pytest.raises(ValueError, match=r"^must "):
        parse_target(f"https://{host}/", loopback=loopback)


def test_the_odd_spellings_are_those_that_a_resolver_takes() -> None:
    taken = [host for host in ODD if "127.0.0.1" in _resolved(host)]
    assert {
        "127.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "①②⑦.⓪.⓪.①",
        "\uff11\uff12\uff17.\uff10.\uff10.\uff11",
    } <= set(taken)


def _resolved(host: str) -> list[str]:
    try:
        return [str(found[4][0]) for found in socket.getaddrinfo(host, 443, flags=socket.AI_NUMERICHOST)]
    except (OSError, UnicodeError):
        return []


@pytest.mark.parametrize(
    ("url", "rebuilt", "host", "port"),
    [
        ("https://shop.example", "https://shop.example:443/", "shop.example", 443),
        ("https://Shop.Example/Hook?a=1&b=%20", "https://shop.example:443/Hook?a=1&b=%20", "shop.example", 443),
        ("HTTPS://shop.example:8443/x", "https://shop.example:8443/x", "shop.example", 8443),
        ("https://shop.example?x=1", "https://shop.example:443/?x=1", "shop.example", 443),
        ("https://shop.example//a/../b", "https://shop.example:443//a/../b", "shop.example", 443),
        ("https://xn--mnchen-3ya.example/", "https://xn--mnchen-3ya.example:443/", "xn--mnchen-3ya.example", 443),
        ("https://hooks_1.shop.example/", "https://hooks_1.shop.example:443/", "hooks_1.shop.example", 443),
        ("https://8.8.8.8/", "https://8.8.8.8:443/", "8.8.8.8", 443),
        ("https://[2606:4700::1111]:444/", "https://[2606:4700::1111]:444/", "2606:4700::1111", 444),
    ],
)
def test_a_target_is_taken_apart_and_put_together_again(url: str, rebuilt: str, host: str, port: int) -> None:
    target = parse_target(url, loopback=False)
    assert (target.url, target.host, target.port, target.local) == (rebuilt, host, port, False)


@pytest.mark.parametrize(
    "url",
    [
        "", "shop.example", "//shop.example/", "https://", "https:///x", "https:shop.example", "https://:443/",
        "http://shop.example/", "ftp://shop.example/", "file:///etc/passwd", "gopher://shop.example/", "javascript:1",
        "https://user@shop.example/", "https://user:word@shop.example/", "https://@shop.example/",
        "https://shop.example@10.0.0.1/", "https://shop.example/#x", "https://shop.example/#",
        "https://shop.example:0/", "https://shop.example:65536/", "https://shop.example:x/", "https://shop.example:-1/",
        "https://shop.example\\@10.0.0.1/", "https://shop.example\t/", "https://sh\nop.example/", " https://shop.example/",
        "https://shop.example/a b", "https://shop.example/\x00", "https://münchen.example/", "https://shop.example/ü",
        "https://shop%2eexample/", "https://shop..example/", "https://.example/", "https://-shop.example/",
        "https://shop-.example/", f"https://{'a' * 64}.example/", f"https://{'a.' * 127}example/",
        "https://shop/", "https://*.example/", "https://sh!op.example/", f"https://shop.example/{'x' * 2048}",
        "https://10.0.0.1/", "https://169.254.169.254/latest/meta-data/", "https://[fd00:ec2::254]/", "https://[::]/",
        "https://[fe80::1%25eth0]/", "https://[2606:4700::1111%25eth0]/", "https://[::ffff:8.8.8.8]/",
        "https://[64:ff9b::8.8.8.8]/", "https://[::1/", "https://::1/", "https://[shop.example]/", "https://[8.8.8.8]/",
        "https://[v1.shop]/", "https://[::1]shop.example/", "https://0.0.0.0/",
    ],
)  # fmt: skip
def test_what_is_no_public_https_url_is_refused_also_where_loopback_is_allowed(url: str) -> None:
    for loopback in (False, True):
        with pytest.raises(ValueError, match=r"^must ") as caught:
            parse_target(url, loopback=loopback)
        assert "10.0.0.1" not in str(caught.value) and "word" not in str(caught.value)


def test_a_token_in_a_targets_path_has_no_repr() -> None:
    assert "canary" not in repr(parse_target("https://shop.example/canary?token=canary", loopback=False))


LOCAL = [
    "http://localhost/", "http://localhost:5001/hook", "https://localhost/", "http://shop.localhost:5001/",
    "http://127.0.0.1:5001/", "https://127.8.9.10/", "http://[::1]:5001/",
]  # fmt: skip


@pytest.mark.parametrize("url", LOCAL)
def test_this_machine_is_a_target_only_where_that_is_allowed(url: str) -> None:
    with pytest.raises(ValueError, match=r"^must not lead to this machine"):
        parse_target(url, loopback=False)
    assert parse_target(url, loopback=True).local


@pytest.mark.parametrize("url", LOCAL)
def test_a_local_target_admits_loopback_addresses_alone(url: str) -> None:
    target = parse_target(url, loopback=True)
    assert target.admits("127.0.0.1") and target.admits("::1")
    for address in ("10.0.0.1", "8.8.8.8", "::ffff:127.0.0.1", "169.254.169.254", "0.0.0.0", "::"):
        assert not target.admits(address)


@pytest.mark.parametrize("loopback", [False, True])
def test_any_other_target_admits_public_addresses_alone(loopback: bool) -> None:
    target = parse_target("https://shop.example/", loopback=loopback)
    assert target.admits("8.8.8.8") and target.admits("2606:4700::1111")
    for address in ("127.0.0.1", "::1", "10.0.0.1", "fe80::1%eth0"):
        assert not target.admits(address)


@given(st.ip_addresses())
def test_an_address_is_never_both_loopback_and_open(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    assert not (is_loopback(str(address)) and closed_network(str(address)) is None)


@given(st.text(max_size=60))
def test_any_text_is_a_target_or_refused(text: str) -> None:
    for url in (text, f"https://{text}", f"https://{text}/", f"https://shop.example{text}"):
        found = read(url)
        assert found.startswith("must ") or read(found) == found


def read(url: str) -> str:
    """The URL of the target, or the words of the refusal."""
    try:
        return parse_target(url, loopback=True).url
    except ValueError as error:
        return str(error)


HOSTS = ("shop.example", ".hooks.example", "93.184.215.14")


@pytest.mark.parametrize(
    "url",
    [
        "https://shop.example/", "https://SHOP.example/", "https://shop.example:443/x", "https://a.hooks.example/",
        "https://a.b.hooks.example/", "https://93.184.215.14/",
    ],
)  # fmt: skip
def test_a_listed_host_is_listed(url: str) -> None:
    assert is_listed(parse_target(url, loopback=False), HOSTS)


@pytest.mark.parametrize(
    "url",
    [
        "https://a.shop.example/", "https://shop.example.evil.example/", "https://evilshop.example/",
        "https://hooks.example/", "https://evilhooks.example/", "https://a.hooks.example.evil.example/",
        "https://shop.example:8443/", "https://93.184.215.15/", "https://other.example/",
    ],
)  # fmt: skip
def test_what_is_not_listed_is_not(url: str) -> None:
    assert not is_listed(parse_target(url, loopback=False), HOSTS)


def test_nothing_is_listed_on_an_empty_list_and_this_machine_only_by_name() -> None:
    local = parse_target("http://localhost:5001/", loopback=True)
    assert not is_listed(parse_target("https://shop.example/", loopback=False), ())
    assert not is_listed(local, HOSTS)
    assert is_listed(local, ("localhost",))
