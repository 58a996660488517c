"""What sessions may take together, and what a batch will take, before anything is taken."""

import weakref

import pytest
import torch
from torch import nn

from sft.models import Cut
from sft.v1 import split_training_pb2 as pb
from sft_cloud.engine.build import build, make_session
from sft_cloud.engine.request import check_request
from sft_cloud.session import memory
from sft_cloud.session.memory import (
    BatchMemory,
    measure,
    session_bytes,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "arguments", "states", "numbers"),
    [
        ("SGD", {}, 0, 0),
        ("SGD", {"momentum": 0.9}, 1, 0),
        ("AdamW", {}, 2, 2 * 4),
        ("AdamW", {"amsgrad": True}, 3, 2 * 4),
        ("RMSprop", {}, 1, 2 * 4),
        ("RMSprop", {"centered": True, "momentum": 0.9}, 3, 2 * 4),
        ("Adagrad", {}, 1, 2 * 4),
    ],
)
def test_what_a_session_begins_with(name, arguments, states, numbers):
    """Weights and gradients, what the optimizer keeps, and two copies of the largest parameter for its step."""
    parameters = [nn.Parameter(torch.empty(shape, device="meta")) for shape in ((50, 60), (60,))]
    optimizer = getattr(torch.optim, name)([{"params": parameters, **arguments}], lr=0.1)
    assert session_bytes(5000, optimizer) == 4 * (5000 + 3060 + 2 * 3000) + 4 * states * 3060 + numbers


@pytest.mark.parametrize("cut", [Cut("sft", 1, 4), Cut("sft", 3, 4), Cut("sl", 1)])
@pytest.mark.parametrize(("sequences", "padded_length"), [(1, 100), (7, 30), (3, 128)])
def test_a_batch_takes_what_three_small_ones_say(make_edge, cut, sequences, padded_length):
    edge = make_edge(cut=cut)
    spec = check_request(edge.request())
    half = make_session(spec, build(spec, CPU), [*edge.weights, *edge.factors], CPU)._half
    parameters = list(half.parameters())

    def run(B, S):
        return half.net_2.train()(torch.zeros(B, S, half.net_2.width, requires_grad=True), [S] * B, {}).logits

    estimate = measure(lambda S: run(1, S), parameters, 128).of(sequences, padded_length)
    taken = memory._saved(lambda: run(sequences, padded_length), parameters)
    assert taken <= estimate <= 2 * taken


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("sequences", "padded_length"), [(1, 1), (7, 30)])
def test_a_graph_in_half_precision_holds_copies_of_the_weights(make_edge, autocast, sequences, padded_length):
    edge = make_edge(cut=Cut("sft", 1, 4))
    spec = check_request(edge.request())
    half = make_session(spec, build(spec, CPU), [*edge.weights, *edge.factors], CPU)._half
    half.net_2.train()

    def run():
        with torch.autocast("cpu", autocast):
            a_BSR = torch.zeros(sequences, padded_length, half.net_2.width, requires_grad=True)
            return half.net_2(a_BSR, [padded_length] * sequences, {}).logits

    taken = memory._saved(run, list(half.parameters()))
    estimate = half.training_bytes(pb.Activation(lengths=[padded_length] * sequences, padded_length=padded_length))
    assert (estimate < taken) == (padded_length == 1)
    assert taken <= estimate + half.cast_bytes()


def test_a_model_that_takes_short_sequences_only():
    linear = nn.Linear(4, 4)
    known = measure(lambda S: linear(torch.zeros(1, S, 4, requires_grad=True)).exp(), list(linear.parameters()), 5)
    assert known.linear == known.square == 0
    assert known.of(10, 5) >= 10 * 5 * 4 * 4
    assert BatchMemory(1.0, 2.0, 3.0).of(2, 10) == int(1.5 * 2 * (1 + 20 + 300))


def test_nothing_of_what_was_measured_stays():
    linear = nn.Linear(4, 4)
    made = []

    def run(length):
        softmax = linear(torch.zeros(1, length, 4, requires_grad=True)).softmax(-1)  # which is saved as it comes out
        made.append(weakref.ref(softmax))
        return softmax

    measure(run, list(linear.parameters()), 128)
    assert len(made) == 3
    assert [one() for one in made] == [None] * 3
