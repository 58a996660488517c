"""gRPC channels to a server."""

from __future__ import annotations

from typing import List, Sequence, Tuple, Union

import grpc

from sft.client.address import for_grpc
from sft.client.credentials import Credentials

Options = Sequence[Tuple[str, Union[int, str]]]


def open_channel(address: str, credentials: Credentials, options: Options) -> grpc.Channel:
    """Dials nothing yet. The token is for each call to show: `credentials.metadata()`."""
    settings: List[Tuple[str, Union[int, str]]] = [
        *options,
        # The address given is the address dialed, whatever the environment says about proxies.
        ("grpc.enable_http_proxy", 0),
    ]
    if not credentials.encrypted:
        return grpc.insecure_channel(for_grpc(address), options=settings)
    tls = grpc.ssl_channel_credentials(
        credentials.root_certificates, credentials.private_key, credentials.certificate_chain
    )
    return grpc.secure_channel(for_grpc(address), tls, options=settings)
