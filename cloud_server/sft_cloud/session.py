"""One edge's net_2 and its state: Algorithm 1, lines 6 to 11 and 14, without a word about the network.

    OPENED --attach--> READY --forward--> ACCUMULATING --forward--> ACCUMULATING
                         ^                     |
                         +------- commit ------+

`evaluate` is answered in READY and ACCUMULATING and changes neither. A message that breaks a rule is refused and
changes nothing. While a message is worked on the state is FAILED, and stays so if the work does not get through: half a
step cannot be taken back, so there is no way on.

Shape suffixes: B batch, S padded sequence, T tokens without padding, R width on the wire, C labels.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from sft.codec import decode_activation, decode_labels, encode_tensor, pack
from sft.errors import ProtocolError
from sft.models import Net2, max_positions
from sft.parameter_groups import scale_gradients, set_learning_rates, squared_gradient_norm
from sft.seeding import seeded
from sft.tensor_stream import StoredTensor
from sft.v1 import split_training_pb2 as pb
from sft_cloud.errors import PreconditionError

MAX_PADDED_TOKENS = 1 << 18
"""Largest B x S of a batch: 512 sequences of 512 tokens. A few bytes of lengths could otherwise ask for any memory."""


class State(enum.Enum):
    """Where a session is; see the module's drawing."""

    OPENED = enum.auto()
    READY = enum.auto()
    ACCUMULATING = enum.auto()
    FAILED = enum.auto()


class Session:
    """Handles the messages of one edge, in order; not for several threads at once."""

    def __init__(
        self,
        net_2: Net2,
        optimizer: torch.optim.Optimizer,
        config: PretrainedConfig,
        head: str,
        seed: int,
        data_type: pb.DataType,
    ) -> None:
        """`net_2` filled and on its device, `optimizer` over its parameters, `data_type` of activations on the wire."""
        self.state = State.OPENED
        self.next_step = 0
        """The first step that is not committed."""
        self._net_2 = net_2
        self._optimizer = optimizer
        self._config = config
        self._head = head
        self._seed = seed
        self._data_type = data_type
        self._results: list[pb.Result] = []  # of the micro-batches of step `next_step`

    def handle(self, message: pb.EdgeMessage) -> pb.CloudMessage:
        """Does what a message asks and returns the answer; one that was answered before is answered from memory.

        Raises ProtocolError when the message makes no sense and PreconditionError when it comes out of order; the state
        is then what it was before.
        """
        answer = pb.CloudMessage(step=message.step, micro_batch=message.micro_batch)
        body = message.WhichOneof("body")
        if self.state is State.FAILED:
            raise PreconditionError("an earlier message of this session failed half-way; open a new session")
        if (body == "attach") is not (self.state is State.OPENED):
            raise PreconditionError("the first message of a stream, and no other, must be an attach")
        if body == "attach":
            self.state = State.READY
            answer.attached.next_step = self.next_step
            return answer
        commits = message.HasField("commit") and self._is_new(message.commit)
        # All of the message is checked before any of it is done.
        work = self._check_body(message, 0 if commits else len(self._results), self.next_step + commits)
        self.state = State.FAILED
        if commits:
            self._commit(message.commit)
        work(answer)
        self.state = State.ACCUMULATING if self._results else State.READY
        return answer

    def stored_parameters(self) -> list[StoredTensor]:
        """Net_2's parameters under whole-model names, sorted; reading one copies it to the CPU as it is then."""
        return [
            StoredTensor(name, parameter.dtype, tuple(parameter.shape), _reader(parameter))
            for name, parameter in sorted(self._net_2.whole_parameters().items())
        ]

    def _check_body(self, message: pb.EdgeMessage, answered: int, next_step: int) -> Callable[[pb.CloudMessage], None]:
        """What is left to do for the body, once the commit is applied.

        `answered`: micro-batches of step `next_step` that were answered, both counted after the commit.
        """
        body = message.WhichOneof("body")
        if body == "forward":
            if message.step != next_step:
                raise PreconditionError(f"a micro-batch of step {message.step} came, but step {next_step} is next")
            if message.micro_batch > answered:
                raise PreconditionError(f"micro-batch {message.micro_batch} came, but micro-batch {answered} is next")
            if message.micro_batch < answered:
                return lambda answer: answer.result.CopyFrom(self._results[message.micro_batch])
            return self._check_forward(message)
        if body == "evaluate":
            return self._check_evaluate(message)
        if not message.HasField("commit"):
            raise ProtocolError("the message holds neither a commit nor anything else to do")
        return lambda answer: answer.committed.CopyFrom(pb.Committed(next_step=self.next_step))

    def _check_forward(self, message: pb.EdgeMessage) -> Callable[[pb.CloudMessage], None]:
        forward = message.forward
        a_BSR, lengths = self._decode(forward.activation)
        labels = decode_labels(forward.labels, lengths, a_BSR.shape[1], self._config, self._head)
        if not (math.isfinite(forward.loss_scale) and forward.loss_scale > 0):
            raise ProtocolError(f"loss_scale must be a positive number, not {forward.loss_scale}")

        def work(answer: pb.CloudMessage) -> None:
            a_BSR.requires_grad_()
            self._net_2.train()
            with seeded(self._net_2.device, self._seed, "net_2", message.step, message.micro_batch):
                loss = self._net_2(a_BSR, lengths, labels).loss
                (loss * forward.loss_scale).backward()
            # A loss that is not finite is answered as it is: whether to go on is for the edge to decide.
            answer.result.loss = loss.item()
            answer.result.packed_gradient.CopyFrom(encode_tensor(pack(_gradient(a_BSR), lengths), self._data_type))
            answer.result.squared_gradient_norm = squared_gradient_norm(self._net_2.parameters())
            self._results.append(answer.result)

        return work

    def _check_evaluate(self, message: pb.EdgeMessage) -> Callable[[pb.CloudMessage], None]:
        a_BSR, lengths = self._decode(message.evaluate.activation)

        def work(answer: pb.CloudMessage) -> None:
            self._net_2.eval()
            with torch.no_grad():
                logits = self._net_2(a_BSR, lengths, {}).logits
            if self._head == "question-answering":
                logits = pack(logits, lengths)
            answer.evaluation.logits.CopyFrom(encode_tensor(logits))

        return work

    def _decode(self, activation: pb.Activation) -> tuple[Tensor, list[int]]:
        padded_tokens = len(activation.lengths) * activation.padded_length
        if padded_tokens > MAX_PADDED_TOKENS:
            raise ProtocolError(f"a batch of {padded_tokens} padded tokens is too large; at most {MAX_PADDED_TOKENS}")
        return decode_activation(activation, self._net_2.width, max_positions(self._config), self._net_2.device)

    def _is_new(self, commit: pb.Commit) -> bool:
        """Whether a commit is still to be applied; False for one that was. Raises when it may not be."""
        if commit.step == self.next_step - 1:
            return False
        if commit.step != self.next_step or not self._results:
            raise PreconditionError(
                f"a commit of step {commit.step} came, but step {self.next_step} is next, "
                f"with {len(self._results)} micro-batches so far"
            )
        groups, rates = len(self._optimizer.param_groups), commit.learning_rates
        if len(rates) != groups or not all(math.isfinite(rate) and rate >= 0 for rate in rates):
            raise ProtocolError(
                f"a commit needs {groups} learning rates, finite and not negative; got {list(rates)[:8]}"
            )
        if not (math.isfinite(commit.clip_scale) and commit.clip_scale >= 0):
            raise ProtocolError(f"clip_scale must be finite and not negative, not {commit.clip_scale}")
        return True

    def _commit(self, commit: pb.Commit) -> None:
        set_learning_rates(self._optimizer, list(commit.learning_rates))
        scale_gradients(self._net_2.parameters(), commit.clip_scale)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._results.clear()
        self.next_step += 1


def _gradient(a_BSR: Tensor) -> Tensor:
    return torch.zeros_like(a_BSR) if a_BSR.grad is None else a_BSR.grad


def _reader(parameter: nn.Parameter) -> Callable[[], Tensor]:
    return lambda: parameter.detach().to("cpu", copy=True)
