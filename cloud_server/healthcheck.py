"""Exit code 0 when a server answers gRPC's health protocol with SERVING, 1 otherwise: for containers.

python healthcheck.py HOST:PORT [CA]     with the PEM file of its certificate's CA where it speaks TLS
"""

from __future__ import annotations

import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def problem(address: str, ca: str | None = None) -> str | None:
    """What keeps the server at `address` from saying within three seconds that it serves; None if it does."""
    with _channel(address, ca) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=3)
        except grpc.RpcError as error:
            return f"{address}: {error.code().name}"
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return None
    return f"{address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}"


def _channel(address: str, ca: str | None) -> grpc.Channel:
    if ca is None:
        return grpc.insecure_channel(address)
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(Path(ca).read_bytes()))


if __name__ == "__main__":
    sys.exit(problem(*sys.argv[1:]))
