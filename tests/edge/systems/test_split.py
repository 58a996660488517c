"""The edge's half, with a scripted cloud: its gradient is the activation, its loss the number of the step."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import Iterator, List

import pytest
import torch
from support.scripted_cloud import ScriptedCloud, serving
from support.tiny import tiny_batch

from sft.batch import Batch
from sft.errors import CloudMemoryError, ProtocolError
from sft.models import Cut, build_net_2, build_whole
from sft.models.weights import fill
from sft.optim.spec import OptimizerSpec, decay_groups
from sft.tensors.stream import in_memory, safetensors_chunks
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.elements import codecs_named, decode_tensor, encode_tensor
from sft.wire.codec.messages import decode_activation
from sft.wire.ledger import framed_size
from sft.wire.protocol import PROTOCOL_VERSION
from sft_edge.link.grpc_transport import GrpcTransport
from sft_edge.model_files.source import Source
from sft_edge.systems.halves import halve
from sft_edge.systems.split import SplitSystem, open_split_system
from sft_edge.training.ahead import StepsAhead

CPU = torch.device("cpu")
HEAD = "sequence-classification"
ROW_BYTES = {"float32": 16, "bfloat16": 8, "float16": 8, "int8": 1 + 4, "int4": 1 + 2}


class Rig:
    """A split system and the cloud it talks to."""

    def __init__(self, system: SplitSystem, cloud: ScriptedCloud, told: List[str]) -> None:
        self.system, self.cloud, self.told = system, cloud, told

    def messages(self, body: str) -> List[pb.EdgeMessage]:
        return [message for message in self.cloud.received if message.WhichOneof("body") == body]


@contextmanager
def split(
    source: Source,
    mode: str = "sft",
    codec: str = "float32",
    labels: str = "cloud",
    freeze_edge: bool = False,
    keep_key: bytes = b"",
    keeps: bool = False,
    **arguments: object,
) -> Iterator[Rig]:
    cut = Cut(mode, 2, 4 if mode == "sft" else 0)
    cloud = ScriptedCloud()
    cloud.change_answer = _with_norm
    cloud.keeps = keeps
    told: List[str] = []
    spec = OptimizerSpec("SGD", decay_groups(build_whole(source.config, HEAD, cut), {"lr": 0.1, **arguments}))
    with serving(cloud) as address:
        start = halve(source, HEAD, cut, spec, 11, codecs_named("float32", codec), freeze_edge=freeze_edge)
        start.request.keep_key = keep_key
        system = open_split_system(start, CPU, GrpcTransport(address), on_status=told.append, labels=labels)
        with system.link:
            yield Rig(system, cloud, told)


def _with_norm(answer: pb.CloudMessage) -> pb.CloudMessage:
    if answer.HasField("result"):
        answer.result.squared_gradient_norm = 9.0
    elif answer.HasField("evaluation"):
        count = answer.micro_batch + 1
        answer.evaluation.logits.CopyFrom(encode_tensor(torch.full((count, 2), float(count))))
    return answer


def test_the_request_says_all_that_the_cloud_must_know(source: Source) -> None:
    with split(source, weight_decay=0.01, momentum=0.9) as rig:
        (request,) = rig.cloud.requests
    assert request.protocol_version == PROTOCOL_VERSION
    assert request.model_name == "", "of a directory nothing is told"
    assert json.loads(request.config_json)["num_hidden_layers"] == 3
    assert json.loads(request.config_json)["problem_type"] == "single_label_classification"
    assert (request.cut.mode, request.cut.split_layer, request.cut.split_rank) == (pb.MODE_SFT, 2, 4)
    assert request.seed == 11
    assert len(request.weights_sha256) == len(request.factors_sha256) == 64
    assert request.optimizer.name == "SGD"
    decayed, undecayed = request.optimizer.groups
    assert decayed.arguments["weight_decay"].number == 0.01
    assert undecayed.arguments["weight_decay"].number == 0.0
    assert undecayed.arguments["momentum"].number == 0.9
    names = [*decayed.parameter_names, *undecayed.parameter_names]
    assert "classifier.weight" in decayed.parameter_names
    assert "bert.encoder.layer.1.output.dense.ffn3.bias" in undecayed.parameter_names
    assert not [name for name in names if "embeddings" in name or ".0." in name or "ffn1" in name]


def test_plain_split_learning_ships_no_factors(source: Source) -> None:
    with split(source, mode="sl") as rig:
        (request,) = rig.cloud.requests
        assert (request.cut.mode, request.cut.split_rank, request.factors_sha256) == (pb.MODE_SL, 0, "")
        rig.system.forward_backward(tiny_batch(4, 2), 0, 0, 1.0)
        (message,) = rig.messages("forward")
    assert list(message.forward.activation.packed.shape) == [6, 32]


def test_what_a_step_sends(source: Source) -> None:
    rows = tiny_batch(5, 2, 3)
    with split(source) as rig:
        system = rig.system
        loss = system.forward_backward(rows, 0, 0, 0.5)
        norm = system.gradient_norm()
        edge_norm = torch.stack([p.grad.norm() for p in system.net_1.parameters() if p.grad is not None]).norm()
        (message,) = rig.messages("forward")
        assert loss == 0.0
        assert norm == pytest.approx((float(edge_norm) ** 2 + 9.0) ** 0.5, rel=1e-6)
        assert list(message.forward.activation.lengths) == [5, 2, 3]
        assert message.forward.activation.padded_length == 5
        assert list(message.forward.activation.packed.shape) == [10, 4], "padding does not travel"
        assert list(message.forward.labels.classes.ids) == [0, 1, 0]
        assert message.forward.loss_scale == 0.5
        assert not message.HasField("commit")


def test_the_commit_rides_with_the_next_step(source: Source) -> None:
    with split(source) as rig:
        system = rig.system
        for step in range(2):
            assert system.forward_backward(tiny_batch(5, 2), step, 0, 1.0) == float(step)
            for index, group in enumerate(system.optimizer.param_groups):
                group["lr"] = 0.1 * (step + 1) + index  # what a scheduler sets holds on both sides
            system.update(step, 0.25)
        first, second = rig.messages("forward")
        assert not first.HasField("commit")
        assert (second.commit.step, second.commit.clip_scale) == (0, 0.25)
        assert list(second.commit.learning_rates) == [0.1, 1.1]
        assert not [message for message in rig.cloud.received if message.WhichOneof("body") is None]
        list(system.logits([tiny_batch(1)], 2))
        (alone,) = [message for message in rig.cloud.received if message.WhichOneof("body") is None]
        assert (alone.commit.step, list(alone.commit.learning_rates)) == (1, [0.2, 1.2])


def test_the_edge_steps_by_the_gradient_that_came_back(source: Source) -> None:
    """SGD by hand: the scripted gradient of the activation is the activation itself."""
    rows = tiny_batch(5, 2)
    with split(source) as rig:
        net = rig.system.net_1
        before = {name: x.detach().clone() for name, x in net.named_parameters()}
        rig.system.forward_backward(rows, 0, 0, 1.0)
        (message,) = rig.messages("forward")
        a_BSR, _ = decode_activation(message.forward.activation, 4, 128, CPU)
        gradients = {name: x.grad.clone() for name, x in net.named_parameters() if x.grad is not None}
        rig.system.update(0, 0.5)
        for name, x in net.named_parameters():
            expected = before[name] - 0.1 * 0.5 * gradients.get(name, torch.zeros(()))
            torch.testing.assert_close(x.detach(), expected, rtol=1e-6, atol=1e-9)
            assert x.grad is None
    # FFN-1 is linear, a = h u: its gradient by h'a holds the activation, and no padding.
    (u_name,) = [name for name in gradients if "ffn1" in name]
    assert gradients[u_name].abs().max() > 0
    assert a_BSR[1, 2:].abs().max() == 0


def test_evaluation_batches_come_back_in_order(source: Source) -> None:
    with split(source) as rig:
        batches = [tiny_batch(*range(2, 3 + index)) for index in range(5)]
        logits = list(rig.system.logits(batches, 0))
        assert [one.shape for one in logits] == [(index + 1, 2) for index in range(5)]
        assert [float(one[0, 0]) for one in logits] == [1.0, 2.0, 3.0, 4.0, 5.0]
        evaluations = rig.messages("evaluate")
        assert [message.micro_batch for message in evaluations] == [0, 1, 2, 3, 4]
        assert len(rig.system.ledger) == 0
        assert rig.system.ledger.evaluation_samples == 15
        assert rig.system.ledger.evaluation.payload_bytes_received == 15 * 2 * 4


@pytest.mark.parametrize(("asked", "keeps"), [(False, False), (False, True), (True, False), (True, True)])
def test_rows_are_kept_where_both_sides_mean_it(source: Source, asked: bool, keeps: bool) -> None:
    with split(source, freeze_edge=True, keep_key=b"k" * 32 if asked else b"", keeps=keeps) as rig:
        for step in range(2):
            rig.system.forward_backward(tiny_batch(5, 3), step, 0, 1.0)
            rig.system.update(step, 1.0)
        list(rig.system.logits([tiny_batch(4, seed=1), tiny_batch(5, 3)], 2))
        activations = [message.forward.activation for message in rig.messages("forward")]
        activations += [message.evaluate.activation for message in rig.messages("evaluate")]
        (request,) = rig.cloud.requests
        assert len(request.keep_key) == (32 if asked else 0)
        if asked and keeps:
            assert [list(activation.keep) for activation in activations] == [[1, 2], [], [3], [4, 5]]
            assert [list(activation.kept) for activation in activations] == [[], [1, 2], [], []]
            assert [len(activation.packed.data) for activation in activations] == [8 * 16, 0, 4 * 16, 8 * 16]
            assert rig.system.ledger.traffic.payload_bytes_sent == 8 * 16
        else:
            assert not any(activation.keep or activation.kept for activation in activations)
            assert [len(activation.packed.data) for activation in activations] == [8 * 16, 8 * 16, 4 * 16, 8 * 16]
        assert any("keeps no activations" in line for line in rig.told) is (asked and not keeps)
        assert not rig.system.keeps_activations


@pytest.mark.parametrize("times", [1, 2])
def test_an_evaluation_that_counts_on_rows_that_are_not_held(source: Source, times: int) -> None:
    """Comes once more, with its rows; what could never be done is not asked for ever."""

    def skips(answer: pb.CloudMessage) -> pb.CloudMessage:
        if answer.HasField("evaluation") and len(skipped) < times:
            skipped.append(answer.number)
            answer.step_skipped.reason = "it was not kept"
            answer.keeps_only = 0
        return _with_norm(answer)

    skipped: List[int] = []
    with split(source, freeze_edge=True, keep_key=b"k" * 32, keeps=True) as rig:
        list(rig.system.logits([tiny_batch(5)], 0))
        rig.cloud.change_answer = skips
        if times == 2:
            with pytest.raises(CloudMemoryError, match="it was not kept"):
                list(rig.system.logits([tiny_batch(5)], 0))
            return
        (logits,) = rig.system.logits([tiny_batch(5)], 0)
        assert logits.shape == (1, 2)
        sent = [message.evaluate.activation for message in rig.messages("evaluate")]
        assert [len(activation.packed.data) for activation in sent] == [5 * 16, 0, 5 * 16]
        assert not sent[2].keep


@pytest.mark.parametrize("ahead", [False, True])
def test_what_crossed_in_a_step_that_was_undone_is_counted(source: Source, ahead: bool) -> None:
    """The cloud keeps the rows all the same: begun anew, the step carries none."""

    def skips(answer: pb.CloudMessage) -> pb.CloudMessage:
        if answer.number in ((1, 2) if ahead else (1, 3)):
            answer.step_skipped.reason = "no memory"
        return _with_norm(answer)

    rows = [tiny_batch(5, 3), tiny_batch(4)]
    with split(source, freeze_edge=True, keep_key=b"k" * 32, keeps=True) as rig:
        rig.cloud.change_answer = skips
        system, ledger = rig.system, rig.system.ledger
        if ahead:
            steps = StepsAhead(system, 1.0)
            for step in range(2):
                steps.send(step, [rows[step]], [0.1])
            assert [steps.settle().losses for step in range(2)] == [[0.0], [1.0]]
        else:
            for step in range(2):
                with pytest.raises(CloudMemoryError):
                    system.forward_backward(rows[step], step, 0, 1.0)
                system.undo()
                system.forward_backward(rows[step], step, 0, 1.0)
                system.update(step, 1.0)
        assert [record.step for record in ledger] == [0, 1]
        assert ledger.traffic.payload_bytes_sent == 12 * 16
        sent = rig.messages("forward")
        assert len(sent) == 4
        assert ledger.traffic.bytes_sent == sum(framed_size(message.ByteSize()) for message in sent)


def test_evaluation_is_not_asked_far_ahead(source: Source) -> None:
    """What waits in memory for the cloud is a few batches, not the data set."""
    made: List[int] = []

    def batches() -> Iterator[Batch]:
        for index in range(8):
            made.append(index)
            yield tiny_batch(*range(2, 3 + index))

    with split(source) as rig:
        logits = rig.system.logits(batches(), 0)
        next(logits)
        assert len(made) <= 4
        assert len(list(logits)) == 7


@pytest.mark.parametrize(("codec", "size"), ROW_BYTES.items())
def test_the_ledger_counts_what_travelled(source: Source, codec: str, size: int) -> None:
    with split(source, codec=codec) as rig:
        rig.system.forward_backward(tiny_batch(5, 2, 3), 0, 0, 0.5)
        rig.system.forward_backward(tiny_batch(4, 4), 0, 1, 0.5)
        rig.system.update(0, 1.0)
        (record,) = rig.system.ledger
        sent = rig.messages("forward")
        assert record.samples == 5
        assert record.traffic.payload_bytes_sent == record.traffic.payload_bytes_received == (10 + 8) * size
        assert record.traffic.bytes_sent == sum(framed_size(message.ByteSize()) for message in sent)
        assert record.plain_bytes == 2 * (3 * 5 + 2 * 4) * 32 * 4
        assert record.cloud == 0.5, "a quarter of a second each, the cloud says"
        assert record.uplink_wait == 0.0
        packed = sent[0].forward.activation.packed
        assert len(packed.data) == 10 * size
        assert decode_tensor(packed, CPU).dtype == torch.float32


def test_every_byte_is_in_the_ledger(source: Source) -> None:
    """Of training or of evaluation; a commit that had nothing to ride on counts for the evaluation that sent it."""
    with split(source) as rig:
        for step in range(2):
            rig.system.forward_backward(tiny_batch(5, 2), step, 0, 1.0)
            rig.system.update(step, 1.0)
        list(rig.system.logits([tiny_batch(3), tiny_batch(2, 2)], 2))
        attached, *messages = rig.cloud.received
        assert attached.HasField("attach")
        ledger = rig.system.ledger
        sent = sum(framed_size(message.ByteSize()) for message in messages)
        assert ledger.traffic.bytes_sent + ledger.evaluation.bytes_sent == sent
        total = ledger.traffic + ledger.evaluation
        assert total.payload_bytes_sent == rig.system.link.total.payload_bytes_sent == (7 + 7 + 3 + 4) * 4 * 4


def test_the_shards_are_both_halves(source: Source) -> None:
    with split(source) as rig:
        with pytest.raises(ProtocolError, match="the file that the cloud sends begins with a header of"):
            b"".join(rig.system.shards()[1].chunks)
        net_2 = build_net_2(source.config, HEAD, Cut("sft", 2, 4))
        fill(net_2, [], 0)
        rig.cloud.weights = list(safetensors_chunks(in_memory(dict(net_2.whole_parameters()))))
        here, there = rig.system.shards()
        assert b"".join(there.chunks) == b"".join(rig.cloud.weights)
        whole = build_whole(source.config, HEAD, Cut("sft", 2, 4))
        assert sorted(here.names + there.names) == sorted(whole.whole_names.values())
        assert "bert.encoder.layer.1.output.dense.ffn1.weight" in here.names
        assert "bert.encoder.layer.1.output.dense.ffn2.weight" in there.names


def test_the_edge_holds_nothing_of_the_cloud_s_half(source: Source) -> None:
    with split(source) as rig:
        names = set(rig.system.net_1.whole_names.values())
        assert all("embeddings" in name or ".layer.0." in name or ".layer.1." in name for name in names)
        assert not [name for name in names if "output.LayerNorm" in name and ".layer.1.output" in name]
        optimized = {id(p) for group in rig.system.optimizer.param_groups for p in group["params"]}
        assert optimized == {id(p) for p in rig.system.net_1.parameters()}
        assert not any(p.is_meta for p in rig.system.net_1.parameters())


def test_no_pretrained_weights_nothing_but_factors_to_offer(source: Source) -> None:
    shape = Source("", source.config, None, source.tokenizer)
    with split(shape) as rig:
        (request,) = rig.cloud.requests
        assert (request.model_name, request.weights_sha256) == ("", "")
        assert request.factors_sha256


def test_labels_that_stay_are_in_no_message(source: Source) -> None:
    """The scripted cloud answers with the activation, which is no row of logits a sequence."""
    with split(source, labels="local") as rig:
        with pytest.raises(ProtocolError, match=r"of shape \[7, 4\] came; it has to be \[2, 2\]"):
            rig.system.forward_backward(tiny_batch(5, 2), 0, 0, 1.0)
        (message,) = rig.messages("forward")
        assert not message.forward.HasField("labels")
        assert not rig.messages("backward")


def test_a_frozen_edge_has_nothing_to_step(source: Source) -> None:
    with split(source, freeze_edge=True) as rig:
        system = rig.system
        before = {name: x.detach().clone() for name, x in system.net_1.named_parameters()}
        assert [len(group["params"]) for group in system.optimizer.param_groups] == [0, 0]
        for step in range(2):
            system.forward_backward(tiny_batch(5, 2), step, 0, 1.0)
            assert system.gradient_norm() == 3.0, "the cloud's alone"
            system.update(step, 1.0)
        assert all(message.forward.frozen_edge for message in rig.messages("forward"))
        assert all(x.equal(before[name]) and x.grad is None for name, x in system.net_1.named_parameters())
