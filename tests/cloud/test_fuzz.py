"""A few hundred messages of `bench/fuzz.py`, of every type: no crash, no hang, and a good session is not disturbed."""

import grpc
import pytest
from support.fuzzing import Fuzzer, good_run

from sft.models import Cut
from sft.wire.protocol import CLIENT_OPTIONS
from sft_cloud.memory import process_bytes
from sft_cloud.options import LimitOptions

KINDS = ("OpenSessionRequest", "UploadBlobRequest", "EdgeMessage, first", "DownloadWeightsRequest", "ProbeRequest")


@pytest.mark.first_only
@pytest.mark.parametrize(
    ("seed", "fitted"),
    [(0, False), *(pytest.param(seed, fitted, marks=pytest.mark.slow) for seed, fitted in ((1, False), (2, True)))],
)
def test_almost_sound_messages(start_server, connect, make_edge, seed, fitted):
    edge = make_edge(cut=Cut("sl", 2), fitted=True) if fitted else make_edge()
    server = start_server(
        max_sessions=16,
        limits=LimitOptions(
            opens_per_minute=10_000, calls_per_second=10_000, memory_limit=process_bytes() + (64 << 20)
        ),
    )
    stub = connect(server.address)
    alone = good_run(stub, edge, 3)
    with grpc.insecure_channel(server.address, options=CLIENT_OPTIONS) as channel:
        fuzzer = Fuzzer(channel, edge, seed)
        while fuzzer.mutated < 200:
            fuzzer.shoot()
            if fuzzer.mutated % 50 == 0:
                assert good_run(stub, edge, 3) == alone
    assert fuzzer.failures == []
    kinds = {kind for kind, _ in fuzzer.counts}
    assert kinds.issuperset(KINDS)
    assert sum(kind.startswith("EdgeMessage") for kind in kinds) > 5
    outcomes = {what for _, what in fuzzer.counts}
    assert outcomes.issuperset(("answered", "INVALID_ARGUMENT", "FAILED_PRECONDITION", "NOT_FOUND"))
    assert good_run(stub, edge, 3) == alone


def test_the_same_seed_sends_the_same_messages(edge):
    with grpc.insecure_channel("localhost:1") as channel:
        one, other = (Fuzzer(channel, edge, 5)._mutator for _ in range(2))
    messages = [edge.forward(0), edge.request(), edge.commit(1), edge.evaluate()]
    mutated = [one.mutated(message) for message in messages * 50]
    assert mutated == [other.mutated(message) for message in messages * 50]
    assert len(set(mutated)) > 150
