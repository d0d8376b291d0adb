"""Which addresses a node tells, and in which order those of others are tried."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.discovery import addresses as a
from edgellm.errors import UsageError

pytestmark = pytest.mark.pure


def interface(name: str, index: int, *networks: str) -> a.Interface:
    return a.Interface(name, index, tuple(map(ipaddress.ip_interface, networks)))


LO = interface("lo", 1, "127.0.0.1/8", "::1/128")
LAN = interface("eth0", 2, "192.168.1.5/24", "fd00::5/64", "fe80::5/64")
WIFI = interface("wlan0", 3, "10.1.0.5/16", "fe80::6/64")
DOCKER = interface("docker0", 4, "172.17.0.1/16", "fe80::7/64")
VPN = interface("tailscale0", 5, "100.101.1.5/32", "fd7a::5/128")
ALL = (DOCKER, LO, VPN, LAN, WIFI)
OWN = a.own_addresses("::", 7171, ALL)


# --- text -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("192.168.1.7:7171", ("192.168.1.7", 7171)),
        ("[fd00::7]:1", ("fd00::7", 1)),
        ("[fe80::7%eth0]:65535", ("fe80::7%eth0", 65535)),
        ("kitchen.local:7171", ("kitchen.local", 7171)),
        (" localhost:80 ", ("localhost", 80)),
    ],
)
def test_addresses_as_people_write_them(text: str, address: a.Address) -> None:
    assert a.parse_address(text) == address
    assert a.parse_address(a.format_address(*address)) == address


@pytest.mark.parametrize(
    "text",
    ["", "7171", "host:", ":7171", "host:0", "host:65536", "host:x", "host:-1", "fd00::7:7171",
     "host:1" + "0" * 5000, "host:00008099999", "host:\u0667", "a\x1bb:1"],
)  # fmt: skip
def test_text_that_is_no_address(text: str) -> None:
    with pytest.raises(UsageError):
        a.parse_address(text)


@pytest.mark.parametrize(
    "address",
    [
        ("10.0.0.1", 0), ("10.0.0.1", 65536), ("10.0.0.1", True), ("10.0.0.1", "80"),
        ("0.0.0.0", 80), ("::", 80), ("224.0.0.251", 80), ("ff02::fb", 80),
        ("255.255.255.255", 80), ("example.com", 80), ("", 80), (b"10.0.0.1", 80),
        ("fe80::1%a b", 80), ("fe80::1%" + "x" * 65, 80), ("10.0.0.1",), "10.0.0.1", None,
        ["10.0.0.1", 80], ("10.0.0.1%" + "x" * 300, 80),
    ],
)  # fmt: skip
def test_what_strangers_say_is_only_taken_as_the_address_of_one_machine(address: object) -> None:
    assert not a.is_usable(address)


@given(st.tuples(st.text(max_size=50), st.integers()) | st.binary() | st.none() | st.text())
def test_any_rubbish_is_usable_or_not_and_raises_nothing(address: object) -> None:
    if a.is_usable(address):
        ipaddress.ip_address(address[0].partition("%")[0])


# --- our own --------------------------------------------------------------------------


def test_a_node_on_all_networks_tells_its_lan_first_and_its_bridges_last() -> None:
    told = a.own_addresses("0.0.0.0", 80, ALL)
    assert [host for host, _ in told] == ["192.168.1.5", "10.1.0.5", "172.17.0.1", "100.101.1.5"]


def test_a_node_on_all_networks_with_ipv6_gives_link_local_addresses_their_scope() -> None:
    hosts = [host for host, _ in OWN]
    assert hosts[:2] == ["192.168.1.5", "10.1.0.5"]
    assert {"fd00::5", "fe80::5%eth0", "fe80::6%wlan0", "fe80::7%docker0"} <= set(hosts)
    assert hosts.index("fd00::5") < hosts.index("fe80::5%eth0") < hosts.index("172.17.0.1")
    assert not any(a.is_loopback(host) for host in hosts)


def test_a_node_without_any_network_has_loopback() -> None:
    assert a.own_addresses("0.0.0.0", 80, [LO]) == (("127.0.0.1", 80),)
    assert a.own_addresses("::", 80, []) == (("127.0.0.1", 80),)


def test_a_node_that_listens_at_one_address_tells_that_one() -> None:
    assert a.own_addresses("127.0.0.1", 80, ALL) == (("127.0.0.1", 80),)
    assert a.own_addresses("fe80::5%eth0", 80, ALL) == (("fe80::5%eth0", 80),)
    assert a.own_addresses("localhost", 80, ALL) == (("127.0.0.1", 80),)


# --- another's ------------------------------------------------------------------------


def order(*hosts: str, port: int = 9, own: tuple[a.Address, ...] = OWN) -> list[str]:
    return [host for host, _ in a.candidates([(host, port) for host in hosts], ALL, own)]


def test_the_network_that_we_share_comes_first_and_tunnels_last() -> None:
    assert order("100.64.9.9", "172.17.0.9", "203.0.113.1", "10.1.0.9", "192.168.1.9") == [
        "10.1.0.9", "192.168.1.9", "203.0.113.1", "172.17.0.9", "100.64.9.9",
    ]  # fmt: skip


def test_a_link_local_address_is_tried_on_each_link_that_it_could_be_behind() -> None:
    assert order("fe80::9") == ["fe80::9%docker0", "fe80::9%tailscale0", "fe80::9%eth0",
                                "fe80::9%wlan0"]  # fmt: skip
    assert order("fe80::9%eth0") == order("fe80::9%2") == ["fe80::9%eth0"]
    assert order("fe80::9%elsewhere") == order("fe80::9")


def test_a_device_on_this_machine_is_tried_over_loopback_first() -> None:
    assert order("192.168.1.5") == ["127.0.0.1", "192.168.1.5"]
    assert order("fd00::5") == ["::1", "fd00::5"]


def test_our_own_addresses_are_nobody_else() -> None:
    assert order("192.168.1.5", "127.0.0.1", "fe80::5", "192.168.1.9", port=7171) == ["192.168.1.9"]


def test_another_port_of_loopback_is_somebody_else() -> None:
    assert order("127.0.0.1") == ["127.0.0.1"]


def test_names_are_left_for_the_system_to_look_up() -> None:
    assert order("kitchen.local", "203.0.113.1") == ["kitchen.local", "203.0.113.1"]


hosts = st.one_of(
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(str),
    st.sampled_from(
        ["fe80::1", "fe80::1%eth0", "fe80::1%9", "127.0.0.1", "192.168.1.5", "n.local"]
    ),
)


@given(st.lists(st.tuples(hosts, st.integers(1, 65535)), max_size=16))
def test_every_address_that_is_not_ours_is_tried_once(sighted: list[a.Address]) -> None:
    tried = a.candidates(sighted, ALL, OWN)
    assert len(set(tried)) == len(tried) <= a.MAX_CANDIDATES
    assert not set(tried) & set(OWN)
    bare = {(host.partition("%")[0], port) for host, port in tried}
    for host, port in sighted:
        if port != 7171 and len(tried) < a.MAX_CANDIDATES:
            assert (host.partition("%")[0], port) in bare


def test_who_is_on_this_machine() -> None:
    assert a.on_this_machine([("127.0.0.1", 1)], ALL)
    assert a.on_this_machine([("203.0.113.1", 1), ("10.1.0.5", 1)], ALL)
    assert not a.on_this_machine([("192.168.1.9", 1), ("kitchen.local", 1)], ALL)


# --- where to announce ----------------------------------------------------------------


def test_multicast_goes_where_we_listen_and_always_to_this_machine() -> None:
    assert a.multicast_places("127.0.0.1", ALL) == ("127.0.0.1",)
    assert a.multicast_places("::1", ALL) == ("127.0.0.1",)
    assert a.multicast_places("192.168.1.5", ALL) == ("127.0.0.1", "192.168.1.5")
    assert a.multicast_places("fe80::6%wlan0", ALL) == ("127.0.0.1", 3)
    everywhere = a.multicast_places("0.0.0.0", ALL)
    assert set(everywhere) == {"127.0.0.1", "192.168.1.5", "10.1.0.5", "172.17.0.1", "100.101.1.5"}
    assert set(a.multicast_places("::", ALL)) == {*everywhere, 2, 3, 4, 5}


def test_a_machine_with_ipv6_alone() -> None:
    lo, lan = interface("lo", 1, "::1/128"), interface("eth0", 2, "fe80::5/64")
    assert a.multicast_places("::", [lo, lan]) == (1, 2)
    assert a.own_addresses("::", 80, [lo, lan]) == (("fe80::5%eth0", 80),)
