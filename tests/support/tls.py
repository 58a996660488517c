"""Certificates and tokens for tests: one private CA with a server and two clients, another CA, and expired ones."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from sft_cloud.access.authority import Authority, Files
from sft_cloud.access.tokens import TokenFile
from sft_cloud.identity import Limits

HOSTS = ("localhost", "127.0.0.1", "::1")
LONG_AGO = datetime.now(timezone.utc) - timedelta(days=100)


@dataclass(frozen=True)
class Certificates:
    """Files in a directory of their own. Made with `make_certificates`, once a test session."""

    ca: Path
    server: Files
    elsewhere: Files
    """Of a server by another name."""

    expired_server: Files
    alice: Files
    bob: Files
    expired_alice: Files
    other_ca: Path
    other_server: Files
    other_alice: Files
    """Alice by the CA that nobody knows."""


def make_certificates(directory: Path) -> Certificates:
    ours, other = Authority(directory / "ca"), Authority(directory / "other")
    # The same CA, some time ago.
    then = Authority(directory / "ca", now=LONG_AGO)

    def moved(files: Files, name: str) -> Files:
        kept = Files(directory / f"{name}.pem", directory / f"{name}-key.pem")
        files.cert.rename(kept.cert)
        files.key.rename(kept.key)
        return kept

    return Certificates(
        ca=ours.files.cert,
        expired_server=moved(then.make_server(HOSTS, days=10), "expired_server"),
        expired_alice=moved(then.make_client("alice", days=10), "expired_alice"),
        elsewhere=moved(ours.make_server(["elsewhere.example"], days=10), "elsewhere"),
        server=ours.make_server(HOSTS, days=10),
        alice=ours.make_client("alice", days=10),
        bob=ours.make_client("bob", days=10),
        other_ca=other.files.cert,
        other_server=other.make_server(HOSTS, days=10),
        other_alice=other.make_client("alice", days=10),
    )


def make_token(path: Path, name: str, lifetime_seconds: float | None = None, **limits: object) -> str:
    """A token in the file; its text."""
    return TokenFile(path).create(name, Limits(**limits), lifetime_seconds, sees_all=False)[1]
