"""HOST:PORT taken apart."""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple, Optional

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


def _ipv6(text: str) -> Optional[str]:
    """None where it is none. One within a link has an interface, as in fe80::1%eth0."""
    try:
        ipaddress.IPv6Address(re.sub(r"%[\w.-]+\Z", "", text))
    except ValueError:
        return None
    return text
