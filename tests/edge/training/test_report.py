"""What a run leaves behind."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from sft.errors import StorageError
from sft.wire.ledger import Ledger, StepRecord, Traffic
from sft_edge.files import storage_errors, write_json
from sft_edge.training import report
from sft_edge.training.report import TrainerState, all_results, peak_memory_bytes, print_report


def make_ledger(steps=4):
    ledger = Ledger()
    for step in range(steps):
        ledger.add(StepRecord(step, 32, Traffic(60_000, 60_000, 61_000, 60_500), 5_760_000, 0.25, 0.125, 0.5, 0.125))
    ledger.add_evaluation(Traffic(1000, 200, 1100, 300), samples=872)
    return ledger


def make_results(ledger, **changes):
    values = {"mode": "sft", "split_layer": 5, "split_rank": 8, **changes}
    return all_results(
        ledger=ledger,
        train_loss=0.5,
        train_runtime=8.0,
        evaluation={"eval_accuracy": 0.825, "eval_loss": 0.4},
        edge_peak_memory_bytes=10**9,
        **values,
    )


def test_all_results():
    assert make_results(make_ledger()) == {
        "mode": "sft",
        "split_layer": 5,
        "split_rank": 8,
        "train_steps": 4,
        "train_samples": 128,
        "train_loss": 0.5,
        "train_runtime": 8.0,
        "train_samples_per_second": 16.0,
        "train_steps_per_second": 0.5,
        "eval_accuracy": 0.825,
        "eval_loss": 0.4,
        "wire_payload_bytes_sent": 240_000,
        "wire_payload_bytes_received": 240_000,
        "wire_bytes_sent": 244_000,
        "wire_bytes_received": 242_000,
        "wire_reduction": 48.0,
        "eval_wire_bytes_sent": 1100,
        "eval_wire_bytes_received": 300,
        "edge_forward_seconds": 1.0,
        "uplink_wait_seconds": 0.5,
        "cloud_seconds": 2.0,
        "edge_backward_seconds": 0.5,
        "edge_peak_memory_bytes": 10**9,
    }


def test_one_process_has_no_reduction():
    ledger = Ledger()
    ledger.add(StepRecord(0, samples=32, edge_forward=1.0, edge_backward=2.0))
    results = make_results(ledger, mode="local", split_layer=None, split_rank=None)
    assert (results["wire_bytes_sent"], results["wire_reduction"], results["split_layer"]) == (0, None, None)


def test_trainer_state_is_in_the_form_of_transformers(tmp_path):
    from transformers import TrainerState as Theirs

    state = TrainerState(max_steps=200, num_train_epochs=1.0, train_batch_size=32, logging_steps=50)
    state.global_step, state.epoch = 50, 0.25
    assert state.log({"loss": 0.5}) == {"loss": 0.5, "epoch": 0.25, "step": 50}
    state.record_metric(0.75)
    state.global_step, state.epoch = 100, 0.5
    state.log({"eval_accuracy": 0.5})
    state.record_metric(0.5)
    write_json(tmp_path / "trainer_state.json", state)
    theirs = Theirs.load_from_json(str(tmp_path / "trainer_state.json"))
    assert (theirs.global_step, theirs.max_steps, theirs.epoch) == (100, 200, 0.5)
    assert theirs.log_history == [
        {"loss": 0.5, "epoch": 0.25, "step": 50},
        {"eval_accuracy": 0.5, "epoch": 0.5, "step": 100},
    ]
    assert theirs.best_metric == 0.75


def test_json_takes_what_numpy_and_torch_compute_with(tmp_path):
    path = tmp_path / "new" / "a.json"
    content = {"a": np.float32(0.5), "b": np.int64(3), "c": torch.tensor(0.25), "d": float("nan"), "e": -float("inf")}
    write_json(path, {**content, "f": (1, True, None, path)})
    expected = {"a": 0.5, "b": 3, "c": 0.25, "d": None, "e": None, "f": [1, True, None, str(path)]}
    assert json.loads(path.read_text()) == expected
    assert '"b": 3,' in path.read_text()


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": list(range(1000))})
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]


LIMITED = """
import resource, signal, sys
from pathlib import Path
from sft.errors import StorageError
from sft_edge.files import write_json
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_json(Path(sys.argv[1]), {"a": "x" * 100_000})
except StorageError as error:
    print(error)
"""


def test_a_disk_that_takes_no_more_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == (f"cannot write {path}: File too large; free some space or choose another --output-dir\n"), (
        done.stderr
    )
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_path_that_cannot_be_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*file/a\.json: (Not a directory|File exists)"):
        write_json(tmp_path / "file" / "a.json", {})


def test_storage_errors_pass_other_errors_on(tmp_path):
    with pytest.raises(ValueError, match="mine"), storage_errors(tmp_path):
        raise ValueError("mine")


# Without its room, whose door loads torch.
REPORT = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("report", {report.__file__!r})
sys.modules["report"] = report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)
"""
PEAK = """
block = bytearray(300_000_000)
block[::4096] = b"x" * len(block[::4096])
del block
print(report.peak_memory_bytes(device_bytes=int(sys.argv[1])))
"""


def measured(code, *argv):
    done = subprocess.run(
        [sys.executable, "-c", REPORT + code, *argv], stdout=subprocess.PIPE, text=True, timeout=60, check=True
    )
    return int(done.stdout)


def test_peak_memory_is_this_process_at_its_largest():
    small = measured("print(report.peak_memory_bytes())")
    assert 290_000_000 < measured(PEAK, "0") - small < 330_000_000
    # Not of the larger process that started it: this one has torch loaded.
    assert small < peak_memory_bytes() / 2


def test_device_memory_is_added():
    assert 10**12 < peak_memory_bytes(10**12) < 10**12 + 10**11


def test_the_table_is_plain_where_no_terminal_is():
    stream, ledger = io.StringIO(), make_ledger()
    print_report(ledger, make_results(ledger), stream)
    lines = [" ".join(line.split()) for line in stream.getvalue().splitlines()]
    assert "\x1b" not in stream.getvalue()
    assert "phase total share mean/step p50 p95" in lines
    assert "cloud 2s 50.0% 500.0 ms 500.0 ms 500.0 ms" in lines
    assert "edge forward 1s 25.0% 250.0 ms 250.0 ms 250.0 ms" in lines
    assert "training, sent 240 kB 4 kB 244 kB 61 kB" in lines
    assert "training, received 240 kB 2 kB 242 kB 60.5 kB" in lines
    assert "evaluation, sent 1 kB 100 B 1.1 kB" in lines
    assert "payload is 1/48.0 of plain split learning's (23 MB for the same batches, padded, in float32)" in lines
    assert lines[-2:] == ["eval_accuracy 0.8250", "eval_loss 0.4000"]


def test_the_table_of_one_process_has_no_wire():
    stream, ledger = io.StringIO(), Ledger()
    ledger.add(StepRecord(0, samples=32, edge_forward=1.0, edge_backward=2.0))
    print_report(ledger, make_results(ledger, mode="local"), stream)
    text = stream.getvalue()
    assert "edge backward" in text
    assert not any(word in text for word in ("uplink", "cloud", "payload", "evaluation,"))
