"""What is counted, and what a scrape shows of it."""

import pytest
import torch
from prometheus_client import Counter, generate_latest

from sft.errors import ServerFullError
from sft.v1 import split_training_pb2 as pb
from sft_cloud.errors import NoMemoryError
from sft_cloud.memory import Kind, MemoryBudget, MemoryShare
from sft_cloud.observability.metrics import REFUSALS, Metrics, refusal_of
from sft_cloud.observability.prometheus import PrometheusMetrics

CPU = torch.device("cpu")
SIZES = 1000, 500
"""Of a message and its answer."""


@pytest.fixture
def metrics():
    return PrometheusMetrics(CPU)


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(f"sft_cloud_{name}", labels)


def forward(step=0):
    return pb.EdgeMessage(step=step, forward=pb.Forward(activation=pb.Activation(padded_length=3)))


def test_answers_are_counted_for_each_tenant(metrics):
    message, answer = forward(), pb.CloudMessage(result=pb.Result(loss=0.5))
    metrics.answered("anna", message, answer, SIZES)
    metrics.answered("anna", pb.EdgeMessage(step=0, commit=pb.Commit()), pb.CloudMessage(), SIZES, steps=1)
    metrics.answered("ben", message, answer, SIZES)
    assert value(metrics, "messages_total", tenant="anna", kind="forward") == 1
    assert value(metrics, "messages_total", tenant="anna", kind="commit") == 1
    assert value(metrics, "steps_total", tenant="anna") == 1
    assert value(metrics, "steps_total", tenant="ben") == 0
    assert value(metrics, "received_bytes_total", tenant="ben") == SIZES[0]
    assert value(metrics, "sent_bytes_total", tenant="ben") == SIZES[1]


def test_what_is_answered_from_memory_was_done_once(metrics):
    saved = pb.CloudMessage(checkpoint_saved=pb.CheckpointSaved(total_bytes=100))
    message = pb.EdgeMessage(save_checkpoint=pb.SaveCheckpoint())
    metrics.answered("anna", message, saved, SIZES)
    metrics.answered("anna", message, saved, SIZES, repeated=True)
    assert value(metrics, "checkpoints_total", tenant="anna") == 1
    assert value(metrics, "checkpoint_bytes_total", tenant="anna") == 100
    assert value(metrics, "repeated_messages_total", tenant="anna") == 1
    assert value(metrics, "received_bytes_total", tenant="anna") == 2 * SIZES[0]


def test_a_checkpoint_that_failed_is_none(metrics):
    failed = pb.CloudMessage(checkpoint_saved=pb.CheckpointSaved(error="no space left on the cloud's disk"))
    metrics.answered("anna", pb.EdgeMessage(save_checkpoint=pb.SaveCheckpoint()), failed, SIZES)
    assert value(metrics, "checkpoint_failures_total", tenant="anna") == 1
    assert value(metrics, "checkpoints_total", tenant="anna") is None


def test_a_step_that_was_skipped_is_no_step(metrics):
    metrics.answered("anna", forward(), pb.CloudMessage(step_skipped=pb.StepSkipped(reason="no memory")), SIZES)
    assert value(metrics, "steps_skipped_total", tenant="anna") == 1
    assert value(metrics, "steps_total", tenant="anna") == 0


def test_sessions_blobs_and_refusals(metrics):
    metrics.opened("anna", resumed=False)
    metrics.opened("anna", resumed=True)
    metrics.attached("anna", again=False)
    metrics.attached("anna", again=True)
    metrics.closed("anna")
    metrics.uploaded("anna", 1000)
    metrics.downloaded("anna", 2000)
    metrics.refused("anna", "OpenSession", "RESOURCE_EXHAUSTED", "ServerFullError")
    assert value(metrics, "sessions_opened_total", tenant="anna") == 2
    assert value(metrics, "sessions_resumed_total", tenant="anna") == 1
    assert value(metrics, "sessions_closed_total", tenant="anna") == 1
    assert value(metrics, "reconnects_total", tenant="anna") == 1
    assert value(metrics, "uploads_total", tenant="anna") == 1
    assert value(metrics, "upload_bytes_total", tenant="anna") == 1000
    assert value(metrics, "downloads_total", tenant="anna") == 1
    assert value(metrics, "download_bytes_total", tenant="anna") == 2000
    labels = {"method": "OpenSession", "code": "RESOURCE_EXHAUSTED", "reason": "ServerFullError"}
    assert value(metrics, "rejects_total", tenant="anna", **labels) == 1


def test_waiting_and_working_have_their_own_distributions(metrics):
    metrics.worked("anna", waited_seconds=0.02, worked_seconds=2.0)
    assert value(metrics, "queue_wait_seconds_bucket", tenant="anna", le="0.01") == 0
    assert value(metrics, "queue_wait_seconds_bucket", tenant="anna", le="0.03") == 1
    assert value(metrics, "work_seconds_bucket", tenant="anna", le="1.0") == 0
    assert value(metrics, "work_seconds_sum", tenant="anna") == 2.0


def test_sessions_are_read_when_somebody_looks(metrics):
    sessions = [("anna", True), ("anna", False)]
    metrics.watch_sessions(lambda: sessions, 16)
    assert value(metrics, "sessions", tenant="anna") == 2
    assert value(metrics, "streams", tenant="anna") == 1
    assert value(metrics, "sessions_limit") == 16
    sessions.clear()
    assert value(metrics, "sessions", tenant="anna") is None  # who is not known, and has none


def test_sessions_of_who_has_none_are_0_not_absent(metrics):
    sessions = [("ben", True)]
    metrics.known("anna")
    metrics.watch_sessions(lambda: sessions, 16)
    assert value(metrics, "sessions", tenant="anna") == value(metrics, "streams", tenant="anna") == 0
    assert value(metrics, "sessions", tenant="ben") == 1


def test_a_scrape_shows_whoever_got_a_token_since(metrics):
    names = ["anna"]
    metrics.watch_tenants(lambda: names)
    assert value(metrics, "checkpoint_failures_total", tenant="anna") == 0
    names.append("ben")
    text = generate_latest(metrics.registry).decode()
    assert 'sft_cloud_steps_skipped_total{tenant="ben"} 0.0' in text


def test_every_counter_of_a_tenant_is_there_before_it_counts(metrics):
    metrics.known("anna")
    before = {sample.name for family in metrics.registry.collect() for sample in family.samples}
    counters = {name for name in before if name.endswith("_total") and name.startswith("sft_cloud_")}
    assert len(counters) == sum(isinstance(value, Counter) for value in vars(metrics).values())
    internal = {"method": "OpenSession", "code": "INTERNAL", "reason": "INTERNAL"}
    assert value(metrics, "rejects_total", tenant="anna", **internal) == 0


def test_why_sessions_are_refused(metrics):
    for code, reason in (
        ("RESOURCE_EXHAUSTED", "NoMemoryError"),
        ("RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED"),
        ("RESOURCE_EXHAUSTED", "ServerFullError"),
        ("PERMISSION_DENIED", "AccessError"),
        ("INVALID_ARGUMENT", "CutError"),
        ("INTERNAL", "INTERNAL"),
    ):
        metrics.refused("anna", "OpenSession", code, reason)
    metrics.refused("anna", "Train", "RESOURCE_EXHAUSTED", "NoMemoryError")
    refused = {reason: value(metrics, "sessions_refused_total", tenant="anna", reason=reason) for reason in REFUSALS}
    assert {reason for reason, count in refused.items() if count} == {
        "memory",
        "places",
        "limits",
        "request",
        "internal",
    }
    assert refused["memory"] == 2


@pytest.mark.parametrize("error", ServerFullError.__subclasses__())
def test_every_way_of_being_full_has_a_reason_of_its_own(error):
    assert refusal_of(error.__name__) != "request"


def test_servers_of_one_process_count_for_themselves(metrics):
    other = PrometheusMetrics(CPU)
    metrics.uploaded("anna", 1)
    assert value(other, "uploads_total", tenant="anna") is None


def test_the_one_that_does_nothing_is_told_the_same():
    told = [name for name in vars(Metrics) if not name.startswith("_")]
    assert told
    for name in told:
        assert name in vars(PrometheusMetrics)


def test_connections_are_counted_from_the_start(metrics):
    counts = [3, 0]
    metrics.watch_connections(lambda: counts[0], lambda: counts[1])
    assert [value(metrics, name) for name in ("connections", "strangers_ended_total")] == [3, 0]
    counts[1] = 2
    assert value(metrics, "strangers_ended_total") == 2


def test_memory_is_told_by_kind_from_the_start(metrics):
    memory = MemoryBudget(1000, process_bytes=300)
    metrics.watch_memory(memory)
    assert value(metrics, "memory_limit_bytes", of="process") == 1300
    assert value(metrics, "memory_held_bytes", kind="process") == 300
    for kind in ("sessions", "answers", "messages", "downloads", "builds"):
        assert value(metrics, "memory_held_bytes", kind=kind) == 0
        assert value(metrics, "memory_refusals_total", kind=kind) == 0
    MemoryShare(memory, 600)
    with pytest.raises(NoMemoryError):
        memory.charge(Kind.MESSAGES, 500)
    assert value(metrics, "memory_held_bytes", kind="sessions") == 600
    assert value(metrics, "memory_refusals_total", kind="messages") == 1


def test_a_device_has_a_limit_of_its_own(metrics):
    metrics.watch_memory(MemoryBudget(1000, host=MemoryBudget(200, process_bytes=300)))
    assert value(metrics, "memory_limit_bytes", of="device") == 1000
    assert value(metrics, "memory_limit_bytes", of="process") == 500
    assert value(metrics, "memory_held_bytes", kind="process") == 300
