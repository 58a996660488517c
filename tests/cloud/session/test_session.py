"""The state machine of a session: what it does, what it answers from memory, what it refuses."""

import math

import pytest
import torch
from support.tiny_edge import QUESTIONS, attach

from sft.errors import ProtocolError, TrainingError
from sft.models import Cut
from sft.models.seeding import seeded
from sft.models.weights import fill
from sft.optim.spec import make_optimizer
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.elements import decode_tensor, encode_tensor
from sft.wire.codec.messages import decode_activation
from sft.wire.codec.packing import pack
from sft_cloud.engine.build import build
from sft_cloud.engine.request import check_request
from sft_cloud.errors import PreconditionError
from sft_cloud.session.session import State

CPU = torch.device("cpu")


def weights_of(session):
    return {tensor.name: tensor.read().clone() for tensor in session.stored_parameters()}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def train(session, edge, steps, micro_batches=2):
    """The answers of a run, as bytes."""
    answers = []
    for step in range(steps):
        answers += [session.handle(edge.forward(step, m)).SerializeToString() for m in range(micro_batches)]
        session.handle(edge.commit(step))
    return answers


@pytest.fixture
def session(open_session, edge):
    return open_session(edge)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"cut": Cut("sl", 2)},
        {"cut": Cut("sft", 3, 2)},
        {"problem_type": "multi_label_classification"},
        {"num_labels": 1, "problem_type": "regression"},
        {"num_labels": 2, "head": QUESTIONS},
    ],
    ids=str,
)
def test_a_step_answers_loss_and_gradient_and_changes_the_weights(make_edge, open_session, values):
    edge = make_edge(**values)
    session = open_session(edge)
    before = weights_of(session)
    message = edge.forward(0)
    answer = session.handle(message)
    assert (answer.step, answer.micro_batch, session.state) == (0, 0, State.ACCUMULATING)
    gradient = decode_tensor(answer.result.packed_gradient, CPU)
    assert gradient.shape == (sum(edge.lengths), edge.width)
    assert gradient.abs().sum() > 0
    assert math.isfinite(answer.result.loss)
    assert answer.result.squared_gradient_norm > 0
    assert same_bits(before, weights_of(session))

    assert session.handle(edge.commit(0)).committed.next_step == 1
    assert (session.next_step, session.state) == (1, State.READY)
    assert not same_bits(before, weights_of(session))


def test_training_is_that_of_an_ordinary_loop(edge, open_session):
    session = open_session(edge)
    spec = check_request(edge.request())
    net_2 = build(spec, CPU).net_2
    fill(net_2, [*edge.weights, *edge.factors], edge.seed)
    optimizer = make_optimizer(spec.optimizer, net_2.whole_parameters())
    net_2.train()
    for step in range(3):
        for micro_batch in range(2):
            message = edge.forward(step, micro_batch)
            result = session.handle(message).result
            a_BSR, lengths = decode_activation(message.forward.activation, edge.width, 128, CPU)
            a_BSR.requires_grad_()
            with seeded(CPU, edge.seed, "net_2", step, micro_batch):
                loss = net_2(a_BSR, lengths, {"labels": torch.arange(3)}).loss
                (loss * 0.5).backward()
            assert result.loss == loss.item()
            assert torch.equal(decode_tensor(result.packed_gradient, CPU), pack(a_BSR.grad, lengths))
            squared_norm = sum(float(p.grad.double().square().sum()) for p in net_2.parameters())
            assert result.squared_gradient_norm == pytest.approx(squared_norm)
        optimizer.step()
        optimizer.zero_grad()
        session.handle(edge.commit(step))
    assert same_bits(weights_of(session), {name: p.detach() for name, p in net_2.whole_parameters().items()})


def test_the_gradient_is_that_of_the_scaled_loss(make_edge, open_session):
    edge = make_edge()
    message = edge.forward(0)
    half = decode_tensor(open_session(edge).handle(message).result.packed_gradient, CPU)
    message.forward.loss_scale = 1.0
    answer = open_session(edge).handle(message)
    assert torch.equal(decode_tensor(answer.result.packed_gradient, CPU), 2 * half)
    assert answer.result.loss == open_session(edge).handle(edge.forward(0)).result.loss


def test_activations_travel_in_the_session_data_type(edge, open_session, monkeypatch):
    request = edge.request(wire_data_type=pb.DATA_TYPE_BFLOAT16)
    monkeypatch.setattr(edge, "request", lambda: request)
    gradient = open_session(edge).handle(edge.forward(0)).result.packed_gradient
    assert gradient.data_type == pb.DATA_TYPE_BFLOAT16


def test_a_gradient_in_a_codec_is_that_gradient_about(make_edge, open_session):
    """Its rounding is the session's and the micro-batch's own, whatever came before."""
    edge = make_edge()
    full = decode_tensor(open_session(edge).handle(edge.forward(0)).result.packed_gradient, CPU)
    request = edge.request(gradient_codec=pb.DATA_TYPE_INT8)
    edge.request = lambda: request
    first, again = (open_session(edge).handle(edge.forward(0)).result.packed_gradient for _ in range(2))
    assert first == again
    assert first.data_type == pb.DATA_TYPE_INT8
    coded = decode_tensor(first, CPU)
    assert not torch.equal(coded, full)
    mixed = full.abs().sum(1, keepdim=True)  # at most
    assert ((coded - full).abs() <= mixed * 2**0.25 / 127 * 1.001).all()


def test_learning_rates_travel_with_the_commit(open_session, edge):
    still, moved = open_session(edge), open_session(edge)
    before = weights_of(still)
    for session, rate in ((still, 0.0), (moved, 0.1)):
        session.handle(edge.forward(0))
        message = edge.commit(0)
        message.commit.learning_rates[:] = [rate] * len(edge.groups)
        session.handle(message)
    assert same_bits(before, weights_of(still))
    assert not same_bits(before, weights_of(moved))


def test_clip_scale_multiplies_the_gradients(make_edge, open_session):
    edge = make_edge(optimizer_name="SGD")
    for group in edge.groups:
        group.arguments["weight_decay"] = 0.0
    start = weights_of(open_session(edge))
    moved = []
    for clip_scale in (1.0, 0.5, -1.0):
        session = open_session(edge)
        session.handle(edge.forward(0))
        session.handle(edge.commit(0, clip_scale))
        moved.append({name: value - start[name] for name, value in weights_of(session).items()})
    for name, change in moved[0].items():
        torch.testing.assert_close(0.5 * change, moved[1][name], atol=1e-6, rtol=1e-3)
        torch.testing.assert_close(-change, moved[2][name], atol=1e-6, rtol=1e-3)


def test_a_commit_rides_with_the_next_forward(session, open_session, edge):
    session.handle(edge.forward(0))
    rides = edge.forward(1, commit=edge.commit_part(0))
    answer = session.handle(rides)
    assert answer.WhichOneof("body") == "result"
    session.handle(edge.commit(1))

    apart = open_session(edge)
    train(apart, edge, steps=2, micro_batches=1)
    assert same_bits(weights_of(apart), weights_of(session))


def test_a_commit_rides_with_an_evaluation(session, open_session, edge):
    session.handle(edge.forward(0))
    answer = session.handle(edge.evaluate(commit=edge.commit_part(0)))
    apart = open_session(edge)
    train(apart, edge, steps=1, micro_batches=1)
    assert session.next_step == 1
    assert answer.evaluation == apart.handle(edge.evaluate()).evaluation


def test_evaluations_in_between_change_no_bit(session, open_session, edge):
    quiet = open_session(edge)
    expected = train(quiet, edge, steps=3)
    answers = []
    for step in range(3):
        session.handle(edge.evaluate())
        for micro_batch in range(2):
            answers.append(session.handle(edge.forward(step, micro_batch)).SerializeToString())
            session.handle(edge.evaluate(micro_batch))
        session.handle(edge.commit(step))
    assert answers == expected
    assert same_bits(weights_of(quiet), weights_of(session))


def test_sessions_side_by_side_end_with_the_bits_of_their_solo_runs(make_edge, open_session):
    edges = [make_edge(seed=1), make_edge(seed=2, cut=Cut("sft", 1, 3))]
    solo = [open_session(edge) for edge in edges]
    expected = [train(session, edge, steps=3) for session, edge in zip(solo, edges, strict=True)]
    both = [open_session(edge) for edge in edges]
    answers = [[], []]
    for step in range(3):
        for micro_batch in range(2):
            for session, edge, mine in zip(both, edges, answers, strict=True):
                mine.append(session.handle(edge.forward(step, micro_batch)).SerializeToString())
                torch.rand(3)  # somebody else draws from the process's generator
        for session, edge in zip(both, edges, strict=True):
            session.handle(edge.commit(step))
    assert answers == expected
    for session, alone in zip(both, solo, strict=True):
        assert same_bits(weights_of(session), weights_of(alone))


def test_dropout_is_on_in_training_and_its_draw_is_the_micro_batch_s(open_session, edge):
    message = edge.forward(0, 0)
    other = edge.forward(0, 1)
    other.forward.CopyFrom(message.forward)
    session = open_session(edge)
    first, second = session.handle(message).result.loss, session.handle(other).result.loss
    assert first != second
    assert open_session(edge).handle(message).result.loss == first


@pytest.mark.parametrize(("head", "num_labels"), [("sequence-classification", 3), (QUESTIONS, 2)])
def test_evaluation_answers_float32_logits(make_edge, open_session, head, num_labels):
    edge = make_edge(head=head, num_labels=num_labels)
    logits = decode_tensor(open_session(edge).handle(edge.evaluate()).evaluation.logits, CPU)
    rows = sum(edge.lengths) if head == QUESTIONS else len(edge.lengths)
    assert logits.shape == (rows, num_labels)


def test_a_loss_that_is_not_finite_is_answered_as_it_is(session, edge):
    message = edge.forward(0)
    rows = torch.full((sum(edge.lengths), edge.width), float("nan"))
    message.forward.activation.packed.CopyFrom(encode_tensor(rows))
    before = weights_of(session)
    assert math.isnan(session.handle(message).result.loss)
    assert same_bits(before, weights_of(session))


def spoil(edit):
    """A forward message of step 0, with something wrong in it."""

    def make(edge):
        message = edge.forward(0, 0)
        edit(message)
        return message

    return make


def activation(**fields):
    def edit(message):
        for name, value in fields.items():
            target = message.forward.activation
            target.ClearField(name)
            target.MergeFrom(pb.Activation(**{name: value}))

    return spoil(edit)


NONSENSE = {
    "class id too large": (spoil(lambda m: m.forward.labels.classes.ids.__setitem__(0, 3)), "from 0 to 2"),
    "class id negative": (spoil(lambda m: m.forward.labels.classes.ids.__setitem__(0, -1)), "from 0 to 2"),
    "a label missing": (spoil(lambda m: m.forward.labels.classes.ids.pop()), "3 labels expected, 2 came"),
    "labels without any": (spoil(lambda m: m.forward.labels.Clear()), "learns from classes"),
    "labels of another head": (spoil(lambda m: m.forward.labels.spans.starts.append(1)), "learns from classes"),
    "a length of zero": (activation(lengths=[7, 0, 8]), "lengths must be from 1"),
    "no sequence": (activation(lengths=[]), "lengths must be from 1"),
    "a length beyond the padded one": (activation(padded_length=6), "lengths must be from 1"),
    "more than the model's positions": (activation(padded_length=129), "128 positions"),
    "lengths that do not add up": (activation(lengths=[7, 3, 4]), "has shape"),
    "no activation": (spoil(lambda m: m.forward.ClearField("activation")), "unknown element type 0"),
    "another width": (activation(packed=encode_tensor(torch.zeros(15, 5))), "has shape"),
    "three dimensions": (activation(packed=encode_tensor(torch.zeros(15, 4, 1))), "has shape"),
    "bytes missing": (spoil(lambda m: setattr(m.forward.activation.packed, "data", b"12345678")), "needs 240 bytes"),
    "unknown element type": (spoil(lambda m: setattr(m.forward.activation.packed, "data_type", 0)), "element type"),
    "a batch that would fill the memory": (
        activation(lengths=[1] * 3000, padded_length=100, packed=encode_tensor(torch.zeros(3000, 4))),
        "300000 padded tokens",
    ),
    "loss scale negative": (spoil(lambda m: setattr(m.forward, "loss_scale", -1)), "loss_scale"),
    "loss scale infinite": (spoil(lambda m: setattr(m.forward, "loss_scale", math.inf)), "loss_scale"),
    "an empty message": (lambda edge: pb.EdgeMessage(step=0), "neither a commit nor anything else"),
    "an empty evaluation": (lambda edge: pb.EdgeMessage(evaluate=pb.Evaluate()), "unknown element type 0"),
    "another attach": (lambda edge: attach("any"), "first message"),
    "a later step": (lambda edge: edge.forward(1), "step 0 is next"),
    "a gap in the micro-batches": (lambda edge: edge.forward(0, 1), "micro-batch 0 is next"),
    "commit without forward": (lambda edge: edge.commit(0), "0 micro-batches"),
    "commit of a later step": (lambda edge: edge.commit(1), "step 0 is next"),
    "forward with a commit of nothing": (lambda edge: edge.forward(1, commit=edge.commit_part(0)), "0 micro-batches"),
}


@pytest.fixture(scope="module")
def untouched():
    """Answers and weights of a run that nobody talks nonsense in; made once."""
    return []


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_refused_and_changes_nothing(session, open_session, edge, name, untouched):
    make, says = NONSENSE[name]
    with pytest.raises(ProtocolError, match=says):
        session.handle(make(edge))
    assert (session.next_step, session.state) == (0, State.READY)
    if not untouched:
        quiet = open_session(edge)
        untouched[:] = train(quiet, edge, steps=2), weights_of(quiet)
    answers, weights = untouched
    assert train(session, edge, steps=2) == answers
    assert same_bits(weights_of(session), weights)


OUT_OF_ORDER = {
    "a gap in the micro-batches": lambda edge: edge.forward(0, 2),
    "the step after": lambda edge: edge.forward(1, 0),
    "a commit of the step after": lambda edge: edge.commit(1),
    "a commit with a body two steps on": lambda edge: edge.forward(2, commit=edge.commit_part(0)),
    "a commit with a body of its own step": lambda edge: edge.forward(0, 1, commit=edge.commit_part(0)),
    "a commit with a gap after it": lambda edge: edge.forward(1, 1, commit=edge.commit_part(0)),
}


@pytest.mark.parametrize("name", OUT_OF_ORDER)
def test_order_is_kept_within_a_step(session, open_session, edge, name):
    session.handle(edge.forward(0, 0))
    before = weights_of(session)
    with pytest.raises(PreconditionError):
        session.handle(OUT_OF_ORDER[name](edge))
    assert (session.next_step, session.state) == (0, State.ACCUMULATING)
    assert same_bits(before, weights_of(session))
    session.handle(edge.forward(0, 1))
    session.handle(edge.commit(0))
    expected = open_session(edge)
    train(expected, edge, steps=1)
    assert same_bits(weights_of(expected), weights_of(session))


def test_what_was_committed_is_over(session, edge):
    train(session, edge, steps=3, micro_batches=1)
    for message in (edge.forward(2), edge.forward(0), edge.commit(1), edge.commit(0)):
        with pytest.raises(PreconditionError):
            session.handle(message)
    assert session.next_step == 3


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"learning_rates": [0.1]}, "2 learning rates"),
        ({"learning_rates": [0.1, 0.1, 0.1]}, "2 learning rates"),
        ({"learning_rates": [0.1, math.nan]}, "finite"),
        ({"learning_rates": [0.1, -0.1]}, "not negative"),
        ({"clip_scale": math.nan}, "clip_scale"),
        ({"clip_scale": math.inf}, "clip_scale"),
        ({"clip_scale": -math.inf}, "clip_scale"),
    ],
    ids=str,
)
def test_a_commit_is_checked_before_it_is_applied(session, edge, values, says):
    session.handle(edge.forward(0))
    before = weights_of(session)
    part = {"step": 0, "learning_rates": [0.1, 0.1], "clip_scale": 1.0, **values}
    with pytest.raises(ProtocolError, match=says):
        session.handle(pb.EdgeMessage(commit=pb.Commit(**part)))
    assert session.next_step == 0
    assert same_bits(before, weights_of(session))
    session.handle(edge.commit(0))


def test_a_bad_body_keeps_its_commit_from_being_applied(session, edge):
    session.handle(edge.forward(0))
    before = weights_of(session)
    message = edge.forward(1, commit=edge.commit_part(0))
    message.forward.labels.classes.ids[0] = 99
    with pytest.raises(ProtocolError, match="labels must be from 0 to 2"):
        session.handle(message)
    assert (session.next_step, session.state) == (0, State.ACCUMULATING)
    assert same_bits(before, weights_of(session))


def test_a_session_that_failed_half_way_does_not_go_on(make_edge, open_session):
    edge = make_edge()
    edge.groups[-1].arguments["capturable"] = True  # torch notices that this is a CPU as late as in step()
    session = open_session(edge)
    session.handle(edge.forward(0))
    with pytest.raises(TrainingError, match="AdamW cannot take this step with its settings"):
        session.handle(edge.commit(0))
    assert session.state is State.FAILED
    with pytest.raises(PreconditionError, match="half-way"):
        session.handle(edge.evaluate())
