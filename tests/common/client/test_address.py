"""HOST:PORT in good forms and bad: one set of rules for whoever calls a server and whoever is one."""

from typing import Optional

import pytest

from sft.client.address import for_grpc, ip_of, spelled_address, split_address
from sft.client.credentials import ClientOptions, read_credentials
from sft.errors import UsageError

GOOD = [
    ("localhost:1", "localhost", 1),
    ("gpu-1.example:50051", "gpu-1.example", 50051),
    ("sft_cloud:50051", "sft_cloud", 50051),  # a service of Docker Compose
    ("10.0.0.7:65535", "10.0.0.7", 65535),
    ("[::1]:50051", "::1", 50051),
    ("[2001:db8::7]:50051", "2001:db8::7", 50051),
    ("[::ffff:10.0.0.7]:50051", "::ffff:10.0.0.7", 50051),
    ("[fe80::1%eth0]:50051", "fe80::1%eth0", 50051),
    ("[fe80::1%can0]:50051", "fe80::1%can0", 50051),
    ("[fe80::1%12]:50051", "fe80::1%12", 50051),
]
BAD = [
    "",
    ":",
    "host",
    "host:",
    ":50051",
    "[]:50051",
    "host:http",
    "host:-1",
    "host:+1",
    "host:1.0",
    "host: 1",
    "host:1 ",
    "host:1\n",
    "host:65536",
    "host:000001",
    "host:99999999999999999999",
    "host:\uff11\uff12",  # digits, but not ours
    "host:\u00b2",
    "a:b:1",
    "a b:1",
    "a\x00b:1",
    "a\x1b[31m:1",
    "::1:50051",
    "[::1]",
    "[::1]50051",
    "[::1:50051",
    "::1]:50051",
    "[[::1]]:50051",
    "[host]:50051",
    "[10.0.0.7]:50051",
    "[::1::2]:50051",
    "[fe80::1%]:50051",
    "[%eth0]:50051",
    "http://host:1",
    "host:1/path",
    "me@host:1",
    "unix:/tmp/socket",
]


@pytest.mark.parametrize("listens", [False, True])
@pytest.mark.parametrize(("address", "host", "port"), GOOD)
def test_addresses(address: str, host: str, port: int, listens: bool) -> None:
    assert split_address(address, "--server", listens) == (host, port)
    assert spelled_address(host, port) == address


@pytest.mark.parametrize("listens", [False, True])
@pytest.mark.parametrize("address", BAD)
def test_what_is_no_address(address: str, listens: bool) -> None:
    with pytest.raises(UsageError) as caught:
        split_address(address, "--server", listens)
    said = str(caught.value)
    assert said.startswith("--server must be HOST:PORT, such as ")
    assert said.endswith(f", not {address!r}")
    assert said.isprintable()


def test_port_0_is_for_who_listens() -> None:
    assert split_address("[::]:0", "address", listens=True) == ("::", 0)
    with pytest.raises(UsageError, match=r"^--server must be HOST:PORT, such as cloud\.example:50051 or"):
        split_address("localhost:0", "--server")


@pytest.mark.parametrize(("dashes", "name"), [("--", "--server"), ("", "server")])
def test_a_client_s_server_is_named_as_the_user_spelled_it(dashes: str, name: str) -> None:
    with pytest.raises(UsageError, match=f"^{name} must be HOST:PORT, .*, not 'somewhere'$"):
        read_credentials(ClientOptions(server="somewhere"), dashes, {})


def test_an_interface_is_no_escape_for_grpc() -> None:
    """Which reads %ca, as in %can0, as the byte 0xCA."""
    assert for_grpc("[fe80::1%can0]:50051") == "[fe80::1%25can0]:50051"
    assert for_grpc("cloud.example:50051") == "cloud.example:50051"


@pytest.mark.parametrize(
    ("host", "ip"),
    [
        ("10.0.0.7", "10.0.0.7"),
        ("::1", "::1"),
        ("[::1]", "::1"),
        ("fe80::1%eth0", "fe80::1"),
        ("10.0.0.256", None),
        ("10.0.0.7%eth0", None),
        ("cloud.example", None),
        ("cafe", None),
    ],
)
def test_which_hosts_are_ip_addresses(host: str, ip: Optional[str]) -> None:
    assert (None if ip_of(host) is None else str(ip_of(host))) == ip
