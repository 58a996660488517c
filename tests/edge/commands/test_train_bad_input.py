"""What can be wrong before a run begins, each told in one line and by its exit code, and nothing written."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
from pathlib import Path
from typing import Callable, Dict, Iterator

import grpc
import pytest
from safetensors.torch import load_file, save_file
from support.jobs import Job, error_line, sst2
from support.scripted_cloud import ScriptedCloud, serving
from support.tiny import make_tiny_model, tiny_config

from sft_edge.cli import main

Options = Dict[str, object]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", layers=3)


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(str(original), str(tmp_path / "model"))
    return tmp_path / "model"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return sst2(tmp_path / "data", train_rows=8, eval_rows=4)


@pytest.fixture
def refused(job: Job, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`refused(code, option=value)` runs `sft-edge train`, which must end with that code; gives the error's line."""

    def run(code: int, **options: object) -> str:
        # A port that nobody can have: whatever needs the cloud fails in another way.
        values = {"model": model, "output_dir": tmp_path / "out", "server": "127.0.0.1:1", **options}
        assert main(["train", *job.flags(**values)]) == code
        assert not (tmp_path / "out").exists()
        return error_line(capsys.readouterr().err)

    return run


# The model.


def test_no_such_directory(refused: Callable[..., str], tmp_path: Path) -> None:
    assert refused(4, model=tmp_path / "nowhere").endswith("nowhere': no such directory")


def test_no_such_model_on_the_hub(refused: Callable[..., str]) -> None:
    assert "model 'nobody/nothing': no such directory, and the hub does not give it" in refused(
        4, model="nobody/nothing"
    )


def test_a_torn_checkpoint(refused: Callable[..., str], model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert re.search(r"model\.safetensors: not a whole safetensors file", refused(4))


def test_a_checkpoint_without_one_of_its_tensors(refused: Callable[..., str], model: Path) -> None:
    tensors = load_file(str(model / "model.safetensors"))
    del tensors["encoder.layer.0.attention.self.query.weight"]
    save_file(tensors, str(model / "model.safetensors"))
    assert "query.weight' is missing; the checkpoint is incomplete" in refused(4)


def test_a_checkpoint_of_another_shape(refused: Callable[..., str], model: Path) -> None:
    path = model / "config.json"
    path.write_text(path.read_text().replace('"intermediate_size": 64', '"intermediate_size": 48'))
    assert re.search(r"has shape \[32, 64\], config\.json says \[32, 48\]", refused(4))


def test_a_sharded_checkpoint_without_a_shard(refused: Callable[..., str], tmp_path: Path) -> None:
    sharded = make_tiny_model(tmp_path / "sharded", max_shard_size="40KB")
    victim = sorted(sharded.glob("model-*.safetensors"))[1]
    victim.unlink()
    assert refused(4, model=sharded) == f"{victim}: this part of the checkpoint is missing"


def test_a_pickled_checkpoint(refused: Callable[..., str], model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "pickled checkpoints are not read" in refused(4)


def test_no_weights_at_all(refused: Callable[..., str], model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "holds neither model.safetensors nor" in refused(4)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, r"config\.json: no such file"),
        ("{", r"config\.json: not a model's configuration"),
        ('{"model_type": "nonsense"}', r"config\.json: 'nonsense' is no model of transformers"),
        ('{"model_type": "t5"}', "models of type 't5' cannot be cut; supported types: bert, "),
        ("[]", r"config\.json: not a model's configuration"),
        ('{"model_type": "bert", "num_hidden_layers": "six"}', r"config\.json: not a model's configuration"),
        ('{"model_type": "bert", "vocab_size": null}', r"config\.json: not a model's configuration"),
        ('{"model_type": "bert", "hidden_size": 10, "num_attention_heads": 3}', r"config\.json: not a model's"),
        ('{"model_type": "bert", "hidden_act": "nonsense"}', r"config\.json: not a model's configuration"),
    ],
)
def test_configurations(refused: Callable[..., str], model: Path, content: object, says: str) -> None:
    (model / "config.json").unlink()
    if content is not None:
        (model / "config.json").write_text(str(content))
    assert re.search(says, refused(4))


def test_no_tokenizer(refused: Callable[..., str], model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    assert "no tokenizer can be read from here" in refused(4)


def test_a_tokenizer_larger_than_the_vocabulary(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(tiny_config(vocab_size=50).to_json_string())
    said = refused(2, model=None, from_config=tmp_path / "config.json", tokenizer_name=tmp_path / "model")
    assert re.match(r"the tokenizer has token 'worst' with number \d+, the model knows numbers up to 49: give", said)


def test_sequences_longer_than_the_model_takes(refused: Callable[..., str]) -> None:
    assert refused(2, max_seq_length=129) == "--max-seq-length 129 is more than this model's 128 positions"


# The cut.


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"split_layer": 4}, "split_layer is 4, but this model has blocks 1 to 3"),
        ({"split_layer": 4, "mode": "sl"}, "split_layer is 4, but this model has blocks 1 to 3"),
        ({"split_layer": 0}, "--split-layer counts blocks from 1, not 0"),
        ({"split_layer": -1}, "--split-layer counts blocks from 1, not -1"),
        ({"split_rank": 0}, "--split-rank must be 1 or more, not 0"),
        ({"split_rank": 33}, "split_rank is 33, but this layer has ranks 1 to 32"),
        ({"split_layer": None}, "--split-layer must be given"),
        ({"residual": "full"}, "--residual full needs --mode local"),
        ({"residual": "some"}, "--residual"),
        ({"mode": "sl", "residual": "low-rank"}, "--residual low-rank needs --mode sft or local"),
        ({"mode": "local", "freeze_edge": True}, "--freeze-edge needs --mode sft, sl or frozen"),
        ({"labels": "nowhere"}, "--labels"),
    ],
    ids=str,
)
def test_layer_and_rank(refused: Callable[..., str], options: Options, says: str) -> None:
    assert says in refused(2, **options)


# The data.


def spoil(job: Job, line: int, text: str, name: str = "train") -> str:
    """Replaces a line of the file, counted from 1; gives FILE:LINE."""
    path = job.data_dir / "SST-2" / f"{name}.tsv"
    lines = path.read_text().splitlines()
    lines[line - 1] = text
    path.write_text("\n".join(lines) + "\n")
    return f"{path}:{line}"


@pytest.mark.parametrize("name", ["train", "dev"])
@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("a film without a label", "1 fields, but the table has 2 columns"),
        ("a\tfilm\t1", "3 fields, but the table has 2 columns"),
        ("a film\t2", "label '2' is not one of 0, 1"),
        ("a film\tgood", "label 'good' is not one of 0, 1"),
        (" \t1", "sentence is empty"),
    ],
)
def test_malformed_rows(refused: Callable[..., str], job: Job, name: str, row: str, says: str) -> None:
    place = spoil(job, 4, row, name)
    assert refused(3) == f"{place}: {says}"


def test_a_label_that_training_does_not_know(refused: Callable[..., str], tmp_path: Path) -> None:
    rows = [{"text": "a film", "label": label} for label in ("good", "bad", "good")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "dev.jsonl").write_text(json.dumps({"text": "a film", "label": "strange"}) + "\n")
    said = refused(3, task="text", data_dir=tmp_path)
    assert said == f"{tmp_path / 'dev.jsonl'}:1: label 'strange' is not one of bad, good"


def test_no_files(refused: Callable[..., str], job: Job) -> None:
    shutil.rmtree(str(job.data_dir / "SST-2"))
    assert re.search(r"SST-2/train\.tsv: no such file; --data-dir must be the folder that holds", refused(3))


# Flags that do not go together.


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"from_config": "config.json"}, "exactly one of --model and --from-config must be given"),
        ({"model": None}, "exactly one of --model and --from-config must be given"),
        ({"model": None, "from_config": "config.json"}, "--from-config needs --tokenizer-name"),
        ({"task": "sst3"}, "no task 'sst3'"),
        ({"data_dir": None}, "task sst2 reads files: pass --data-dir"),
        ({"problem_type": "regression"}, "task sst2 is single_label_classification: --problem-type is for task text"),
        ({"optim": "AdamZ"}, "torch.optim has no optimizer 'AdamZ'"),
        ({"optim": "LBFGS"}, "cannot train a split model: it evaluates the loss several times a step"),
        ({"optim": "SGD", "optim_args": "nesterov=true"}, "Nesterov momentum requires a momentum"),
        ({"learning_rate": "fast"}, "'fast' is not a number"),
        ({"mode": "sl", "factor_learning_rate": 1e-2}, "--factor-learning-rate needs --mode sft, or local with"),
        ({"max_steps": 0}, "--max-steps must be 1 or more"),
        ({"server": "localhost"}, "--server must be HOST:PORT"),
        ({"device": "cuda:99"}, "this machine has"),
    ],
    ids=str,
)
def test_flags(refused: Callable[..., str], options: Options, says: str) -> None:
    assert says in refused(2, **options)


def test_an_output_directory_in_use(job: Job, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("years of work")
    assert main(["train", *job.flags(model=model, output_dir=tmp_path / "used")]) == 2
    said = error_line(capsys.readouterr().err)
    assert "is not empty; name another, or add --overwrite-output-dir, or --resume-from-checkpoint" in said
    assert os.listdir(str(tmp_path / "used")) == ["thesis.txt"]


# The cloud.


def test_nobody_answers(refused: Callable[..., str]) -> None:
    with socket.socket() as bound:  # bound but not listening: nobody else can get the port meanwhile
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        assert f"nobody answers at {address} (Connection refused)" in refused(5, server=address)


@pytest.fixture
def somebody() -> Iterator[str]:
    """Address of a program that takes connections and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        import threading

        def hang_up() -> None:
            while True:
                try:
                    listener.accept()[0].close()
                except OSError:
                    return

        thread = threading.Thread(target=hang_up)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_server_that_is_not_ours(refused: Callable[..., str], somebody: str) -> None:
    said = refused(5, server=somebody, connect_timeout="1s")
    assert said == f"{somebody} answers, but it is not an sft-cloud server"


@pytest.mark.parametrize(
    ("status", "details", "says"),
    [
        (grpc.StatusCode.FAILED_PRECONDITION, "speaks version 2", "refuses: speaks version 2"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "all of its 16 sessions are in use", "has no room: all of its 16"),
        (grpc.StatusCode.UNIMPLEMENTED, "no such method", "is not an sft-cloud server"),
    ],
)
def test_a_server_that_refuses(refused: Callable[..., str], status: grpc.StatusCode, details: str, says: str) -> None:
    cloud = ScriptedCloud()
    cloud.open_error = (status, details)
    with serving(cloud) as address:
        said = refused(5, server=address)
    assert said.startswith(address)
    assert says in said


@pytest.mark.parametrize("part", ["sft_cloud", "grpc_health"])
def test_no_cloud_installed_here(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    monkeypatch.setitem(sys.modules, part, None)
    assert "pip install 'split-fine-tuning[cloud]'" in refused(2, server=None)
