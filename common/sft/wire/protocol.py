"""Constants of the wire that both sides must agree on, and gRPC's channel settings."""

from __future__ import annotations

from typing import List, Tuple

PROTOCOL_VERSION = 3
"""Raised when a change of the .proto makes old and new sides misunderstand each other."""

SERVICE = "sft.v1.SplitTraining"
"""This project's own, as gRPC calls it; a method of it is /SERVICE/NAME."""

TRAIN = f"/{SERVICE}/Train"
"""The stream of a session: the method that differs from all others, as it is open as long as a run."""

HEALTH_CHECK = "/grpc.health.v1.Health/Check"
HEALTH_WATCH = "/grpc.health.v1.Health/Watch"
"""Literally: what both sides share does without grpcio-health-checking."""

INSTANCE_KEY = "sft-instance"
"""Of the metadata that ends a call: which server answered, as behind one address there may be several. Drawn when it
starts."""

MAX_MESSAGE_BYTES = 256 << 20
"""Largest message either side accepts, in parts or whole: a full-width activation of 128 x 512 tokens x 1024 floats."""

PART_BYTES = 1 << 20
"""Of an edge's message that cross in one; larger messages cross in parts (`sft.wire.parts`): what gRPC has received of
a message is in nobody's books until the message is whole."""

MAX_RECEIVED_BYTES = (4 << 20) + 4096
"""Largest message of gRPC that the cloud takes: a probe."""

MAX_PADDED_TOKENS = 1 << 18
"""Largest B x S of a batch: 512 sequences of 512 tokens. A few bytes of lengths could otherwise ask for any memory."""

MAX_KEPT_SEQUENCES = 4096
"""Of a message in which sequences are kept, or have been: each is looked up, opened and written by itself."""

MAX_PROBE_BYTES = 4 << 20
"""What one probe of the way may carry in each direction."""

MAX_UNANSWERED = 64
"""Messages of a session whose answers are not known to have arrived: the cloud remembers so many."""

MAX_WAITING = 64
"""Micro-batches of a step that may wait for a Weight or a Backward: each takes memory on the cloud, with labels as much
as net_2's gradients."""

KEEPALIVE_SECONDS = 20
"""Of silence, before the other side is asked for a sign of life, and for the sign, where nobody chose otherwise."""

CLIENT_OPTIONS: List[Tuple[str, int]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # An edge that computes for minutes has no message under way, yet the link must be known to live.
    ("grpc.http2.max_pings_without_data", 0),
    # Each run dials for itself: a subchannel shared with another run of the process would share its back-off too.
    ("grpc.use_local_subchannel_pool", 1),
]

SERVER_OPTIONS: List[Tuple[str, int]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_RECEIVED_BYTES),
    ("grpc.keepalive_time_ms", 1000 * KEEPALIVE_SECONDS),
    ("grpc.keepalive_timeout_ms", 1000 * KEEPALIVE_SECONDS),
    # Below any client's keepalive time, or the server would answer `too_many_pings` and hang up.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # Two servers on one port would share its connections at random; the second must fail instead.
    ("grpc.so_reuseport", 0),
    # A compressed message of a few kilobytes could stand for MAX_MESSAGE_BYTES: bit 0 alone, which is no compression.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    # From whoever is not known yet: headers, handshakes, and connections that carry no call.
    ("grpc.max_metadata_size", 8 << 10),
    ("grpc.absolute_max_metadata_size", 16 << 10),
    ("grpc.server_handshake_timeout_ms", 20_000),
    ("grpc.max_connection_idle_ms", 600_000),
    ("grpc.max_concurrent_streams", 16),
]
