"""A session takes no more of the memory than there is, and knows before it takes it."""

import gc
import hashlib
import re

import pytest
import torch
from support.calls import open_session as open_over_the_wire
from support.calls import refusal
from support.session_parts import DROPPED, gradients_of, weigh

from sft.errors import ProtocolError, ServerFullError
from sft.tensors.stream import safetensors_chunks
from sft.v1 import split_training_pb2 as pb
from sft_cloud.engine.build import build, make_session
from sft_cloud.engine.request import check_request
from sft_cloud.errors import NoMemoryError
from sft_cloud.memory import Kind, MemoryBudget, MemoryShare, process_bytes
from sft_cloud.options import LimitOptions

CPU = torch.device("cpu")
MiB = 1 << 20


@pytest.fixture
def budget():
    return MemoryBudget(1 << 30)


@pytest.fixture
def session(edge, budget):
    spec = check_request(edge.request())
    return make_session(spec, build(spec, CPU), [*edge.weights, *edge.factors], CPU, budget=budget)


def leave(budget, size):
    """From now on so much is left."""
    budget.total_bytes = budget.held_bytes + size


def others_hold(budget, size):
    share = MemoryShare(budget)
    share.settle(size, 0)
    return share


def test_a_session_gives_back_what_it_took(edge, budget):
    spec = check_request(edge.request())
    session = make_session(spec, build(spec, CPU), [*edge.weights, *edge.factors], CPU, budget=budget)
    begins_with = budget.held_bytes
    assert begins_with > 4 * 4 * sum(tensor.read().numel() for tensor in edge.weights) / 2
    session.handle(edge.unlabelled(0))
    assert budget.held_bytes > begins_with
    del session
    gc.collect()
    assert budget.held_bytes == 0


def test_one_that_could_not_be_made_takes_nothing(edge, budget):
    spec = check_request(edge.request(optimizer=pb.Optimizer(name="Nonsense")))
    with pytest.raises(Exception, match="Nonsense"):
        make_session(spec, build(spec, CPU), [*edge.weights, *edge.factors], CPU, budget=budget)
    assert budget.held_bytes == 0


def test_a_batch_that_could_never_fit_is_refused_before_it_is_decoded(session, edge, budget, monkeypatch):
    leave(budget, 1000)
    monkeypatch.setattr(session._half, "decode", None)
    for message in (edge.forward(0), edge.unlabelled(0), edge.evaluate()):
        assert "send smaller batches" in session.handle(message).step_skipped.reason
    assert session.next_step == 0


def test_after_a_batch_that_could_never_fit_the_session_goes_on(session, edge, budget):
    first = session.handle(edge.forward(0, 0))
    total, budget.total_bytes = budget.total_bytes, 0
    session.handle(edge.evaluate())
    assert session._forwards == 1  # an evaluation undoes nothing
    assert "send smaller" in session.handle(edge.forward(0, 1)).step_skipped.reason
    assert gradients_of(session) == {}
    budget.total_bytes = total
    assert session.handle(edge.forward(0, 0)) == first
    budget.total_bytes = 0
    # What rides on such a message is done.
    assert session.handle(edge.forward(1, commit=edge.commit_part(0))).HasField("step_skipped")
    assert session.next_step == 1


def test_a_few_bytes_cannot_ask_for_much(session, edge, budget):
    leave(budget, 10 << 20)
    packed = pb.Tensor(data_type=1, shape=[2000, edge.width], data=bytes(4 * 2000 * edge.width))
    activation = pb.Activation(packed=packed, lengths=[1] * 2000, padded_length=128)
    reason = session.handle(edge.forward(0, activation=activation)).step_skipped.reason
    assert re.search(r"would take about (\d{3} M|[\d.]+ G)B", reason)


def test_nothing_is_decoded_that_there_is_no_memory_for(session, edge, budget, monkeypatch):
    """A code may stand for eight times its bytes."""
    size = session._half.training_bytes(edge.activation(0, 1))
    others_hold(budget, budget.total_bytes - budget.held_bytes - size // 2)
    monkeypatch.setattr(session._half, "decode", None)
    assert session.handle(edge.forward(0, 0)).HasField("step_skipped")


@pytest.mark.parametrize("shape", [[1 << 20, 1 << 20], [1] * 100_000])
def test_a_shape_that_is_none_is_no_question_of_memory(session, edge, shape):
    activation = edge.activation(0, 0)
    del activation.packed.shape[:]
    activation.packed.shape.extend(shape)
    with pytest.raises(ProtocolError, match=r"needs|dimensions"):
        session.handle(edge.forward(0, 0, activation=activation))


def test_a_step_for_which_others_leave_no_memory_is_skipped(session, edge, budget):
    size = session._half.training_bytes(edge.activation(0, 1))
    other = others_hold(budget, budget.total_bytes - budget.held_bytes - size // 2)
    reason = session.handle(edge.forward(0, 0)).step_skipped.reason
    assert re.fullmatch(
        r"the cloud is out of memory: this batch would take .* but .* are left; try again later", reason
    )
    assert gradients_of(session) == {}
    other.release()
    assert session.handle(edge.forward(0, 0)).HasField("result")


@pytest.mark.parametrize("way", ["forward", "unlabelled"])
def test_what_a_session_had_before_others_cannot_take(session, edge, budget, way):
    session.handle(getattr(edge, way)(0, 0))
    session.handle(weigh(0, (0, DROPPED)) if way == "unlabelled" else edge.commit(0))
    others_hold(budget, budget.left_bytes(2 * MiB))
    assert not session.handle(getattr(edge, way)(session.next_step, session._forwards)).HasField("step_skipped")


def test_an_evaluation_for_which_there_is_no_memory_now_leaves_the_session_as_it_was(session, edge, budget):
    other = others_hold(budget, budget.total_bytes - budget.held_bytes)
    with pytest.raises(ServerFullError, match="no memory for this now"):
        session.handle(edge.evaluate())
    other.release()
    session.handle(edge.forward(0, 0))
    session.handle(edge.evaluate())
    assert session.handle(edge.commit(0)).committed.next_step == 1


@pytest.mark.parametrize("way", ["graphs", "gradients kept aside"])
def test_what_waits_counts_and_stays_its_session_s(session, edge, budget, way):
    begins_with = budget.held()[Kind.SESSIONS]

    def forward(micro_batch):
        return edge.unlabelled(0, micro_batch) if way == "graphs" else edge.forward(0, micro_batch, loss_scale=0.0)

    session.handle(forward(0))
    with_one, one = budget.held()[Kind.SESSIONS], session._micro_batches.waiting_bytes()
    assert one > 0
    session.handle(forward(1))
    assert budget.held()[Kind.SESSIONS] - with_one == one
    budget.total_bytes = begins_with + 2 * one + one // 2
    assert "with what waits for a backward" in session.handle(forward(2)).step_skipped.reason
    budget.total_bytes = 1 << 30
    session.handle(forward(0))
    session.handle(forward(1))
    session.handle(weigh(0, (0, DROPPED), (1, DROPPED)))
    assert not session._micro_batches._sizes  # nothing stays of each, however long a step is
    held = budget.held()[Kind.SESSIONS]
    session.handle(forward(2))  # in the place of what was let go
    assert budget.held()[Kind.SESSIONS] == held


def test_half_precision_counts_while_it_waits(session, edge, budget):
    begins_with = budget.held()[Kind.SESSIONS]
    session.handle(edge.unlabelled(0, 0))
    one = budget.held()[Kind.SESSIONS] - begins_with
    session.handle(edge.unlabelled(0, 1, autocast=pb.DATA_TYPE_BFLOAT16))
    assert budget.held()[Kind.SESSIONS] - begins_with == 2 * one + session.half.cast_bytes()


def test_settings_that_have_the_optimizer_keep_more_are_charged(make_edge, budget):
    edge = make_edge(optimizer_name="SGD")
    spec = check_request(edge.request())
    session = make_session(spec, build(spec, CPU), [*edge.weights, *edge.factors], CPU, budget=budget)
    trained = sum(parameter.numel() for parameter in session.half.parameters())

    def step(step, **settings):
        commit = edge.commit_part(step)
        arguments = {name: pb.OptimizerArgument(number=value) for name, value in settings.items()}
        commit.group_arguments.extend([pb.GroupArguments(arguments=arguments)] * 2)
        session.handle(pb.EdgeMessage(step=step, commit=commit))
        session.handle(edge.forward(step + 1))
        return budget.held()[Kind.SESSIONS] - begins_with

    session.handle(edge.forward(0))
    begins_with = budget.held()[Kind.SESSIONS]
    assert step(0, weight_decay=0.5) == 0
    others = others_hold(budget, budget.total_bytes)
    with pytest.raises(NoMemoryError, match="new settings take"):
        step(1, momentum=0.5)
    others.release()
    assert [step(1, momentum=0.5), step(2, momentum=0.0), step(3, momentum=0.9)] == [4 * trained] * 3


def test_answers_that_are_remembered_count_and_the_newest_with_its_copies(session, edge, budget):
    answer = session.handle(edge.forward(0, 0), remembered_bytes=5000)
    assert budget.held()[Kind.ANSWERS] == 5000 + 4 * answer.ByteSize()
    assert session.handle(edge.forward(0, 1), remembered_bytes=1 << 40).HasField("step_skipped")
    with pytest.raises(ServerFullError, match="no memory for this now"):
        session.handle(edge.evaluate(), remembered_bytes=1 << 41)
    session.handle(edge.forward(0, 0))
    answer = session.handle(edge.commit(0), remembered_bytes=1 << 31)  # what is there is counted, be it too much
    assert budget.held()[Kind.ANSWERS] == (1 << 31) + 4 * answer.ByteSize()


@pytest.mark.parametrize("kind", ["evaluate", "forward"])
def test_an_answer_has_room_before_it_is_made(make_edge, kind):
    edge, budget = make_edge(num_labels=15_000, lengths=(5,) * 6), MemoryBudget(1 << 30)
    spec = check_request(edge.request())
    session = make_session(spec, build(spec, CPU), [*edge.weights, *edge.factors], CPU, budget=budget)
    message = edge.evaluate() if kind == "evaluate" else edge.unlabelled(0)
    size = session.half.logits_bytes(edge.activation(0))
    assert size == 4 * 6 * 15_000
    others_hold(budget, budget.left_bytes(2 * MiB) - 2 * size)
    session.half.outputs = None
    if kind == "evaluate":
        with pytest.raises(ServerFullError, match="the answer would take"):
            session.handle(message)
    else:
        assert session.handle(message).HasField("step_skipped")
    assert budget.refused()[Kind.ANSWERS] == 1


def test_a_server_has_so_much_for_all_sessions(start_server, connect, edge):
    server = start_server(limits=LimitOptions(memory_limit=process_bytes() + (1 << 20)))
    stub = connect(server.address)
    open_over_the_wire(stub, edge)
    memory = server.memory
    taken = memory.held_bytes
    memory.total_bytes = int(1.9 * taken)  # which building it fits into
    code, details = refusal(lambda: stub.OpenSession(edge.request()))
    assert code.name == "RESOURCE_EXHAUSTED"
    assert "try again when another session has ended" in details
    server.sessions.close(server.sessions.entries()[0].session_id, "done")
    gc.collect()
    assert memory.held()[Kind.SESSIONS] == 0
    assert stub.OpenSession(edge.request()).session_id


def test_a_state_that_is_loaded_has_room_beside_the_one_before(edge, budget, tmp_path):
    spec = check_request(edge.request())
    parts = (spec, build(spec, CPU), [*edge.weights, *edge.factors], CPU)
    session = make_session(*parts, lambda sha256: tmp_path / sha256, budget)
    session.handle(edge.forward(0))
    session.handle(edge.commit(0))
    content = b"".join(safetensors_chunks(session.stored_optimizer_state()))
    sha256 = hashlib.sha256(content).hexdigest()
    (tmp_path / sha256).write_bytes(content)
    load = pb.EdgeMessage(step=1, load_state=pb.LoadState(sha256=sha256, optimizer_state=True))
    others = others_hold(budget, budget.total_bytes - budget.held_bytes - len(content) // 2)
    with pytest.raises(NoMemoryError, match="no memory for this now"):
        session.handle(load)
    others.release()
    before = budget.held()[Kind.SESSIONS]
    session.handle(load)
    assert budget.held()[Kind.SESSIONS] == before
