"""One edge's net_2 and its state: Algorithm 1, lines 8 to 11 and 14, without a word about the network.

    READY --forward--> ACCUMULATING --forward, backward--> ACCUMULATING
      ^                   |      |
      +----- commit ------+      |
      +-- a step is undone ------+

`evaluate` is answered in READY and ACCUMULATING and changes neither; nor do weights, gradient scales, and `averaged`
and `load_state`, which are refused while a micro-batch waits. A message that breaks a rule is refused and changes
nothing. Where the device has no memory for a micro-batch, or for the step that it leads to, the whole step is undone
and the answer says so. While a message is worked on the state is FAILED, and stays so if the work does not get through
in any other way: a commit that was half applied cannot be taken back, so there is no way on but from a checkpoint. Each
message comes here once; `sft_cloud.service.exactly_once` sees to that.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import torch

from sft.errors import ProtocolError
from sft.models.seeding import seeded
from sft.optim.state import live_state, state_bytes
from sft.tensors.stream import StoredTensor
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.elements import check_tensor
from sft.wire.codec.rows import rounding_of
from sft_cloud.errors import NoMemoryError, PreconditionError, is_out_of_memory
from sft_cloud.memory import MemoryShare
from sft_cloud.session import commit as on_commit
from sft_cloud.session.answers import (
    COPIES_OF_ANSWER,
    answer_bytes,
    asks_for_logits,
    evaluation_bytes,
    fill_evaluation,
)
from sft_cloud.session.autocast import autocast_to, check_autocast
from sft_cloud.session.load_state import Blob, StateLoader
from sft_cloud.session.memory import check_room_for_step, optimizer_bytes
from sft_cloud.session.micro_batches import MicroBatches, check_scale
from sft_cloud.session.upper_half import UpperHalf
from sft_cloud.storage import KeptRows

Work = Callable[[pb.CloudMessage], Iterator[None] | None]
"""What is left to do for a body that was checked: fills in the answer. Others may compute where it yields."""

_REFUSED = "the cloud is out of memory: {}"
_NO_MEMORY = "the cloud's device is out of memory; try smaller batches or another cut"


class State(enum.Enum):
    """Where a session is; see the module's drawing."""

    READY = enum.auto()
    ACCUMULATING = enum.auto()
    FAILED = enum.auto()


class Session:
    """Handles the messages of one edge, in order; not for several threads at once."""

    def __init__(
        self,
        half: UpperHalf,
        optimizer: torch.optim.Optimizer,
        seed: int,
        find_blob: Callable[[str], Path | None] = lambda sha256: None,
        memory: MemoryShare | None = None,
    ) -> None:
        """`optimizer` over the parameters of `half`; `find_blob` gives the file of an uploaded blob; `memory` is
        what the session may take of the server's.
        """
        self.state = State.READY
        self.next_step = 0
        """The first step that is not committed."""
        self.version = 0
        """Counts the changes of weights and of the optimizer's state."""
        self.is_loading = False
        """Whether a part of its weights, or of its optimizer's state, is new, and a part is not."""
        self.has_begun = False
        """Whether a message was applied."""
        self.kept: KeptRows | None = None
        """Where it keeps activations: see `sft_cloud.session.kept`, by which messages come here with all their rows."""
        self._half = self.half = half
        self._optimizer = self.optimizer = optimizer
        self._seed = seed
        self._memory = MemoryShare() if memory is None else memory
        self._remembered_bytes = 0
        self._begins_with: int | None = None  # of the optimizer, once its settings change what it keeps
        self._loader = StateLoader(half, optimizer, find_blob)
        self._micro_batches = MicroBatches(half)
        self._forwards = 0  # answered in step `next_step`
        self._keeps_gradients = False  # there are some of the step before
        self._undone = ""  # why a step was, until a message comes that was not sent ahead

    def handle(self, message: pb.EdgeMessage, remembered_bytes: int = 0) -> pb.CloudMessage:
        """As `handle_in_pieces`, in one piece."""
        pieces = self.handle_in_pieces(message, remembered_bytes)
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                answer: pb.CloudMessage = end.value
                return answer

    def read_blob(self, message: pb.EdgeMessage) -> Blob | None:
        """Of a message that loads one, for `handle_in_pieces`; in any thread. Raises ProtocolError."""
        return self._loader.read(message.load_state) if message.HasField("load_state") else None

    def handle_in_pieces(
        self, message: pb.EdgeMessage, remembered_bytes: int = 0, blob: Blob | None = None, lacks: str = ""
    ) -> Generator[None, None, pb.CloudMessage]:
        """Does what a message asks and returns the answer. `remembered_bytes`: of earlier answers that are kept;
        `blob`: what the message loads, where it was read already; `lacks`: why rows of its activation are not here, for
        which it is skipped. Other sessions may compute where it yields.

        That to a `save_checkpoint` says only that there is a whole step to save: who calls this saves it, since a disk
        takes longer than anybody else should wait for the device.

        Raises ProtocolError when the message makes no sense and PreconditionError when it comes out of order; the state
        is then what it was before.
        """
        answer = pb.CloudMessage(step=message.step, micro_batch=message.micro_batch)
        body = message.WhichOneof("body") or ""
        if self.state is State.FAILED:
            raise PreconditionError("an earlier message of this session failed half-way; open a new session")
        if body in ("attach", "probe", "close"):
            raise PreconditionError("the first message of a stream, and no other, must be an attach")
        if not message.ahead:
            self._undone = ""
        commits = message.HasField("commit")
        if commits and not self._undone:
            self._check_commit(message.commit)
            if reason := on_commit.refusal(message.commit, self._micro_batches):
                self._undo_step(reason)
                self.state = State.READY
        if self._undone:
            answer.step_skipped.reason = self._undone
            return answer
        self._remembered_bytes = remembered_bytes
        try:
            # All of the message is checked before any of it is done.
            self._check_rides(message, commits)
            work = self._check_body(message, body, commits, blob, lacks)
            self.state, self.has_begun = State.FAILED, True
            self._ride(message, commits)
            try:
                pieces = work(answer)
                if pieces is not None:
                    yield from pieces
            except Exception as error:
                refused = isinstance(error, NoMemoryError)
                if body not in ("forward", "backward") or not (refused or is_out_of_memory(error)):
                    raise
                self._undo_step(_REFUSED.format(error) if refused else _NO_MEMORY)
                answer.step_skipped.reason = self._undone
        finally:
            answers = remembered_bytes + COPIES_OF_ANSWER * answer.ByteSize()
            self._memory.settle(self._micro_batches.waiting_bytes(), answers)
        self.state = State.ACCUMULATING if self._forwards else State.READY
        return answer

    def keep_answers(self, size: int) -> None:
        """What is held for its answers from now on, that on its way included. In any thread. Raises NoMemoryError."""
        self._memory.keep_answers(size)

    def stored_parameters(self) -> list[StoredTensor]:
        """Net_2's parameters under whole-model names, sorted; reading one gives it as it is, not a copy."""
        return list(self._half.stored_parameters())

    def stored_optimizer_state(self) -> list[StoredTensor]:
        """The state of net_2's optimizer, in the same way; see `sft.optim.state`."""
        return live_state(self._optimizer, self._half.whole_parameters())

    # What rides on a message.

    def _check_commit(self, commit: pb.Commit) -> None:
        """Raises PreconditionError and ProtocolError when it may not be applied, NoMemoryError when the optimizer
        would keep more with its settings than there is."""
        if commit.step != self.next_step or not (self._forwards or self._keeps_gradients):
            raise PreconditionError(
                f"a commit of step {commit.step} came, but step {self.next_step} is next, "
                f"with {self._forwards} micro-batches so far"
            )
        on_commit.check_commit(commit, self._optimizer)
        groups = on_commit.groups_after(commit, self._optimizer)
        if groups is not None:
            if self._begins_with is None:
                self._begins_with = optimizer_bytes(self._optimizer)
            self._memory.grow(optimizer_bytes(self._optimizer, groups) - self._begins_with)

    def _check_rides(self, message: pb.EdgeMessage, commits: bool) -> None:
        check_scale(message)
        if message.weights:
            step = message.commit.step if commits else message.step
            if step != self.next_step:
                raise PreconditionError(f"weights of step {step} came, but step {self.next_step} is next")
            self._micro_batches.check_weights(message.weights)
        on_commit.check_switch(message, self._optimizer, self._micro_batches)

    def _ride(self, message: pb.EdgeMessage, commits: bool) -> None:
        self._micro_batches.weigh(message.weights)
        if commits:
            self._commit(message.commit)
        if message.HasField("gradient_scale"):
            self._micro_batches.scale(message.gradient_scale)
            self._keeps_gradients &= message.gradient_scale != 0.0
        self.version += on_commit.switch(message, self._optimizer)

    def _commit(self, commit: pb.Commit) -> None:
        on_commit.apply_settings(commit, self._optimizer)
        self._micro_batches.clip(on_commit.clip_scale_of(commit, self._micro_batches))
        on_commit.take_step(self._optimizer)
        self._micro_batches.clear()
        self._keeps_gradients = commit.keep_gradients
        if not commit.keep_gradients:
            self._micro_batches.scale(0.0)
        self._forwards = 0
        self.next_step += 1
        self.version += 1

    def _undo_step(self, reason: str) -> None:
        """As if nothing of the step that is being accumulated had come."""
        self._undone = reason
        self._micro_batches.clear()
        self._micro_batches.scale(0.0)
        self._keeps_gradients = False
        self._forwards = 0

    # The body.

    def _check_body(self, message: pb.EdgeMessage, body: str, commits: bool, blob: Blob | None, lacks: str) -> Work:
        """What is left to do for the body, once what rides on the message is done."""
        if body == "evaluate":
            return self._check_evaluate(message, lacks)
        if not body:
            return self._check_nothing(message, commits)
        if body == "keep_checkpoints":
            return self._answer_committed
        next_step = self.next_step + commits
        if message.step != next_step:
            raise PreconditionError(f"a micro-batch of step {message.step} came, but step {next_step} is next")
        if body == "forward":
            return self._check_forward(message, commits, lacks)
        if body == "backward":
            return self._check_backward(message, commits)
        if body == "save_checkpoint":
            return self._check_save(commits)
        return self._check_load_state(message, commits, blob)

    def _check_nothing(self, message: pb.EdgeMessage, commits: bool) -> Work:
        if not (message.weights or any(map(message.HasField, ("commit", "gradient_scale", "averaged")))):
            raise ProtocolError("the message holds neither a commit nor anything else to do")
        if not commits and message.step != self.next_step:
            raise PreconditionError(f"a message of step {message.step} came, but step {self.next_step} is next")
        return self._answer_committed

    def _check_forward(self, message: pb.EdgeMessage, commits: bool, lacks: str) -> Work:
        forward, next_one = message.forward, 0 if commits else self._forwards
        if message.micro_batch != next_one:
            raise PreconditionError(f"micro-batch {message.micro_batch} came, but micro-batch {next_one} is next")
        if not (math.isfinite(forward.loss_scale) and forward.loss_scale >= 0):
            raise ProtocolError(f"loss_scale must be finite and not negative, not {forward.loss_scale}")
        check_autocast(forward.autocast)
        check_tensor(forward.activation.packed, self._half.codes)
        has_labels = forward.HasField("labels")
        wants_logits = asks_for_logits(forward)
        waits = 0 if commits else self._micro_batches.waiting_bytes(message.weights)
        graph = self._half.training_bytes(forward.activation) + (self._half.cast_bytes() if forward.autocast else 0)
        batch = graph if has_labels else 0  # without labels the graph waits
        if not has_labels:
            waits += graph
        elif not forward.loss_scale:
            waits += self._micro_batches.gradient_bytes()
        if too_large := lacks or self._memory.too_large(waits + batch):
            return self._skips(too_large)
        answers = self._remembered_bytes + answer_bytes(self._half, forward.activation, wants_logits, has_labels)
        try:  # before it is decoded: a code may stand for hundreds of times its bytes
            self._memory.hold(waits, answers, batch)
        except NoMemoryError as error:
            return self._skips(_REFUSED.format(error))
        draws = forward.draws if forward.HasField("draws") else pb.Draws(seed=self._seed, step=message.step)
        rounding = rounding_of(draws.seed, draws.step, message.micro_batch)
        given = self._half.decode(forward.activation, forward.scored)._replace(rounding=rounding)
        labels = self._half.decode_labels(forward.labels, given) if has_labels else {}
        if wants_logits:
            self._half.check_outputs(forward.activation)
        if not commits and not (has_labels and forward.loss_scale):
            self._micro_batches.check_room(message.weights)

        def work(answer: pb.CloudMessage) -> None:
            given.a.requires_grad_(not forward.frozen_edge)
            self._half.train(not forward.eval_mode)
            with (
                seeded(self._half.device, draws.seed, "net_2", draws.step, message.micro_batch),
                autocast_to(forward.autocast, self._half.device),
            ):
                outputs = self._half.outputs(given)
                loss = self._half.loss(outputs, labels, given) if has_labels else None
            if loss is None:
                answer.outputs.logits.CopyFrom(self._half.encode_outputs(outputs, given))
                self._micro_batches.keep_graph(message.micro_batch, given, outputs, graph)
            else:
                # A loss that is not finite is answered as it is: whether to go on is for the edge to decide.
                answer.result.loss = loss.item()
                self._micro_batches.note_loss(answer.result.loss)
                if forward.want_logits:
                    answer.result.logits.CopyFrom(self._half.encode_outputs(outputs, given))
                if forward.loss_scale:
                    self._micro_batches.add(given, loss * forward.loss_scale, answer.result)
                else:
                    self._micro_batches.keep_gradients(message.micro_batch, given, loss, answer.result)
                check_room_for_step(self._optimizer)
            self._forwards += 1

        return work

    def _check_backward(self, message: pb.EdgeMessage, commits: bool) -> Work:
        if commits:
            raise PreconditionError("the commit on this message drops the micro-batch that its Backward is for")
        gradient = self._micro_batches.check_backward(message.micro_batch, message.weights, message.backward.gradient)
        size = COPIES_OF_ANSWER * self._micro_batches.gradient_answer_bytes(message.micro_batch)

        def work(answer: pb.CloudMessage) -> None:
            self._memory.hold(self._micro_batches.waiting_bytes(), self._remembered_bytes + size)
            self._micro_batches.backward(message.micro_batch, gradient, answer.result)
            check_room_for_step(self._optimizer)

        return work

    def _check_save(self, commits: bool) -> Work:
        begun = not commits and self._forwards
        if begun or self._keeps_gradients:
            raise PreconditionError(
                "a checkpoint is saved between two steps: commit this one, and forget its gradients, first"
            )

        def work(answer: pb.CloudMessage) -> None:
            answer.checkpoint_saved.id.step = self.next_step

        return work

    def _check_evaluate(self, message: pb.EdgeMessage, lacks: str) -> Work:
        check_autocast(message.evaluate.autocast)
        check_tensor(message.evaluate.activation.packed, self._half.codes)
        waits = self._micro_batches.waiting_bytes(message.weights)
        batch, wants_logits = evaluation_bytes(self._half, message.evaluate), asks_for_logits(message.evaluate)
        if too_large := lacks or self._memory.too_large(waits + batch):
            return self._skips(too_large, undoes=False)
        answers = self._remembered_bytes + answer_bytes(self._half, message.evaluate.activation, logits=wants_logits)
        self._memory.hold_now(waits, answers, batch)
        given = self._half.decode(message.evaluate.activation, message.evaluate.scored)
        labels = self._half.decode_labels(message.evaluate.labels, given) if message.evaluate.HasField("labels") else {}
        if wants_logits:
            self._half.check_outputs(message.evaluate.activation)

        def work(answer: pb.CloudMessage) -> None:
            self._half.train(False)
            with torch.no_grad(), autocast_to(message.evaluate.autocast, self._half.device):
                fill_evaluation(answer.evaluation, self._half, labels, given)

        return work

    def _check_load_state(self, message: pb.EdgeMessage, commits: bool, blob: Blob | None) -> Work:
        if not commits:
            self._micro_batches.check_nothing_waits(message.weights)
        blob = self._loader.read(message.load_state) if blob is None else blob
        load, made = self._loader.check(message.load_state, blob)
        if message.load_state.optimizer_state:
            # With other settings than now, it may hold more.
            self._memory.grow(made - state_bytes(self._optimizer))
            self._memory.hold_now(made)

        def work(answer: pb.CloudMessage) -> Iterator[None]:
            self.is_loading = True
            yield from load()
            self.is_loading = False
            self.version += 1
            self._answer_committed(answer)

        return work

    def _skips(self, reason: str, undoes: bool = True) -> Work:
        """For what could never fit: the session is none the worse for it."""

        def work(answer: pb.CloudMessage) -> None:
            if undoes:
                self._undo_step(reason)
            answer.step_skipped.reason = reason

        return work

    def _answer_committed(self, answer: pb.CloudMessage) -> None:
        answer.committed.next_step = self.next_step
        answer.committed.squared_gradient_norm = self._micro_batches.squared_norm()
