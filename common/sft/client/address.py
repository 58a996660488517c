"""HOST:PORT taken apart."""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple, Optional, Union

from sft.errors import UsageError


class Address(NamedTuple):
    """Where a server is, or is to be."""

    host: str
    """A name, an IPv4 or an IPv6 address, the last without brackets."""

    port: int


def split_address(address: str, option: str, listens: bool = False) -> Address:
    """Takes `HOST:PORT` apart; an IPv6 host stands in brackets there.

    `option`: what the user gave it by, which errors name. `listens`: it is where a server is to be, so that port 0 has
    a meaning: any free one. Raises UsageError.
    """
    match = re.fullmatch(r"(?:\[([^\[\]]+)\]|([\w.-]+)):([0-9]{1,5})", address)
    host = match and (match[2] or _ipv6(match[1]))
    if not match or not host or not (0 if listens else 1) <= int(match[3]) <= 65535:
        examples = "0.0.0.0:50051 or [::]:50051" if listens else "cloud.example:50051 or [::1]:50051"
        raise UsageError(f"{option} must be HOST:PORT, such as {examples}, not {address!r}")
    return Address(host, int(match[3]))


def spelled_address(host: str, port: int) -> str:
    """The reverse of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def for_grpc(address: str) -> str:
    """As gRPC wants it, which takes a percent sign, before an interface, for the beginning of an escape."""
    return address.replace("%", "%25")


def ip_of(host: str) -> Optional[Union[ipaddress.IPv4Address, ipaddress.IPv6Address]]:
    """The IP address that a host is, without the interface that one within a link has, as in fe80::1%eth0; None for a
    name. Brackets are left out."""
    bare = re.fullmatch(r"\[?([0-9A-Fa-f:.]+)(%[\w.-]+)?\]?", host)
    try:
        ip = ipaddress.ip_address(bare[1]) if bare else None
    except ValueError:
        return None
    return None if bare and bare[2] and isinstance(ip, ipaddress.IPv4Address) else ip


def _ipv6(text: str) -> Optional[str]:
    """None where it is none."""
    return text if isinstance(ip_of(text), ipaddress.IPv6Address) else None
