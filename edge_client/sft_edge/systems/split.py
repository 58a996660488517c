"""Algorithm 1 on the edge: net_1 here, net_2 behind a link."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Any, Callable, Deque, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from sft.batch import Batch
from sft.errors import CloudMemoryError, SessionLostError
from sft.models import Net1
from sft.models.lora import merged_tensors
from sft.models.losses import head_loss
from sft.models.seeding import seeded
from sft.optim.gradients import scale_gradients, squared_gradient_norm
from sft.tensors.stream import Shard, safetensors_chunks
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.elements import Codecs
from sft.wire.codec.messages import decode_logits, encode_labels, encode_logits, is_packed, outputs_of
from sft.wire.codec.packing import pack, unpack
from sft.wire.ledger import Ledger, Traffic, plain_split_bytes
from sft_edge.link import Left, Link, PendingReply, RetryPolicy, Transport, checked_weights
from sft_edge.systems.ahead import StepOnItsWay, Unsettled
from sft_edge.systems.crossing import Activation, Crossing
from sft_edge.systems.halves import Halves
from sft_edge.systems.kept import KeptActivations
from sft_edge.systems.kept_on_cloud import KeptOnCloud
from sft_edge.systems.system import SentStep, StepTimer, System

_EVALUATIONS_AHEAD = 2
"""While the cloud works on one evaluation batch, the edge makes the next."""

_KEEPS_NONE = "the cloud keeps no activations (an older release, or --max-kept-bytes 0)"

_MOST_ASKED_BYTES = 256 << 20
"""Of logits that a cloud has to remember for an edge that is away; it remembers four times as much of all answers."""

_TENSOR_HEADER_BYTES = 256
"""In a file, of what a tensor is."""

_LEAVES = 4
"""Times the model's size, of the disk that activations are kept on: the result, and a checkpoint with Adam's states."""


class SplitSystem(System):
    """`sft` or `sl`: see `open_split_system`."""

    def __init__(
        self,
        net_1: Net1,
        optimizer: torch.optim.Optimizer,
        link: Link,
        cloud_shapes: Mapping[str, Tuple[int, ...]],
        seed: int,
        codecs: Codecs,
        labels: str = "cloud",
        first_step: int = 0,
        kept: Union[KeptActivations, KeptOnCloud, None] = None,
    ) -> None:
        """`net_1` filled, `link` open; `cloud_shapes` are those of net_2's parameters, under whole-model names.

        `codecs`: how tensors are written on the wire. `labels`: `cloud` where they travel with the
        activation, `local` where they stay here. Without a parameter of net_1 that is trained there is no backward pass
        here, and no dropout: by `kept` what it then makes of a batch is kept. `first_step` is the cloud's next.
        """
        self.net_1 = net_1
        self.optimizer = optimizer
        self.link = link
        self.ledger = Ledger()
        self._cloud_shapes = cloud_shapes
        self._seed = seed
        self.codecs = codecs
        self._first_step = first_step
        self._labels_stay = labels == "local"
        self._frozen = not any(parameter.requires_grad for parameter in net_1.parameters())
        self.kept = kept
        self._model_width = int(net_1.model.config.hidden_size)
        self._step = StepTimer()
        self._traffic = Traffic()
        self._unsettled = Unsettled()
        self._plain_bytes = 0
        self._asked_bytes = 0  # of logits, since the edge began to leave
        self._cloud_squared_norm = 0.0

    def forward_backward(self, batch: Batch, step: int, micro_batch: int, loss_scale: float) -> float:
        """Algorithm 1, lines 6 to 12."""
        a_BSR, crossing = self._cross(batch, step, micro_batch, loss_scale, self._step, self._answer)
        padded_length = next(iter(batch.inputs.values())).shape[1]
        if self._labels_stay:
            loss = self._loss_here(crossing, batch, padded_length, loss_scale)
        else:
            loss = crossing.loss()
        crossing.wait()
        with self._step.phase("edge_backward"):
            gradient_TR = crossing.gradient()
            if gradient_TR is not None and a_BSR is not None:
                torch.autograd.backward(a_BSR, unpack(gradient_TR, batch.lengths, padded_length))
        self._step.samples += len(batch.lengths)
        self._plain_bytes += self._plain_bytes_of(batch)
        self._cloud_squared_norm = crossing.squared_norm
        return loss

    @property
    def sends_ahead(self) -> bool:
        """See System."""
        return self._frozen and not self._labels_stay and self.link.takes_ahead

    def send(self, step: int, ahead: bool) -> SentStep:
        """See System."""

        def cross(*arguments: Any) -> Crossing:
            return self._cross(*arguments)[1]

        return StepOnItsWay(self.link, step, ahead, cross, self._plain_bytes_of, self.ledger, self._unsettled)

    def _cross(
        self,
        batch: Batch,
        step: int,
        micro_batch: int,
        loss_scale: float,
        timer: StepTimer,
        wait: Callable[[PendingReply], pb.CloudMessage],
    ) -> Tuple[Optional[Tensor], Crossing]:
        """Lines 6 and 7: net_1's output, where it was computed, and a micro-batch that is on its way."""
        labels = None if self._labels_stay else encode_labels(batch.labels, batch.lengths)
        with timer.phase("edge_forward"):
            a_BSR = None
            if self.kept is None:
                a_BSR = self._forward(batch, step, micro_batch)
                activation = _activation(a_BSR, batch)
            else:
                activation = self.kept.activation(self.net_1, batch)
            crossing = Crossing(
                self.link, step, micro_batch, activation, self.codecs, labels, loss_scale=loss_scale, wait=wait
            )
        return a_BSR, crossing

    def _plain_bytes_of(self, batch: Batch) -> int:
        padded_length = next(iter(batch.inputs.values())).shape[1]
        return plain_split_bytes(len(batch.lengths), padded_length, self._model_width)

    def _forward(self, batch: Batch, step: int, micro_batch: int) -> Tensor:
        if self._frozen:
            return self._without_gradient(batch)
        self.net_1.train()
        with seeded(self.net_1.device, self._seed, "net_1", step, micro_batch):
            a_BSR: Tensor = self.net_1(batch.inputs, batch.lengths)
        return a_BSR

    def _without_gradient(self, batch: Batch) -> Tensor:
        """Nor with dropout: nothing is drawn."""
        self.net_1.eval()
        with torch.no_grad():
            a_BSR: Tensor = self.net_1(batch.inputs, batch.lengths)
        return a_BSR

    @property
    def keeps_activations(self) -> bool:
        """See System."""
        return self.kept is not None and not self.kept.on_cloud

    @property
    def sends_rows_once(self) -> bool:
        """See System."""
        return isinstance(self.kept, KeptOnCloud) and self.kept.is_whole

    def prepare(self, batch: Batch) -> None:
        """See System."""
        if self.kept is not None:
            self.kept.activation(self.net_1, batch)

    def _loss_here(self, crossing: Crossing, batch: Batch, padded_length: int, loss_scale: float) -> float:
        """Labels stay: logits have come, their gradient goes."""
        outputs = crossing.outputs()
        assert outputs is not None  # they are the answer where labels stay
        with self._step.phase("edge_backward"):
            logits = self._decode_logits(outputs, batch.lengths, padded_length, self.net_1.device)
            logits.requires_grad_()
            labels = {name: y.to(logits.device) for name, y in batch.labels.items()}
            config, head = self.net_1.model.config, self.net_1.head
            loss = head_loss(head, config.problem_type, logits, labels, batch.lengths)
            (gradient,) = torch.autograd.grad(loss * loss_scale, logits)
            message = encode_logits(gradient, batch.lengths, head, self.codecs.outputs)
        crossing.go_back(message)
        return float(loss.item())

    def _answer(self, pending: PendingReply) -> pb.CloudMessage:
        """Waits, and notes what it took."""
        try:
            reply = pending.result()
        except CloudMemoryError:
            self._traffic += pending.traffic
            raise
        self._step.add("cloud", reply.cloud_seconds)
        self._step.add("uplink_wait", max(reply.waited_seconds - reply.cloud_seconds, 0.0))
        self._traffic += reply.traffic
        return reply.message

    def _decode_logits(
        self, message: pb.Tensor, lengths: Sequence[int], padded_length: int, device: torch.device
    ) -> Tensor:
        columns = outputs_of(self.net_1.model.config, self.net_1.head)
        return decode_logits(message, lengths, padded_length, columns, self.net_1.head, device)

    def undo(self) -> None:
        """See System."""
        super().undo()
        self.link.forget_held()
        self._unsettled.undo()
        self._step.samples = self._plain_bytes = 0  # counted again when the step is begun anew

    def gradient_norm(self) -> float:
        return math.sqrt(squared_gradient_norm(self.net_1.parameters()) + self._cloud_squared_norm)

    def update(self, step: int, clip_scale: float) -> None:
        """Algorithm 1, lines 13 and 14."""
        with self._step.phase("edge_backward"):
            rates = [float(group["lr"]) for group in self.optimizer.param_groups]
            scale_gradients(self.net_1.parameters(), clip_scale)
            self.optimizer.step()  # before the commit: if it raises, neither half takes the step
            self.optimizer.zero_grad(set_to_none=True)
            self.link.commit(step, rates, clip_scale)
        self.ledger.add(self._step.record(step, self._traffic, self._plain_bytes))
        self._traffic, self._plain_bytes = Traffic(), 0

    def logits(self, batches: Iterable[Batch], step: int) -> Iterator[Tensor]:
        self.link.ahead = False
        commit = self.link.flush()  # what is evaluated is the model after its last step
        if commit is not None:
            self.ledger.add_evaluation(commit.traffic, samples=0)
        on_their_way: Deque[Tuple[Batch, int, PendingReply]] = deque()
        for index, batch in enumerate(batches):
            on_their_way.append((batch, index, self._evaluate(batch, step, index)))
            if len(on_their_way) > _EVALUATIONS_AHEAD:
                yield self._evaluated(step, *on_their_way.popleft())
        while on_their_way:
            yield self._evaluated(step, *on_their_way.popleft())

    def _evaluate(self, batch: Batch, step: int, index: int) -> PendingReply:
        if isinstance(self.kept, KeptOnCloud):
            activation = self.kept.activation(self.net_1, batch, is_evaluation=True)
        else:
            activation = _activation(self._without_gradient(batch), batch)
        return self.link.evaluate(step, index, activation.encoded(self.codecs))

    @property
    def can_leave(self) -> bool:
        """See System."""
        return self.sends_ahead and self.link.takes_detach and isinstance(self.kept, KeptOnCloud)

    @property
    def makes_again(self) -> bool:
        """See System."""
        return self.link.makes_again

    def leave(self, sends: Callable[[], None], announce: Callable[[Left], None]) -> None:
        """See System."""
        assert isinstance(self.kept, KeptOnCloud)
        held, self._asked_bytes = len(self.kept), 0
        try:
            self.link.leave(sends, announce)
        except BaseException:
            self.kept.forget_after(held)
            raise

    def ask(self, batches: Iterable[Batch], step: int) -> None:
        """See System."""
        self.link.ahead = True
        self.link.send_held()
        for index, batch in enumerate(batches):
            self._evaluate(batch, step, index)
            rows = sum(batch.lengths) if is_packed(self.net_1.head) else len(batch.lengths)
            self._asked_bytes += 4 * rows * outputs_of(self.net_1.model.config, self.net_1.head)
        if self._asked_bytes > _MOST_ASKED_BYTES:
            raise CloudMemoryError("the logits of all evaluations that are left are more than the cloud remembers")

    def own_parameters(self) -> Dict[str, nn.Parameter]:
        return self.net_1.whole_parameters()

    @property
    def first_step(self) -> int:
        return self._first_step

    @property
    def stopping(self) -> bool:
        return self.link.stopping

    def save_other_half(self) -> Optional[str]:
        return self.link.save_checkpoint().id.sha256

    def keep_checkpoints(self, steps: Sequence[int]) -> None:
        self.link.keep_checkpoints(steps)

    def kept_state(self) -> Dict[str, Tensor]:
        """See System."""
        return self.kept.saved_state() if isinstance(self.kept, KeptOnCloud) else {}

    def load_kept_state(self, state: Mapping[str, Tensor]) -> None:
        """See System."""
        if isinstance(self.kept, KeptOnCloud):
            self.kept.load_state(state)

    @property
    def codec_tables(self) -> Mapping[str, Tensor]:
        """See System."""
        return self.codecs.tables

    def shards(self) -> List[Shard]:
        here = merged_tensors(self.net_1)
        return [
            Shard([tensor.name for tensor in here], safetensors_chunks(here)),
            Shard(sorted(self._cloud_shapes), checked_weights(self.link.weights(), self._cloud_shapes)),
        ]

    def _evaluated(self, step: int, batch: Batch, index: int, pending: PendingReply) -> Tensor:
        try:
            reply = pending.result()
        except CloudMemoryError:
            self.ledger.add_evaluation(pending.traffic, samples=0)
            if self.kept is None or not self.kept.on_cloud:
                raise
            if self.makes_again:
                raise SessionLostError("the cloud had no room for what was left to it") from None
            reply = self._evaluate(batch, step, index).result()  # with rows that the cloud, it has said, does not hold
        self.ledger.add_evaluation(reply.traffic, len(batch.lengths))
        padded_length = next(iter(batch.inputs.values())).shape[1]
        return self._decode_logits(reply.message.evaluation.logits, batch.lengths, padded_length, torch.device("cpu"))


def _activation(a_BSR: Tensor, batch: Batch) -> Activation:
    return Activation(pack(a_BSR, batch.lengths), batch.lengths, a_BSR.shape[1])


def open_split_system(
    start: Halves,
    device: torch.device,
    transport: Transport,
    policy: RetryPolicy = RetryPolicy(),  # noqa: B008  # a tuple
    on_status: Callable[[str], None] = lambda text: None,
    labels: str = "cloud",
    on_link: Callable[[Link], None] = lambda link: None,
    keep_in: Optional[Path] = None,
    left: Optional[Tuple[Left, int]] = None,
    expects: Callable[[int], None] = lambda result_bytes: None,
) -> SplitSystem:
    """Fills net_1 on `device`, and opens a session in which the cloud fills net_2. `start` is used up.

    The edge never holds net_2: what the cloud lacks of it is copied from the checkpoint one tensor at a time. `labels`
    as SplitSystem has it; `on_link` gets the link before it is opened, which may take a while; `keep_in`: the file of a
    frozen edge's activations; `left`: no session is opened, but one gone on with as it was left after so many steps.
    `expects` is told, before anything is sent, how many bytes of the result will have to come, and may raise. Raises
    UsageError, and what opening a link raises.
    """
    expects(sum(_TENSOR_HEADER_BYTES + 4 * math.prod(shape) for shape in start.cloud_shapes.values()))
    optimizer = start.start_edge(device)
    codecs = start.agree_on_codecs(device, on_status)
    link = Link(transport, start.request, start.blobs, policy, on_status)
    on_link(link)
    if left is None:
        opened = link.open()
    else:
        opened = pb.OpenSessionResponse(next_step=left[1], keeps_activations=True)
        link.attach(*left)
    width = start.request.cut.split_rank or int(start.net_1.model.config.hidden_size)
    kept: Union[KeptActivations, KeptOnCloud, None] = None
    keep_key = start.request.keep_key
    if keep_key and opened.keeps_activations:
        held = opened.kept if left is None else None
        kept = KeptOnCloud(keep_key, held, width, codecs, lambda: link.keeps_only, on_status)
    elif keep_key:
        on_status(f"{_KEEPS_NONE}: they are sent again in every epoch")
    if keep_in is not None:
        numbers = sum(math.prod(shape) for shape in start.cloud_shapes.values())
        numbers += sum(parameter.numel() for parameter in start.net_1.parameters())
        leaves = _LEAVES * 4 * numbers
        kept = KeptActivations(keep_in, start.request.run_id, width, codecs, on_status, leaves)
    return SplitSystem(
        start.net_1,
        optimizer,
        link,
        start.cloud_shapes,
        start.request.seed,
        codecs,
        labels,
        opened.next_step,
        kept,
    )
