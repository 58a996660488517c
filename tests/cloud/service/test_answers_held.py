"""What is held for answers: with their copies while they are made and sent, and then as they are remembered."""

import pytest
from support.calls import open_session
from support.tiny_edge import attach

from sft_cloud.errors import NoMemoryError
from sft_cloud.identity import ANONYMOUS
from sft_cloud.memory import Kind


class Context:
    caller = ANONYMOUS

    def cancel(self):
        pass

    def add_callback(self, callback):
        return True


@pytest.fixture
def train(server):
    """The answers of a stream with these messages, one by one."""
    return lambda messages: server.service.Train(iter(messages), Context())


def held(server):
    return server.memory.held()[Kind.ANSWERS]


def test_an_answer_that_was_sent_is_held_once(server, stub, edge, train):
    session_id, message = open_session(stub, edge), edge.evaluate()
    message.number = 1
    seen = []

    def messages():
        yield attach(session_id)
        yield message
        seen.append(held(server))
        yield message

    answers = train(messages())
    next(answers)
    answer = next(answers)
    assert held(server) >= 4 * (answer.ByteSize() - 20)  # before it had its number, and its seconds
    assert next(answers) == answer  # from memory
    assert held(server) == 3 * answer.ByteSize()
    assert list(answers) == []
    assert seen == [held(server)] == [answer.ByteSize()]

    again = train([attach(session_id)])
    next(again)
    assert next(again) == answer
    assert held(server) == 3 * answer.ByteSize()
    again.close()  # the stream breaks
    assert held(server) == answer.ByteSize()
    server.memory.total_bytes = held(server)
    with pytest.raises(NoMemoryError, match="the answer would take"):
        list(train([attach(session_id)]))
    begun = attach(session_id)
    begun.attach.SetInParent()
    begun.answered = 1
    assert len(list(train([begun]))) == 1
    assert held(server) == 0
