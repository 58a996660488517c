"""Autograd crosses: one function over the one `Crossing`, and the bookkeeping of a step's micro-batches around it.

Every forward in a step is a micro-batch of its own. The cloud is told of one whose result is gone, so that nobody can
go backward through it any more.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from typing import Any, Callable, Deque, NoReturn, Optional, Sequence, Set, Tuple

import torch
from torch import Tensor

from sft.errors import CloudMemoryError, NonFiniteLossError, SessionLostError, UsageError
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.elements import Codecs, decode_tensor, encode_tensor
from sft.wire.protocol import MAX_WAITING
from sft_edge.link import Link, PendingReply
from sft_edge.script.autocast import autocast_type
from sft_edge.script.cut_model import Cross, Crossed
from sft_edge.script.gradients import CloudGradients
from sft_edge.systems import Activation, Crossing

_Turn = Tuple[int, int]  # step, and how often a step had been undone


class LinkCross(Cross):
    """Crosses a link that is open."""

    def __init__(self, link: Link, codecs: Codecs, device: torch.device, seed: int) -> None:
        """`codecs` and `seed` of the session; `device` of the script's model."""
        self.link = link
        self._seed = self._run_seed = seed
        self._steps_before = 0  # that the run has taken in other sessions, less those of this one that are not its own
        self.gradients = CloudGradients(link, device)
        self.step = 0
        """The step that forwards belong to now; so many were taken before."""
        self.forwards = 0
        """How many of that step were sent."""
        self.is_closed = False
        """Whether the script has ended the session."""
        self.takes_modes = True
        """Whether the cloud knows `Activation.other_mode`."""
        self._codecs = codecs
        self._backwards = 0
        self._evaluations = 0
        self._labels_travel = False  # those of a training batch have
        self._loads = 0
        self._waiting: Set[int] = set()  # micro-batches of that step of which the cloud keeps something
        self._dropped: Deque[Tuple[_Turn, int]] = deque()  # with micro-batches; filled by whoever collects garbage
        self.undone = 0
        """How many steps the cloud has undone for want of memory."""
        self.on_undone: Callable[[], object] = lambda: None
        """Called then: the gradients of this half are to go, too."""
        self.check_halves: Callable[[], object] = lambda: None
        """Raises UsageError where weights of this half became others, and those of the other did not."""

    def __call__(
        self,
        activation: Tensor,
        lengths: Sequence[int] = (),
        padded_length: int = 0,
        *,
        training: bool,
        labels: Optional[pb.Labels] = None,
        want_outputs: bool = True,
        scored: Optional[pb.Labels] = None,
        variant: int = 0,
        other_mode: Sequence[str] = (),
    ) -> Crossed:
        """See Cross."""
        self.check_halves()
        self.gradients.watch()
        if variant and not self.link.takes_variants:
            raise UsageError(
                "the cloud's release takes one set of this model's optional arguments: call it always with those, or "
                "without all of them, or update the cloud"
            )
        if other_mode and not self.takes_modes:
            raise UsageError(
                f"'{other_mode[0]}' is not in the model's mode, train() or eval(), which the cloud's release follows "
                "throughout: update the cloud"
            )
        packed = Activation(activation, lengths, padded_length, variant=variant, other_mode=other_mode)
        if not torch.is_grad_enabled() and not training and not other_mode:  # an evaluation draws nothing
            return self._evaluate(packed, autocast_type(activation.device), labels, scored)

        def ask() -> _Question:
            return self._ask(packed, labels, training, want_outputs, scored)

        loss, outputs = _ThroughCloud.apply(  # type: ignore[no-untyped-call]
            activation, self.gradients.parameter, ask
        )
        return Crossed(outputs, loss)

    @property
    def draws(self) -> pb.Draws:
        """What the cloud's dropout of the step that forwards belong to now is drawn with."""
        return pb.Draws(seed=self._run_seed, step=self.step + self._steps_before)

    def draw_as(self, draws: pb.Draws) -> None:
        """From now on: the run goes on from where it was."""
        self._run_seed, self._steps_before = draws.seed, draws.step - self.step

    @property
    def evaluates_labels(self) -> bool:
        """See Cross."""
        return self._labels_travel

    @property
    def turn(self) -> _Turn:
        """The step that is being accumulated, told from one of the same number that was undone."""
        return self.step, self.undone

    def ready(self) -> float:
        """The clip scale with which the cloud can take a step now.

        Raises UsageError when there is nothing to take it with, NonFiniteLossError, and LinkError when the session is
        over.
        """
        self._check_open()
        if self._backwards == 0:
            raise UsageError(
                "step() without a backward() through the cloud since the last step; a loss of what stays on the edge "
                "alone cannot be stepped with: add a term of what comes from the cloud"
            )
        return self.gradients.clip_scale()

    def commit(
        self, learning_rates: Sequence[float], clip_scale: float, group_arguments: Sequence[pb.GroupArguments]
    ) -> None:
        """The step is taken here: the cloud is to take it, too, and hears of it with the next message."""
        self.link.commit(self.step, learning_rates, clip_scale, group_arguments)
        self.gradients.committed()
        self.step, self.forwards, self._backwards = self.step + 1, 0, 0
        self._waiting.clear()  # a commit has the cloud drop them itself

    def catch_up(self) -> None:
        """Tells the link what has happened since the last message; to be called before every message."""
        self._check_open()
        while self._dropped:
            turn, micro_batch = self._dropped.popleft()
            if turn == self.turn and micro_batch in self._waiting:
                self.link.drop(micro_batch)
                self._waiting.discard(micro_batch)
        self.gradients.tell()

    def drop_waiting(self) -> None:
        """Nobody can go backward any more through a forward so far: weights change, which the cloud wants alone."""
        self._loads += 1
        self._dropped.extend((self.turn, micro_batch) for micro_batch in sorted(self._waiting))
        self.catch_up()

    def check_backward(self, turn: _Turn, micro_batch: int) -> None:
        """Called before a backward. Raises UsageError when it is too late for that."""
        step, undone = turn
        if step != self.step:
            raise UsageError("backward() through a forward of an earlier step: the cloud has stepped since")
        if undone != self.undone:
            raise UsageError("backward() through a forward of a step that the cloud has undone; call the model again")
        self.catch_up()
        if micro_batch not in self._waiting:
            raise UsageError(
                "backward() through a forward from before a state was loaded, or the optimizer's mode was switched; "
                "call the model again"
            )

    def begin_backward(self, micro_batch: int) -> None:
        """Called when nothing is left that could be wrong: from here on the cloud may have added the gradients."""
        self._waiting.discard(micro_batch)
        self._backwards += 1
        self.gradients.begin()

    def end_backward(self, squared_norm: float) -> None:
        """A backward has left the cloud's gradients with this squared norm."""
        # A sum of squares that were rounded may come out below nothing.
        self.gradients.show(math.sqrt(max(squared_norm, 0.0)) if squared_norm == squared_norm else math.nan)

    def _check_open(self) -> None:
        if self.is_closed:
            raise SessionLostError("the session is over: close() was called, or the `with` block has ended")
        self.link.check()

    def _evaluate(
        self,
        activation: Activation,
        autocast: pb.DataType,
        labels: Optional[pb.Labels] = None,
        scored: Optional[pb.Labels] = None,
    ) -> Crossed:
        self.catch_up()
        self._evaluations += 1
        message, device = activation.encoded(self._codecs), activation.packed.device
        labels = labels if self.evaluates_labels else None
        pending = self.link.evaluate(self.step, self._evaluations, message, autocast, labels, scored)
        answer = pending.result().message.evaluation
        if not answer.HasField("loss"):  # without labels, or from an older cloud
            return Crossed(decode_tensor(answer.logits, device), None)
        model = (self.turn, self._loads)

        def fetch() -> Tensor:
            if (self.turn, self._loads) != model:
                raise UsageError("logits of an evaluation are asked for after a step: look at them before it")
            outputs = self._evaluate(activation, autocast).outputs
            assert outputs is not None
            return outputs

        loss = torch.tensor(answer.loss, dtype=torch.float32, device=device)
        return Crossed(None, loss, torch.tensor(list(answer.best_tokens), device=device), fetch)

    def _ask(
        self,
        activation: Activation,
        labels: Optional[pb.Labels],
        training: bool,
        want_outputs: bool,
        scored: Optional[pb.Labels],
    ) -> _Question:
        self.catch_up()
        if len(self._waiting) >= MAX_WAITING:
            raise UsageError(
                f"{MAX_WAITING} results of the model wait for a backward(): use torch.no_grad() where none will "
                "follow, and detach() what is kept, such as a loss to be printed"
            )
        self._labels_travel |= labels is not None
        generation, turn, micro_batch = self.gradients.generation, self.turn, self.forwards
        crossing = Crossing(
            self.link,
            self.step,
            micro_batch,
            activation,
            self._codecs,
            labels,
            loss_scale=0.0,
            wait=self._wait,
            eval_mode=not training,
            want_logits=labels is not None and want_outputs,
            autocast=autocast_type(activation.packed.device),
            scored=scored,
            draws=None if self.draws == pb.Draws(seed=self._seed, step=self.step) else self.draws,
        )
        self.forwards += 1
        self._waiting.add(micro_batch)
        try:
            crossing.wait()
            question = _Question(self, crossing, turn, generation, activation.packed)
            question.answered = weakref.finalize(question, self._dropped.append, (turn, micro_batch))
            question.answered.atexit = False
        except BaseException:  # Ctrl-C: the cloud answers all the same
            self._dropped.append((turn, micro_batch))
            raise
        return question

    def _wait(self, pending: PendingReply) -> pb.CloudMessage:
        """For an answer. Raises CloudMemoryError when the cloud has undone the step: then it is undone here, too."""
        try:
            return pending.result().message
        except CloudMemoryError:
            self.forwards = self._backwards = 0
            self._waiting.clear()
            self.undone += 1
            self.gradients.undone()
            self.on_undone()
            raise

    def encode_gradient(self, gradient: Tensor) -> pb.Tensor:
        """For the wire."""
        return encode_tensor(gradient, self._codecs.outputs)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UsageError("a model that is cut cannot be copied or pickled: it holds a session; use its state_dict()")


class _Question:
    """A forward that nobody has gone backward through yet."""

    answered: Any
    """The finalizer that has a question that was never answered dropped."""

    def __init__(self, cross: LinkCross, crossing: Crossing, turn: _Turn, generation: int, activation: Tensor) -> None:
        self._cross = cross
        self._crossing: Optional[Crossing] = crossing  # None as soon as it is not needed any more
        self._turn = turn
        self._generation = generation
        self._dtype, self._device = activation.dtype, activation.device
        self._outputs_shape = torch.Size()

    def answer(self) -> Tuple[Optional[Tensor], Optional[Tensor]]:
        """Loss and outputs."""
        crossing = self._still()
        message = crossing.outputs()
        outputs = None if message is None else decode_tensor(message, self._device)
        if not crossing.labels_travel:
            assert outputs is not None
            self._outputs_shape = outputs.shape
            return None, outputs
        return torch.tensor(crossing.loss(), dtype=torch.float32, device=self._device), outputs

    def backward(self, grad_loss: Optional[Tensor], grad_outputs: Optional[Tensor]) -> Optional[Tensor]:
        """The gradient by the activation; None for a frozen edge."""
        crossing = self._still()
        self._cross.check_backward(self._turn, crossing.micro_batch)
        if crossing.labels_travel:
            gradient = self._weigh(crossing, grad_loss, grad_outputs)
        else:
            gradient = self._go_back(crossing, grad_outputs)
        self._crossing = None
        return None if gradient is None else gradient.to(self._dtype)

    def _weigh(
        self, crossing: Crossing, grad_loss: Optional[Tensor], grad_outputs: Optional[Tensor]
    ) -> Optional[Tensor]:
        """The cloud has computed the loss and its gradients; how much they count is known now."""
        if grad_outputs is not None:
            raise UsageError(
                "backward() through logits whose loss the cloud has computed: call the model without labels to compute "
                "a loss of your own"
            )
        weight = 0.0 if grad_loss is None else float(grad_loss)
        if not math.isfinite(weight):
            raise NonFiniteLossError(f"the loss is to be multiplied by {weight} in backward()")
        gradient = crossing.gradient()
        cross = self._cross
        is_first, unchanged = cross.gradients.is_empty, cross.gradients.generation == self._generation
        self._begin(crossing)
        crossing.weigh(weight)
        if is_first or unchanged:
            squared_norm = crossing.weighed_squared_norm(weight, is_first)
        else:  # other gradients were added since the forward: only the cloud knows
            reply = cross.link.flush()
            assert reply is not None  # the weight was held
            squared_norm = reply.message.committed.squared_gradient_norm
        cross.end_backward(squared_norm)
        return None if gradient is None else gradient.mul_(weight)

    def _go_back(self, crossing: Crossing, grad_outputs: Optional[Tensor]) -> Optional[Tensor]:
        """The cloud has kept the graph and waits for the gradient of its outputs."""
        if grad_outputs is None:
            grad_outputs = torch.zeros(self._outputs_shape)
        message = self._cross.encode_gradient(grad_outputs)
        self._begin(crossing)
        crossing.go_back(message)
        gradient = crossing.gradient()
        self._cross.end_backward(crossing.squared_norm)
        return gradient

    def _still(self) -> Crossing:
        if self._crossing is None or not self.answered.alive:
            raise UsageError("backward() went through this forward before; call the model again")
        return self._crossing

    def _begin(self, crossing: Crossing) -> None:
        self.answered.detach()
        self._cross.begin_backward(crossing.micro_batch)


class _ThroughCloud(torch.autograd.Function):
    """Loss and outputs of an activation.

    The parameter `cloud_gradients` is an input so that a graph is recorded, and backward comes here, although nothing
    below the cut is trained. Its gradient is shown directly: autograd would add to it.
    """

    @staticmethod
    def forward(
        ctx: Any, activation: Tensor, parameter: Tensor, ask: Callable[[], _Question]
    ) -> Tuple[Optional[Tensor], Optional[Tensor]]:
        ctx.set_materialize_grads(False)
        ctx.question, ctx.parameter = ask(), parameter
        loss, outputs = ctx.question.answer()
        # Views that a function returns cannot be changed in place.
        return loss, None if outputs is None else outputs.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Optional[Tensor]) -> Tuple[Optional[Tensor], None, None]:
        with torch.no_grad():
            gradient = ctx.question.backward(*gradients)
        if torch.is_grad_enabled() and gradient is not None:  # create_graph
            gradient = _NoFurther.apply(gradient, ctx.parameter)  # type: ignore[no-untyped-call]
        return gradient, None, None


class _NoFurther(torch.autograd.Function):
    """A gradient, of which there is none."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, _: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise UsageError(
            "create_graph=True: gradients of gradients do not cross; leave out what is computed of gradients, such as "
            "a penalty"
        )
