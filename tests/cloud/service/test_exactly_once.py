"""Messages that come again: answered from memory as long as the edge may need it, and never applied twice."""

import pytest
import torch
from support.session_parts import gradients_of, same_bits, weigh, weights_of

from sft.errors import ProtocolError
from sft.v1 import split_training_pb2 as pb
from sft.wire.protocol import MAX_UNANSWERED
from sft_cloud.errors import FullOfAnswersError, GapError, PreconditionError
from sft_cloud.rpc import ends_session
from sft_cloud.service import exactly_once
from sft_cloud.service.exactly_once import ExactlyOnce


class Cloud:
    """A session behind ExactlyOnce, and how often it was asked."""

    def __init__(self, session):
        self.session = session
        self.numbered = ExactlyOnce()
        self.handled = 0

    def take(self, message, number, answered=0):
        message.number, message.answered = number, answered

        def work():
            self.handled += 1
            return self.session.handle(message)

        answer, _ = self.numbered.apply(message, work)
        return answer.SerializeToString()


@pytest.fixture
def cloud(open_session, edge):
    return Cloud(open_session(edge))


def messages_of_two_steps(edge):
    return [
        edge.forward(0, 0),
        edge.unlabelled(0, 1),
        edge.forward(0, 2, loss_scale=0.0),
        edge.backward(0, 1, torch.ones(3, 3)),
        weigh(0, (2, 0.5)),
        edge.evaluate(),
        edge.forward(1, commit=edge.commit_part(0)),
        edge.commit(1),
    ]


def test_every_kind_of_message_counts_once(cloud, open_session, edge):
    for number, message in enumerate(messages_of_two_steps(edge), 1):
        answer = cloud.take(message, number)
        assert cloud.take(message, number) == answer
        assert cloud.take(message, number) == answer
    assert cloud.handled == 8
    once = open_session(edge)
    for message in messages_of_two_steps(edge):
        once.handle(message)
    assert same_bits(weights_of(cloud.session), weights_of(once))


def test_an_answer_is_forgotten_only_when_the_edge_has_it(cloud, edge):
    first, second = cloud.take(edge.forward(0, 0), 1), cloud.take(edge.forward(0, 1), 2)
    cloud.take(edge.commit(0), 3, answered=1)
    assert cloud.take(edge.forward(0, 1), 2) == second != first
    with pytest.raises(PreconditionError, match="message 1 was answered, and the edge has said so"):
        cloud.take(edge.forward(0, 0), 1)
    assert cloud.handled == 3
    assert [answer.number for answer in cloud.numbered.answers_after(2)] == [3]
    assert cloud.numbered.answers_after(3) == []


def test_a_gap_changes_nothing(cloud, edge):
    gradients = gradients_of(cloud.session)
    with pytest.raises(GapError, match="message 2 came, but 1 is next: send again"):
        cloud.take(edge.forward(0, 0), 2)
    assert same_bits(gradients, gradients_of(cloud.session))
    cloud.take(edge.forward(0, 0), 1)
    cloud.take(edge.forward(0, 1), 2)
    assert cloud.numbered.last_number == 2


@pytest.mark.parametrize("other", ["step", "micro-batch", "kind", "content", "what rides along"])
def test_a_number_stands_for_one_message(cloud, edge, other):
    cloud.take(edge.forward(0, 0), 1)
    message = {
        "step": edge.forward(1, 0),
        "micro-batch": edge.forward(0, 1),
        "kind": edge.commit(0),
        "content": edge.forward(0, 0, loss_scale=0.25),
        "what rides along": edge.forward(0, 0, commit=edge.commit_part(0)),
    }[other]
    with pytest.raises(ProtocolError, match="message 1 was another one"):
        cloud.take(message, 1)
    assert cloud.handled == 1


@pytest.mark.parametrize(("number", "answered", "says"), [(0, 0, "numbered from 1"), (1, 1, "its own answer")])
def test_numbers_that_make_no_sense(cloud, edge, number, answered, says):
    with pytest.raises(ProtocolError, match=says):
        cloud.take(edge.forward(0, 0), number, answered)
    assert cloud.handled == 0


def test_a_message_that_is_refused_has_not_come(cloud, edge):
    with pytest.raises(PreconditionError, match="step 0 is next"):
        cloud.take(edge.forward(5), 1)
    assert cloud.numbered.last_number == 0
    cloud.take(edge.forward(0), 1)


def test_no_more_is_remembered_than_an_edge_may_ask_for(cloud, edge):
    message = weigh(0, gradient_scale=0.5)
    for number in range(1, MAX_UNANSWERED + 1):
        cloud.take(message, number)
    with pytest.raises(PreconditionError, match="at most 64 and"):
        cloud.take(message, MAX_UNANSWERED + 1)
    cloud.take(message, MAX_UNANSWERED + 1, answered=1)


def test_large_answers_are_limited_by_their_bytes(cloud, edge, monkeypatch):
    size = len(cloud.take(edge.forward(0, 0, want_logits=True), 1))
    monkeypatch.setattr(exactly_once, "MAX_BYTES", 2 * size + size // 2)
    for number in (2, 3):
        cloud.take(edge.forward(0, number - 1, want_logits=True), number)
    with pytest.raises(PreconditionError, match="are not known to have arrived"):
        cloud.take(edge.forward(0, 3), 4)
    cloud.take(edge.forward(0, 3), 4, answered=3)


def test_an_edge_that_has_left_has_all_the_room_and_no_more(monkeypatch):
    numbered = ExactlyOnce()

    def take(number, answered=0):
        message = weigh(0, gradient_scale=0.5)
        message.number, message.answered = number, answered
        return numbered.apply(message, lambda: pb.CloudMessage(step=1), is_left=True)

    for number in range(1, MAX_UNANSWERED + 2):
        answer, _ = take(number)
    monkeypatch.setattr(exactly_once, "MAX_BYTES", numbered.held_bytes - answer.ByteSize())
    with pytest.raises(FullOfAnswersError, match="bytes of answers wait for the edge"):
        take(MAX_UNANSWERED + 2)
    assert not ends_session(FullOfAnswersError())
    assert len(numbered.answers_after(1)) == MAX_UNANSWERED
    take(MAX_UNANSWERED + 2)


def test_a_step_that_is_undone_is_answered_so_again(cloud, edge, monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr("sft_cloud.session.session.check_room_for_step", full)
        answer = cloud.take(edge.forward(0), 1)
    assert pb.CloudMessage.FromString(answer).HasField("step_skipped")
    assert cloud.take(edge.forward(0), 1) == answer
    assert cloud.handled == 1


def test_a_message_is_the_same_in_whichever_order_its_settings_come():
    numbered, names = ExactlyOnce(), [f"name{number}" for number in range(12)]
    for order in (names, names[::-1]):
        message = pb.EdgeMessage(number=1)
        arguments = message.commit.group_arguments.add().arguments
        for name in order:
            arguments[name].flag = True
        _, repeated = numbered.apply(pb.EdgeMessage.FromString(message.SerializeToString()), pb.CloudMessage)
    assert repeated
