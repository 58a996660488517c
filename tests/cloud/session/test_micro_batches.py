"""The three ways through a micro-batch: gradients added at once, weighed later, or by a Backward of the edge's."""

import math

import pytest
import torch
from support.session_parts import DROPPED, gradients_of, rides_on, same_bits, weigh, weights_of
from support.tiny import make_tiny_model
from support.tiny_edge import QUESTIONS, TOKENS, TinyEdge
from transformers import AutoConfig

from sft.errors import ProtocolError
from sft.models import Cut
from sft.models.losses import head_loss
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.elements import decode_tensor, encode_tensor
from sft.wire.codec.messages import decode_logits, outputs_of
from sft.wire.codec.packing import pack
from sft_cloud.errors import PreconditionError
from sft_cloud.session import micro_batches
from sft_cloud.session import upper_half as half

CPU = torch.device("cpu")
EDGES = [
    {},
    {"cut": Cut("sl", 2)},
    {"cut": Cut("sft", 2, 4, "low-rank")},
    {"problem_type": "multi_label_classification"},
    {"num_labels": 1, "problem_type": "regression"},
    {"num_labels": 2, "head": QUESTIONS},
    {"head": TOKENS},
]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "gpt2", "gpt2", layers=3, head="causal-lm")


@pytest.fixture
def any_edge(make_edge, decoder):
    def make(values):
        if values.get("head") == TOKENS:
            return TinyEdge(decoder, AutoConfig.from_pretrained(decoder), **values)
        return make_edge(**values)

    return make


@pytest.fixture
def session(open_session, edge):
    return open_session(edge)


def edge_loss(edge, outputs):
    """What the edge makes of logits: the loss, and the message with its gradient."""
    S, C = max(edge.lengths), outputs_of(edge.config, edge.head)
    logits = decode_logits(outputs.logits, edge.lengths, S, C, edge.head, CPU).requires_grad_()
    labels = half.decode_labels(edge.labels(), list(edge.lengths), S, edge.config, edge.head)
    loss = head_loss(edge.head, edge.config.problem_type, logits, labels, edge.lengths)
    (gradient,) = torch.autograd.grad(loss * 0.5, logits)
    return loss.item(), gradient if edge.head == "sequence-classification" else pack(gradient, edge.lengths)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("values", EDGES, ids=str)
def test_the_three_ways_are_one_bit_for_bit(any_edge, open_session, values):
    """Dropout on, two micro-batches a step, two steps."""
    edge = any_edge(values)
    at_once, weighed, here = (open_session(edge) for _ in range(3))
    for step in range(2):
        for m in range(2):
            first = at_once.handle(edge.forward(step, m)).result

            second = weighed.handle(edge.forward(step, m, loss_scale=0.0)).result
            assert weighed.handle(weigh(step, (m, 0.5), micro_batch=m)).WhichOneof("body") == "committed"

            outputs = here.handle(edge.unlabelled(step, m)).outputs
            loss, gradient = edge_loss(edge, outputs)
            third = here.handle(edge.backward(step, m, gradient)).result

            assert first.loss == second.loss == loss
            by_a = [decode_tensor(one.packed_gradient, CPU) for one in (first, second, third)]
            assert by_a[0].equal(0.5 * by_a[1])
            assert by_a[0].equal(by_a[2])
            assert first.squared_gradient_norm == third.squared_gradient_norm
            assert same_bits(gradients_of(at_once), gradients_of(weighed))
            assert same_bits(gradients_of(at_once), gradients_of(here))
        for session in (at_once, weighed, here):
            session.handle(edge.commit(step))
    assert same_bits(weights_of(at_once), weights_of(weighed))
    assert same_bits(weights_of(at_once), weights_of(here))


def test_the_norm_is_foretold_for_any_weight(session, edge):
    """What Result says of it is what Committed says once the weight is known."""
    norms = []
    for m, weight in enumerate((0.5, -2.0, 3.0)):
        result = session.handle(edge.forward(0, m, loss_scale=0.0)).result
        norms.append(
            result.squared_gradient_norm + 2 * weight * result.gradient_product + weight**2 * result.own_squared_norm
        )
        committed = session.handle(weigh(0, (m, weight), micro_batch=m)).committed
        assert committed.next_step == 0
        assert committed.squared_gradient_norm == pytest.approx(norms[-1], rel=1e-5)
    assert len({round(norm, 6) for norm in norms}) == 3


def test_weights_ride_on_whatever_comes_next(session, open_session, edge):
    """On the next micro-batch, on a Backward, on an evaluation, with the commit."""
    one_by_one = open_session(edge)
    weights = [0.5, 0.25, -1.0, 2.0]
    for m, weight in enumerate(weights):
        one_by_one.handle(edge.forward(0, m, loss_scale=0.0))
        one_by_one.handle(weigh(0, (m, weight), micro_batch=m))
    logits = one_by_one.handle(edge.unlabelled(0, 4)).outputs.logits
    gradient = torch.ones(tuple(logits.shape))
    one_by_one.handle(edge.backward(0, 4, gradient))
    one_by_one.handle(edge.commit(0))

    session.handle(edge.forward(0, 0, loss_scale=0.0))
    session.handle(rides_on(edge.forward(0, 1, loss_scale=0.0), (0, 0.5)))
    session.handle(rides_on(edge.evaluate(), (1, 0.25)))
    session.handle(edge.forward(0, 2, loss_scale=0.0))
    session.handle(edge.forward(0, 3, loss_scale=0.0))
    session.handle(rides_on(edge.unlabelled(0, 4), (2, -1.0)))
    session.handle(rides_on(edge.backward(0, 4, gradient), (3, 2.0)))
    session.handle(edge.commit(0))
    assert same_bits(weights_of(session), weights_of(one_by_one))


def test_a_commit_takes_the_weights_that_come_with_it(session, open_session, edge):
    apart = open_session(edge)
    apart.handle(edge.forward(0, 0, loss_scale=0.0))
    apart.handle(weigh(0, (0, 1.0)))
    apart.handle(edge.commit(0))
    apart.handle(edge.forward(1, 0))

    session.handle(edge.forward(0, 0, loss_scale=0.0))
    message = rides_on(edge.forward(1, 0, commit=edge.commit_part(0)), (0, 1.0))
    session.handle(message)
    assert same_bits(weights_of(session), weights_of(apart))
    assert same_bits(gradients_of(session), gradients_of(apart))


def test_the_first_gradients_are_taken_as_they_are(session, edge):
    """Without a copy: what was kept aside becomes what is stepped with."""
    session.handle(edge.forward(0, 0, loss_scale=0.0))
    (kept,) = session._micro_batches._kept.values()
    session.handle(weigh(0, (0, 0.5)))
    taken = {parameter.grad.data_ptr() for parameter in session._half.parameters() if parameter.grad is not None}
    assert taken == {gradient.data_ptr() for gradient in kept if gradient is not None}


@pytest.mark.parametrize("way", ["kept aside", "without labels"])
def test_what_is_dropped_is_let_go(session, open_session, edge, way):
    untouched = open_session(edge)
    untouched.handle(edge.forward(0, 0))
    session.handle(edge.forward(0, 0))
    session.handle(edge.unlabelled(0, 1) if way == "without labels" else edge.forward(0, 1, loss_scale=0.0))
    session.handle(weigh(0, (1, DROPPED)))
    session.handle(weigh(0, (1, DROPPED), micro_batch=1))  # once more does no harm
    assert not session._micro_batches._waiting()
    assert same_bits(gradients_of(session), gradients_of(untouched))


def test_weight_zero_adds_zeros(session, open_session, edge):
    """As on one machine, where a parameter's gradient is then zeros, not None: an optimizer counts the step."""
    session.handle(edge.forward(0, 0, loss_scale=0.0))
    session.handle(weigh(0, (0, 0.0)))
    gradients = gradients_of(session)
    assert len(gradients) == len(dict(session._half.whole_parameters()))
    assert not any(gradient.any() for gradient in gradients.values())
    dropped = open_session(edge)
    dropped.handle(edge.forward(0, 0, loss_scale=0.0))
    dropped.handle(weigh(0, (0, DROPPED)))
    assert gradients_of(dropped) == {}


def test_a_commit_drops_what_still_waits(session, open_session, edge):
    expected = open_session(edge)
    expected.handle(edge.forward(0, 0))
    expected.handle(edge.commit(0))
    session.handle(edge.forward(0, 0))
    session.handle(edge.forward(0, 1, loss_scale=0.0))
    session.handle(edge.unlabelled(0, 2))
    session.handle(edge.commit(0))
    assert same_bits(weights_of(session), weights_of(expected))
    assert not session._micro_batches._waiting()
    with pytest.raises(PreconditionError, match="step 0"):
        session.handle(weigh(0, (1, 1.0)))


# Scaling, keeping.


def test_a_gradient_scale_is_done_after_the_weights_and_before_the_body(session, open_session, edge):
    session.handle(edge.forward(0, 0))
    before = gradients_of(session)
    session.handle(weigh(0, gradient_scale=0.25))
    assert all(torch.equal(value, 0.25 * before[name]) for name, value in gradients_of(session).items())

    session.handle(edge.forward(0, 1, loss_scale=0.0))
    message = rides_on(edge.forward(0, 2), (1, 1.0))
    message.gradient_scale = 0.0
    session.handle(message)
    alone = open_session(edge)
    for m in range(2):
        alone.handle(edge.forward(0, m, loss_scale=0.0))
    alone.handle(edge.forward(0, 2))
    assert same_bits(gradients_of(session), gradients_of(alone))
    session.handle(weigh(0, gradient_scale=0.0, micro_batch=1))
    assert gradients_of(session) == {}


def test_gradients_may_outlive_their_step(session, open_session, edge):
    """A script that does not zero them steps with them once more, and with what is added to them."""
    session.handle(edge.forward(0, 0))
    kept = gradients_of(session)
    message = edge.commit(0)
    message.commit.keep_gradients = True
    committed = session.handle(message).committed
    assert same_bits(kept, gradients_of(session))
    assert committed.squared_gradient_norm > 0
    assert session.handle(edge.commit(1)).committed.next_step == 2, "without a forward in between"
    assert gradients_of(session) == {}
    with pytest.raises(PreconditionError, match="0 micro-batches"):
        session.handle(edge.commit(2))


def test_kept_gradients_can_be_forgotten_after_all(session, edge):
    session.handle(edge.forward(0, 0))
    message = edge.commit(0)
    message.commit.keep_gradients = True
    message.gradient_scale = 0.0  # after the commit
    session.handle(message)
    assert gradients_of(session) == {}
    with pytest.raises(PreconditionError, match="0 micro-batches"):
        session.handle(edge.commit(1))


# What a Forward may ask for.


def test_a_frozen_edge_gets_no_gradient(session, open_session, edge):
    expected = open_session(edge)
    expected.handle(edge.forward(0, 0))
    result = session.handle(edge.forward(0, 0, frozen_edge=True)).result
    assert not result.HasField("packed_gradient")
    assert same_bits(gradients_of(session), gradients_of(expected))
    session.handle(edge.forward(0, 1, frozen_edge=True, loss_scale=0.0))
    session.handle(weigh(0, (1, 1.0)))
    session.handle(edge.unlabelled(0, 2, frozen_edge=True))
    result = session.handle(edge.backward(0, 2, torch.ones(3, 3))).result
    assert not result.HasField("packed_gradient")
    assert result.squared_gradient_norm > 0


def test_nothing_to_train_anywhere_is_no_error(make_edge, open_session):
    edge = make_edge()
    edge.groups = [type(group)([], group.arguments) for group in edge.groups]
    session = open_session(edge)
    for m, message in enumerate((edge.forward(0, 0), edge.forward(0, 1, loss_scale=0.0), edge.unlabelled(0, 2))):
        message.forward.frozen_edge = True
        assert session.handle(message).micro_batch == m
    result = session.handle(edge.backward(0, 2, torch.ones(3, 3))).result
    assert result.squared_gradient_norm == 0.0
    assert math.isfinite(session.handle(edge.commit(0)).committed.next_step)


def test_eval_mode_is_without_dropout(session, edge):
    outputs = [session.handle(edge.unlabelled(0, 0, eval_mode=True)).outputs.logits]
    evaluation = pb.EdgeMessage(evaluate=pb.Evaluate(activation=edge.activation(0, 0)))
    assert outputs[0] == session.handle(evaluation).evaluation.logits
    dropped = session.handle(edge.unlabelled(0, 1, activation=edge.activation(0, 0))).outputs.logits
    assert dropped != outputs[0]


def test_logits_are_sent_where_they_are_wanted(session, edge):
    result = session.handle(edge.forward(0, 0, want_logits=True, eval_mode=True)).result
    evaluation = session.handle(pb.EdgeMessage(evaluate=pb.Evaluate(activation=edge.activation(0, 0)))).evaluation
    assert result.logits == evaluation.logits
    assert not session.handle(edge.forward(0, 1)).result.HasField("logits")


def test_autocast_runs_in_half_precision(session, open_session, edge):
    full = session.handle(edge.forward(0, 0, eval_mode=True, want_logits=True)).result
    session = open_session(edge)
    fields = {"eval_mode": True, "want_logits": True, "autocast": pb.DATA_TYPE_BFLOAT16}
    rough = session.handle(edge.forward(0, 0, **fields)).result
    assert rough.logits.data_type == pb.DATA_TYPE_FLOAT32
    assert rough.loss != full.loss
    assert rough.loss == pytest.approx(full.loss, abs=0.05)
    fields = {"eval_mode": True, "autocast": pb.DATA_TYPE_BFLOAT16}
    outputs = session.handle(edge.unlabelled(0, 1, activation=edge.activation(0, 0), **fields)).outputs
    assert outputs.logits == rough.logits
    session.handle(edge.backward(0, 1, torch.ones(3, 3)))
    assert {gradient.dtype for gradient in gradients_of(session).values()} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")


def test_an_evaluation_runs_in_the_precision_of_the_edge(session, edge):
    full = session.handle(edge.evaluate()).evaluation.logits
    message = edge.evaluate()
    message.evaluate.autocast = pb.DATA_TYPE_BFLOAT16
    rough = session.handle(message).evaluation.logits
    assert rough.data_type == pb.DATA_TYPE_FLOAT32
    assert rough != full
    torch.testing.assert_close(decode_tensor(rough, CPU), decode_tensor(full, CPU), atol=0.05, rtol=0)
    assert session.handle(edge.evaluate()).evaluation.logits == full
    message.evaluate.autocast = pb.DATA_TYPE_FLOAT32
    with pytest.raises(ProtocolError, match="autocast must be"):
        session.handle(message)


def test_a_gradient_that_is_not_finite_is_the_edge_s_to_judge(session, edge):
    """As GradScaler does: it looks at the norm."""
    session.handle(edge.unlabelled(0, 0))
    result = session.handle(edge.backward(0, 0, torch.full((3, 3), math.inf))).result
    assert not math.isfinite(result.squared_gradient_norm)
    session.handle(weigh(0, gradient_scale=0.0))
    session.handle(edge.forward(0, 1))
    assert math.isfinite(session.handle(weigh(0, gradient_scale=1.0, micro_batch=1)).committed.squared_gradient_norm)


def test_gradients_that_share_memory_are_told_apart():
    x = torch.ones(3)
    expanded = torch.ones(1).expand(3)
    own = micro_batches._own((x, x, None, expanded, x.view(3, 1)))
    own[0].mul_(2)
    own[3].mul_(3)
    assert [None if one is None else one.reshape(-1).tolist() for one in own] == [
        [2.0] * 3,
        [1.0] * 3,
        None,
        [3.0] * 3,
        [1.0] * 3,
    ]
    assert own[0].data_ptr() == x.data_ptr()


def test_a_gradient_of_any_element_type(session, edge):
    session.handle(edge.unlabelled(0, 0))
    body = pb.Backward(gradient=encode_tensor(torch.ones(3, 3), pb.DATA_TYPE_BFLOAT16))
    assert session.handle(pb.EdgeMessage(backward=body)).result.squared_gradient_norm > 0


def test_an_evaluation_with_labels_gives_the_loss_and_the_best_tokens(open_session, any_edge):
    edge = any_edge({"head": TOKENS})
    session = open_session(edge)
    expected = session.handle(edge.forward(0, 0, eval_mode=True, want_logits=True)).result
    evaluate = pb.Evaluate(activation=edge.activation(0, 0), labels=edge.labels())
    gradients = gradients_of(session)
    evaluation = session.handle(pb.EdgeMessage(evaluate=evaluate)).evaluation
    assert same_bits(gradients_of(session), gradients)
    assert evaluation.loss == expected.loss
    assert not evaluation.HasField("logits")
    assert list(evaluation.best_tokens) == decode_tensor(expected.logits, CPU).argmax(-1).tolist()
    evaluate.labels.tokens.ids.append(0)
    with pytest.raises(ProtocolError, match="labels expected"):
        session.handle(pb.EdgeMessage(evaluate=evaluate))


def test_draws_stand_for_the_sessions_seed_and_the_messages_step(open_session, edge):
    """Of a run that goes on in another session."""
    results = {}
    for seed, step in ((None, None), (edge.seed, 0), (edge.seed, 5), (edge.seed + 1, 0)):
        draws = None if seed is None else pb.Draws(seed=seed, step=step)
        results[seed, step] = open_session(edge).handle(edge.forward(0, 0, draws=draws)).result
    assert results[edge.seed, 0] == results[None, None]
    assert results[edge.seed, 5] != results[None, None] != results[edge.seed + 1, 0]
