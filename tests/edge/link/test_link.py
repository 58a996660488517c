"""The link against a scripted cloud, over real gRPC: order, commits, threads, measures, the end."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any, Iterator

import pytest
from support.scripted_cloud import TIMEOUT_SECONDS, WEIGHTS, ScriptedCloud, serving

from sft.errors import SessionLostError, UsageError
from sft.v1 import split_training_pb2 as pb
from sft.wire.ledger import Traffic, framed_size
from sft_edge.link.grpc_transport import GrpcTransport
from sft_edge.link.link import Link

LABELS = pb.Labels(classes=pb.Labels.Classes(ids=[0, 1]))


def activation(data: bytes = bytes(24)) -> pb.Activation:
    packed = pb.Tensor(data_type=pb.DATA_TYPE_FLOAT32, shape=[len(data) // 8, 2], data=data)
    return pb.Activation(packed=packed, lengths=[1, 2], padded_length=2)


@pytest.fixture
def cloud() -> ScriptedCloud:
    return ScriptedCloud()


@pytest.fixture
def link(cloud: ScriptedCloud) -> Iterator[Link]:
    with serving(cloud) as address, Link(GrpcTransport(address), pb.OpenSessionRequest(seed=3), {}) as link:
        link.open()
        yield link


def kinds(cloud: ScriptedCloud) -> list:
    """Of every message the cloud received: the commit's step, if one rode on it, and the body's kind."""
    return [
        (message.commit.step if message.HasField("commit") else None, message.WhichOneof("body"))
        for message in cloud.received
        if not message.HasField("close")
    ]


def test_open_gives_the_response_and_sends_the_request(link: Link, cloud: ScriptedCloud) -> None:
    assert link.open().device == "cpu"
    first, second = cloud.requests
    assert (first.seed, len(first.request_id)) == (3, 32)
    assert first == second, "the same request, whose answer may have been lost"


def test_a_codec_that_the_cloud_lacks(cloud: ScriptedCloud) -> None:
    """A release before codecs takes no notice of what it is asked for: floats would come back."""
    cloud.codecs = []
    for asked, says in (
        (pb.OpenSessionRequest(activation_codec=pb.DATA_TYPE_INT4), "does not know the codec int4; have it updated"),
        (pb.OpenSessionRequest(gradient_codec=pb.DATA_TYPE_INT8), "does not know the gradient codec int8"),
    ):
        with serving(cloud) as address, pytest.raises(UsageError, match=says):
            Link(GrpcTransport(address), asked, {}).open()


def test_micro_batches_are_sent_ahead_and_every_answer_finds_its_question(link: Link, cloud: ScriptedCloud) -> None:
    pending = [link.forward(0, index, activation(bytes([index] * 24)), LABELS, 0.5) for index in range(3)]
    for index in (2, 0, 1):
        message = pending[index].result().message
        assert (message.step, message.micro_batch) == (0, index)
        assert message.result.packed_gradient.data == bytes([index] * 24)
    sent = cloud.received[2].forward
    assert (sent.activation, sent.labels, sent.loss_scale) == (activation(bytes([1] * 24)), LABELS, 0.5)


def test_a_commit_rides_with_the_first_forward_after_it(link: Link, cloud: ScriptedCloud) -> None:
    for step in range(2):
        link.forward(step, 0, activation(), LABELS, 0.5)
        link.forward(step, 1, activation(), LABELS, 0.5).result()
        link.commit(step, [0.1, 0.2], 0.75)
    forward = (None, "forward")
    assert kinds(cloud) == [(None, "attach"), forward, forward, (0, "forward"), forward]
    assert cloud.received[3].commit == pb.Commit(step=0, learning_rates=[0.1, 0.2], clip_scale=0.75)


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_commit_counts_once_when_ctrl_c_comes_while_it_is_handed_over(
    link: Link, cloud: ScriptedCloud, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    link.forward(0, 0, activation(), LABELS, 1).result()
    link.commit(0, [0.1], 1)
    send = link._stream.send

    def interrupted(*arguments: Any) -> Any:
        if place == "before":
            signal.raise_signal(signal.SIGINT)
        pending = send(*arguments)
        if place == "after":
            signal.raise_signal(signal.SIGINT)
        return pending

    with monkeypatch.context() as patch:
        patch.setattr(link._stream, "send", interrupted)
        with pytest.raises(KeyboardInterrupt):
            link.forward(1, 0, activation(), LABELS, 1)
    assert link.flush() is None, "it is on its way"
    link._settle()
    assert kinds(cloud) == [(None, "attach"), (None, "forward"), (0, "forward")]


def test_flush_sends_a_held_commit_alone_and_once(link: Link, cloud: ScriptedCloud) -> None:
    link.forward(0, 0, activation(), LABELS, 1).result()
    link.commit(0, [0.1], 1)
    reply = link.flush()
    assert reply is not None
    assert reply.message.committed.next_step == 1
    assert link.flush() is None
    assert kinds(cloud) == [(None, "attach"), (None, "forward"), (0, None)]


def test_evaluate_and_weights_see_the_commits_before_them(link: Link, cloud: ScriptedCloud) -> None:
    link.forward(0, 0, activation(), LABELS, 1).result()
    link.commit(0, [0.1], 1)
    batches = [link.evaluate(1, index, activation(bytes([index] * 24))) for index in range(2)]
    assert [batch.result().message.evaluation.logits.data for batch in batches] == [bytes(24), bytes([1] * 24)]
    link.forward(1, 0, activation(), LABELS, 1).result()
    link.commit(1, [0.1], 1)
    assert list(link.weights()) == WEIGHTS
    expected = ["attach", "forward", (0, None), "evaluate", "evaluate", "forward", (1, None)]
    assert kinds(cloud) == [each if isinstance(each, tuple) else (None, each) for each in expected]


def test_a_commit_without_a_forward_in_between_is_not_lost(link: Link, cloud: ScriptedCloud) -> None:
    link.commit(0, [0.1], 1)
    link.commit(1, [0.1], 1)
    link.flush()
    assert kinds(cloud) == [(None, "attach"), (0, None), (1, None)]


def test_labels_that_stay_take_two_round_trips(link: Link, cloud: ScriptedCloud) -> None:
    outputs = link.forward(0, 0, activation(), None, 0.0).result()
    assert outputs.message.outputs.logits.data == bytes(24)
    gradient = pb.Tensor(data_type=pb.DATA_TYPE_FLOAT32, shape=[1], data=bytes(4))
    result = link.backward(0, 0, gradient).result()
    assert result.message.result.packed_gradient == gradient
    assert kinds(cloud) == [(None, "attach"), (None, "forward"), (None, "backward")]
    assert not cloud.received[1].forward.HasField("labels")
    assert cloud.received[2].backward.gradient == gradient
    sizes = [(reply.traffic.payload_bytes_sent, reply.traffic.payload_bytes_received) for reply in (outputs, result)]
    assert sizes == [(24, 24), (4, 4)]


def test_a_forward_says_all_that_it_is_told(link: Link, cloud: ScriptedCloud) -> None:
    link.forward(
        0,
        0,
        activation(),
        LABELS,
        0.0,
        eval_mode=True,
        want_logits=True,
        frozen_edge=True,
        autocast=pb.DATA_TYPE_BFLOAT16,
    ).result()
    sent = cloud.received[1].forward
    assert (sent.loss_scale, sent.eval_mode, sent.want_logits, sent.frozen_edge) == (0.0, True, True, True)
    assert sent.autocast == pb.DATA_TYPE_BFLOAT16
    link.forward(0, 1, activation(), LABELS, 1.0).result()
    plain = cloud.received[2].forward
    assert (plain.eval_mode, plain.want_logits, plain.frozen_edge, plain.autocast) == (False, False, False, 0)


def test_a_session_can_be_asked_whether_it_is_over(link: Link, cloud: ScriptedCloud) -> None:
    link.check()
    link.close()
    with pytest.raises(SessionLostError):
        link.check()


def test_a_session_can_be_given_up_without_waiting(link: Link, cloud: ScriptedCloud) -> None:
    link.forward(0, 0, activation(), LABELS, 1).result()
    link.abandon()
    assert cloud.ended.wait(TIMEOUT_SECONDS)


def test_replies_say_what_they_cost(link: Link, cloud: ScriptedCloud) -> None:
    first = link.forward(0, 0, activation(bytes(48_000)), LABELS, 1).result()
    link.commit(0, [0.1] * 1000, 1)
    second = link.forward(1, 0, activation(bytes(48_000)), LABELS, 1).result()
    third = link.evaluate(2, 0, activation()).result()
    for reply, message in zip((first, second, third), cloud.received[1:]):
        assert reply.traffic.bytes_sent == framed_size(message.ByteSize())
        assert reply.traffic.bytes_received == framed_size(reply.message.ByteSize())
        assert reply.cloud_seconds == 0.25
        assert reply.waited_seconds >= 0
        assert 0 < reply.round_trip_seconds < TIMEOUT_SECONDS
    assert (first.traffic.payload_bytes_sent, first.traffic.payload_bytes_received) == (48_000, 48_000)
    assert (third.traffic.payload_bytes_sent, third.traffic.payload_bytes_received) == (24, 24)
    assert second.traffic.bytes_sent - first.traffic.bytes_sent > 8000, "the commit counts with what it rides on"
    attached = pb.CloudMessage(cloud_seconds=0.25, attached=pb.Attached())
    attaching = Traffic(0, 0, framed_size(cloud.received[0].ByteSize()), framed_size(attached.ByteSize()))
    assert link.total == attaching + first.traffic + second.traffic + third.traffic


def test_threads_start_with_the_first_message_and_end_with_the_link(cloud: ScriptedCloud) -> None:
    with serving(cloud) as address:
        with Link(GrpcTransport(address), pb.OpenSessionRequest(), {}) as link:
            link.open()
            link.forward(0, 0, activation(), LABELS, 1).result()  # all threads of the server run now
        assert cloud.ended_properly.wait(TIMEOUT_SECONDS)
        cloud.answers.clear()  # the next session is another, though it has the same name here
        before = set(threading.enumerate())
        with Link(GrpcTransport(address), pb.OpenSessionRequest(), {}) as link:
            link.open()
            assert "sft-link-reader" not in [thread.name for thread in threading.enumerate()]
            link.forward(0, 0, activation(), LABELS, 1).result()
            started = set(threading.enumerate()) - before
            assert "sft-link-reader" in [thread.name for thread in started]
        for thread in started:
            if not thread.name.startswith("ThreadPoolExecutor"):  # the server's
                thread.join(TIMEOUT_SECONDS)
                assert not thread.is_alive(), thread


def test_close_ends_the_stream_in_order_and_may_be_called_twice(link: Link, cloud: ScriptedCloud) -> None:
    link.forward(0, 0, activation(), LABELS, 1).result()
    link.close()
    assert cloud.ended_properly.wait(TIMEOUT_SECONDS)
    link.close()
    with pytest.raises(SessionLostError, match=r"ended|closed"):
        link.forward(1, 0, activation(), LABELS, 1)


def test_a_session_that_was_never_used_is_given_back(link: Link, cloud: ScriptedCloud) -> None:
    link.close()
    assert cloud.ended_properly.wait(TIMEOUT_SECONDS)
    assert kinds(cloud) == [(None, "attach")]


def test_an_error_in_the_block_breaks_the_stream_off(cloud: ScriptedCloud) -> None:
    cloud.before_answer = cloud.hang
    with serving(cloud) as address:
        link = Link(GrpcTransport(address), pb.OpenSessionRequest(), {})
        link.open()
        pending = link.forward(0, 0, activation(), LABELS, 1)
        assert cloud.hanging.wait(TIMEOUT_SECONDS)  # a stream that has not reached the cloud leaves no trace there
        with pytest.raises(ZeroDivisionError), link:
            raise ZeroDivisionError
        assert cloud.ended.wait(TIMEOUT_SECONDS)
        assert not cloud.ended_properly.is_set()
        with pytest.raises(SessionLostError):
            pending.result()


def test_ctrl_c_gets_through_while_waiting(cloud: ScriptedCloud) -> None:
    def interrupt(message: pb.EdgeMessage, context: object) -> None:
        if message.HasField("forward"):
            os.kill(os.getpid(), signal.SIGINT)
            cloud.released.wait(TIMEOUT_SECONDS)

    cloud.before_answer = interrupt
    with serving(cloud) as address, Link(GrpcTransport(address), pb.OpenSessionRequest(), {}) as link:
        link.open()
        with pytest.raises(KeyboardInterrupt):
            link.forward(0, 0, activation(), LABELS, 1).result()
        cloud.released.set()


def test_a_link_that_is_not_open_says_so() -> None:
    with Link(GrpcTransport("127.0.0.1:1"), pb.OpenSessionRequest(), {}) as link:
        with pytest.raises(SessionLostError, match="not open"):
            link.forward(0, 0, activation(), LABELS, 1)
        with pytest.raises(SessionLostError, match="not open"):
            link.weights()
