"""Scripts that train a model: the same function runs on a model that is split, and on one that is not."""

from __future__ import annotations

import copy
import os
import re
import sys
import threading
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import pytest
import torch
from support.tiny import tiny_config
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import QuestionAnsweringModelOutput, SequenceClassifierOutput

from sft import SFTOptimizer
from sft.batch import Batch
from sft.models import HEADS, Cut, Whole, build_whole, head_of
from sft.models.weights import fill, live_factors, live_tensors
from sft.v1 import split_training_pb2 as pb
from sft_edge.link.grpc_transport import GrpcTransport
from sft_edge.link.transport import Stream, Transport

LENGTHS, CHOICES = (7, 3, 5, 6), 2

Script = Callable[[Any, Any], Any]
"""Trains a model with an optimizer, in place."""


def tiny_model(family: str = "bert", head: str = "sequence-classification", **overrides: object) -> PreTrainedModel:
    """Three blocks, three classes, no dropout; larger weights than the library draws, so that all of them matter."""
    values = {"initializer_range": 0.2, **overrides}
    if head.endswith("classification"):
        values = {"num_labels": 3, **values}
    config = tiny_config(family, 3, **values)
    for name in vars(config):
        if name in ("dropout", "attention_dropout", "qa_dropout", "seq_classif_dropout") or name.endswith("pdrop"):
            setattr(config, name, 0.0)
        if name.endswith(("dropout_prob", "last_dropout")):
            setattr(config, name, 0.0)
    config.classifier_dropout = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = HEADS[head].auto_class.from_config(config)
    return model.train()


def with_dropout_above(model: PreTrainedModel, **settings: float) -> PreTrainedModel:
    """Settings of the configuration, that the modules above the cut follow: the cloud draws, and the edge does not."""
    model.config.update({name: p for name, p in settings.items() if hasattr(model.config, name)})
    described = dict(type(model)(copy.deepcopy(model.config)).named_modules())
    for name, module in model.named_modules():
        below = re.search(r"embeddings|\.(layer|h)\.(0|1\.(?!output\.dropout|mlp\.dropout))|^transformer\.drop$", name)
        if below is None:  # some keep theirs as a number
            own = ("p",) if isinstance(module, nn.Dropout) else [key for key in vars(module) if "drop" in key]
            vars(module).update({key: getattr(described[name], key) for key in own})
    return model


def batches(count: int, model: Any, labels: bool = True) -> List[Dict[str, Tensor]]:
    """Micro-batches as the model takes them, padded on the right, each with other tokens."""
    head, config = _head(model), model.config
    made = []
    for index in range(count):
        draw = torch.Generator().manual_seed(index)
        B, S = len(LENGTHS), max(LENGTHS)
        mask = (torch.arange(S)[None] < torch.tensor(LENGTHS)[:, None]).long()
        ids = torch.randint(5, 40, (B, S), generator=draw) * mask + int(config.pad_token_id) * (1 - mask)
        batch = {"input_ids": ids, "attention_mask": mask}
        if labels and head == "question-answering":
            batch["start_positions"] = torch.tensor([1, 0, 2, 3])
            batch["end_positions"] = torch.tensor([4, 2, 2, 5])
        elif labels and head == "multiple-choice":
            batch["labels"] = torch.randint(0, CHOICES, (B // CHOICES,), generator=draw)
        elif labels and head == "causal-lm":
            batch["labels"] = ids.masked_fill(mask == 0, -100)
        elif labels and HEADS[head].learns == "tokens":
            end = config.vocab_size if head == "masked-lm" else config.num_labels
            learned = mask.bool() & (torch.rand(B, S, generator=draw) < 0.7)
            batch["labels"] = torch.randint(0, end, (B, S), generator=draw).masked_fill(~learned, -100)
        elif labels and config.problem_type == "multi_label_classification":
            batch["labels"] = torch.randint(0, 2, (B, config.num_labels), generator=draw).float()
        elif labels and config.num_labels == 1:
            batch["labels"] = torch.randn(B, generator=draw)
        elif labels:
            batch["labels"] = torch.randint(0, config.num_labels, (B,), generator=draw)
        if head == "multiple-choice":
            batch.update({name: batch[name].unflatten(0, (-1, CHOICES)) for name in ("input_ids", "attention_mask")})
        made.append(batch)
    return made


def _head(model: Any) -> str:
    return str(model.net.head) if isinstance(model, OneMachine) else head_of(model)


class OneMachine(nn.Module):
    """The decomposed model in one piece, with the face of a transformers model and the whole model's names."""

    def __init__(self, whole: Whole) -> None:
        super().__init__()
        self.net = whole
        self.config = whole.model.config

    def forward(
        self,
        input_ids: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        inputs_embeds: Optional[Tensor] = None,
        **labels: Tensor,
    ) -> Any:
        mask_BS = attention_mask.flatten(0, -2)
        inputs = {"inputs_embeds": inputs_embeds} if input_ids is None else {"input_ids": input_ids.flatten(0, -2)}
        output = self.net(inputs, mask_BS.sum(1).tolist(), labels)
        if self.net.head == "question-answering":
            start, end = output.logits.unbind(-1)
            return QuestionAnsweringModelOutput(loss=output.loss, start_logits=start, end_logits=end)
        has_choices = attention_mask.dim() == 3
        logits = output.logits.reshape(attention_mask.shape[:2]) if has_choices else output.logits
        return SequenceClassifierOutput(loss=output.loss, logits=logits)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[Tuple[str, nn.Parameter]]:
        return iter(self.net.whole_parameters().items())


def one_machine(model: PreTrainedModel, cut: Cut, calibration: Sequence[Dict[str, Tensor]] = ()) -> OneMachine:
    """What a model that is still whole would be after the cut, on one machine; what is frozen stays frozen."""
    head = head_of(model)
    whole = build_whole(model.config, head, cut)
    flat = [{name: b[name].flatten(0, -2) for name in ("input_ids", "attention_mask")} for b in calibration]
    fitted = [Batch({"input_ids": b["input_ids"]}, b["attention_mask"].sum(1).tolist(), {}) for b in flat]
    for_edge, for_cloud = live_factors(model, head, cut, fitted)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    fill(whole, [*live_tensors(model, whole), *for_edge, *for_cloud], seed=0)
    for name, parameter in whole.whole_parameters().items():
        of_w = name.partition(".ffn1.")[0].partition(".ffn2.")[0].partition(".ffn3.")[0]
        if of_w != name:
            of_weight = trained[f"{of_w}.weight"]  # a fitted low rank brings a bias along
            parameter.requires_grad_(trained.get(f"{of_w}.{name.rpartition('.')[2]}", of_weight))
        elif name in trained:
            parameter.requires_grad_(parameter.requires_grad and trained[name])
    return OneMachine(whole).train()


def wrap(model: PreTrainedModel, optimizer: torch.optim.Optimizer, **options: Any) -> SFTOptimizer:
    """Split at block 2, rank 4, with a cloud in this process unless the options say otherwise."""
    values: Dict[str, Any] = {"split_layer": 2, "split_rank": 4, "seed": 11, **options}
    if values.get("transport") is None and values.get("server") is None:
        values["transport"] = in_process_cloud()
    return SFTOptimizer(optimizer, role="edge", model=model, **values)


def in_process_cloud() -> Transport:
    """The real cloud without a socket. Where its code does not run, the test needs SFT_TEST_CLOUD=HOST:PORT."""
    address = os.environ.get("SFT_TEST_CLOUD")
    if address:
        return GrpcTransport(address)
    if sys.version_info < (3, 10):
        pytest.skip("SFT_TEST_CLOUD is not set: it is the HOST:PORT of an `sft-cloud serve` on a newer Python")
    from support.cloud_in_process import CloudInProcess

    return CloudInProcess()


TWO_STACKS = "SFT_TEST_CLOUD" in os.environ
"""Edge and cloud round differently."""

EPS = 1e-3
"""Of Adam and its like: a gradient of nothing but rounding, as that of a key's bias, must not become a whole step."""


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, eps=EPS)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Shows the size of gradients, which Adam hides."""
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


def assert_same_training(
    script: Script,
    make_optimizer: Callable[[Any], torch.optim.Optimizer] = adamw,
    model: Optional[PreTrainedModel] = None,
    tolerance: float = 1e-6,
    calibration: Sequence[Dict[str, Tensor]] = (),
    residual: str = "none",
) -> None:
    """Runs a script on one machine and split; both must end with the same weights, and return the same."""
    model = model or tiny_model()
    reference = one_machine(model, Cut("sft", 2, 4, residual), calibration)
    before = {name: parameter.detach().clone() for name, parameter in reference.named_parameters()}
    expected = script(reference, make_optimizer(reference))
    with wrap(model, make_optimizer(model), residual=residual, calibration=calibration or None) as optimizer:
        got = script(model, optimizer)
        after = model.state_dict()
    weights = dict(reference.named_parameters())
    assert weights.keys() <= after.keys()
    for name, parameter in weights.items():
        torch.testing.assert_close(
            after[name], parameter.detach(), rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert any(not parameter.equal(before[name]) for name, parameter in weights.items()), "nothing was trained"
    if expected is not None:
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=tolerance)


class Wire(Transport):
    """Another transport, which keeps what passes, and can be made to fail."""

    def __init__(self, inner: Optional[Transport] = None) -> None:
        self.inner = inner or in_process_cloud()
        self.sent: List[pb.EdgeMessage] = []
        self.received: List[pb.CloudMessage] = []
        self.requests: List[pb.OpenSessionRequest] = []
        self.downloads = 0
        self.closed = False
        self.ended = threading.Event()
        """The edge has ended the stream in order."""
        self.lose: Callable[[pb.EdgeMessage], bool] = lambda message: False
        """The stream breaks before a message for which it holds."""

    def open_session(self, request: pb.OpenSessionRequest) -> pb.OpenSessionResponse:
        self.requests.append(request)
        return self.inner.open_session(request)

    def upload(self, sha256: str, total_bytes: int, chunks: Iterator[bytes]) -> None:
        self.inner.upload(sha256, total_bytes, chunks)

    def stream(self, messages: Iterator[bytes]) -> Stream:
        return _WireStream(self, messages)

    def download(self, session_id: str, optimizer_state: bool = False, offset: int = 0) -> Iterator[bytes]:
        self.downloads += 1
        return self.inner.download(session_id, optimizer_state, offset)

    def renew(self) -> None:
        self.inner.renew()

    def close(self) -> None:
        self.closed = True
        self.inner.close()


class _WireStream(Stream):
    def __init__(self, wire: Wire, messages: Iterator[bytes]) -> None:
        self._wire = wire
        self._inner = wire.inner.stream(self._watched(messages))

    def __next__(self) -> bytes:
        data = next(self._inner)
        self._wire.received.append(pb.CloudMessage.FromString(data))
        return data

    def cancel(self) -> None:
        self._inner.cancel()

    def _watched(self, messages: Iterator[bytes]) -> Iterator[bytes]:
        for data in messages:
            message = pb.EdgeMessage.FromString(data)
            if self._wire.lose(message):
                self._inner.cancel()
                return
            if message.HasField("close"):
                self._wire.ended.set()
            else:
                self._wire.sent.append(message)
            yield data
