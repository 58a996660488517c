"""What the tests of a session look at, and the messages that ride on others."""

import torch

from sft.v1 import split_training_pb2 as pb

DROPPED = "dropped"


def weights_of(session):
    return {tensor.name: tensor.read().clone() for tensor in session.stored_parameters()}


def gradients_of(session):
    return {name: p.grad.clone() for name, p in session._half.whole_parameters().items() if p.grad is not None}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def weigh(step, *weights, **fields):
    """A message without a body, unless `fields` have one."""
    return rides_on(pb.EdgeMessage(step=step, **fields), *weights)


def rides_on(message, *weights):
    for micro_batch, weight in weights:
        if weight is DROPPED:
            message.weights.add(micro_batch=micro_batch, dropped=True)
        else:
            message.weights.add(micro_batch=micro_batch, weight=weight)
    return message
