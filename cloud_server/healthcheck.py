"""Exit code 0 when the server at HOST:PORT answers gRPC's health protocol with SERVING, 1 otherwise: for containers."""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def problem(address: str) -> str | None:
    """What keeps the server at `address` from saying within three seconds that it serves; None if it does."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=3)
        except grpc.RpcError as error:
            return f"{address}: {error.code().name}"
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return None
    return f"{address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}"


if __name__ == "__main__":
    sys.exit(problem(sys.argv[1]))
