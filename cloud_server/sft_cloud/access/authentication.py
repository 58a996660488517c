"""Who calls: by the token in a call's metadata, by the client certificate of its connection, or by both together.

Where both are asked for, a token counts only beside a certificate of its own name, so a stolen token alone is worth
nothing. Tokens are looked up and certificates judged at every message, so that an identity ends when its token is
revoked or when token or certificate expires, and not with the stream that was opened with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any

import grpc

from sft_cloud.access.tokens import LiveTokens, Token, check_name
from sft_cloud.errors import UnauthenticatedError
from sft_cloud.identity import ANONYMOUS, Identity

Metadata = Sequence[tuple[str, str | bytes]]

AUTHORIZATION = "authorization"
"""Key of the metadata that holds `Bearer <token>`."""


class Authentication:
    """Judges callers. Thread-safe."""

    def __init__(
        self, tokens: LiveTokens | None, needs_certificate: bool, clock: Callable[[], float] = time.time
    ) -> None:
        """`tokens`: None lets in who has no token; `needs_certificate`: TLS has asked every client for one already."""
        self._tokens = tokens
        self._needs_certificate = needs_certificate
        self._clock = clock
        needed = ["a valid token"] if tokens else []
        needed += ["a client certificate" + (" in the token's name" if tokens else "")] if needs_certificate else []
        self._sentence = f"this server does not know the caller: it asks for {' and '.join(needed)}"

    def identify(self, context: grpc.ServicerContext) -> Identity:
        """Raises UnauthenticatedError."""
        identity = self.identify_metadata(context.invocation_metadata())
        if not self._needs_certificate:
            return identity
        certified = self._certified(context)
        if self._tokens is None:
            return certified
        if certified.name != identity.name:
            raise self._refusal(f"a token of {identity.name} with the certificate of {certified.name}")
        ends = (identity.expires_unix_seconds, certified.expires_unix_seconds)
        return replace(identity, expires_unix_seconds=min(end for end in ends if end is not None))

    def identify_metadata(self, metadata: Metadata) -> Identity:
        """The part of `identify` that needs no message to have come yet. Raises UnauthenticatedError."""
        if self._tokens is None:
            return ANONYMOUS
        sent = [value for key, value in metadata if key == AUTHORIZATION]
        if len(sent) != 1 or not isinstance(sent[0], str):
            raise self._refusal("several tokens" if sent else "no token")
        scheme, _, text = sent[0].partition(" ")
        token = self._tokens.find(text) if scheme.lower() == "bearer" else None
        if token is None:
            raise self._refusal("a token that is none of those here")
        self._check_valid(token)
        return token.identity

    def still_valid(self, identity: Identity) -> bool:
        """Whether who was let in would be now; cheap."""
        if identity.expires_unix_seconds is not None and self._clock() >= identity.expires_unix_seconds:
            return False
        if self._tokens is None or identity.token_id is None:
            return True
        token = self._tokens.get(identity.token_id)
        return token is not None and token.state(self._clock()) == "valid"

    def _check_valid(self, token: Token) -> None:
        """Says what is wrong, as the caller holds the right secret."""
        state = token.state(self._clock())
        about = f"{state} token {token.id} of {token.name}"
        if state == "revoked":
            raise UnauthenticatedError("the token was revoked: ask whoever runs the server for a new one", about)
        if state == "expired":
            day = datetime.fromtimestamp(token.expires or 0, timezone.utc).date().isoformat()
            raise UnauthenticatedError(f"the token expired on {day}: ask whoever runs the server for a new one", about)

    def _certified(self, context: grpc.ServicerContext) -> Identity:
        shown = context.auth_context().get("x509_pem_cert", ())
        if len(shown) != 1:
            raise self._refusal("no client certificate")
        try:
            name, expires = _read_certificate(bytes(shown[0]))
        except ValueError as error:
            raise self._refusal(str(error)) from error
        if self._clock() >= expires:
            raise UnauthenticatedError("the client certificate has expired: ask for a new one", f"expired: {name}")
        return Identity(name, expires_unix_seconds=expires)

    def _refusal(self, reason: str) -> UnauthenticatedError:
        return UnauthenticatedError(self._sentence, reason)


@lru_cache(maxsize=1000)
def _read_certificate(pem: bytes) -> tuple[str, float]:
    """The common name, and when it expires. Raises ValueError."""
    from cryptography import x509  # only where certificates are in use

    certificate = x509.load_pem_x509_certificate(pem)
    names: list[Any] = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    if len(names) != 1:
        raise ValueError("a client certificate without exactly one common name")
    return check_name(str(names[0].value)), certificate.not_valid_after_utc.timestamp()
