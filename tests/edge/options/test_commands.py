"""The options of the edge's commands."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import List, get_args

import pytest

from sft.cli.durations import Duration
from sft.cli.options import parse
from sft.errors import CutError, UsageError
from sft.wire.codec.rows import NAMES
from sft_edge.cli import main
from sft_edge.options.commands import DoctorOptions, VerifyOptions
from sft_edge.options.cut import Codec, CutOptions
from sft_edge.options.link import LinkOptions
from sft_edge.options.lora import LoraOptions
from sft_edge.options.train import (
    ACTIVATIONS,
    TRAIN_OPTIONS,
    DataOptions,
    LoggingOptions,
    ModelOptions,
    TrainingOptions,
    check_output_dir,
    check_together,
)

FROZEN = """
--config
--model
--from-config
--model-name
--tokenizer-name
--max-seq-length 128
--mode sft
--split-layer
--split-rank 8
--residual none
--freeze-edge false
--activations
--wire-dtype
--codec
--gradient-codec
--task required
--data-dir
--problem-type
--max-train-samples
--max-eval-samples
--dataloader-num-workers 0
--output-dir
--overwrite-output-dir false
--per-device-train-batch-size 32
--per-device-eval-batch-size 32
--gradient-accumulation-steps 1
--num-train-epochs 3.0
--max-steps -1
--eval-strategy no
--eval-steps
--save-steps
--save-total-limit
--resume-from-checkpoint
--detach false
--seed 42
--device auto
--optim AdamW
--optim-args
--learning-rate 5e-05
--factor-learning-rate
--weight-decay 0.0
--adam-beta1 0.9
--adam-beta2 0.999
--adam-epsilon 1e-08
--max-grad-norm 1.0
--lr-scheduler-type linear
--lr-scheduler-kwargs {}
--warmup-steps 0
--warmup-ratio 0.0
--lora-r 0
--lora-alpha 8
--lora-dropout 0.0
--lora-target-modules
--use-rslora false
--lora-half both
--logging-steps 50
--report-to none
--logging-dir
--disable-tqdm false
--server
--tls
--tls-ca
--tls-cert
--tls-key
--token-file
--insecure false
--labels cloud
--wait 0s
--connect-timeout 20s
--reply-timeout 10m
--reconnect-timeout 30m
--reconnect-backoff 500ms
--reconnect-backoff-max 30s
--keepalive-time 20s
--keepalive-timeout 20s
--data-cap
--max-mbit
"""
"""What scripts rely on: a line changes only together with the changelog."""


def test_the_options_of_train_are_frozen(capsys):
    with pytest.raises(SystemExit):
        parse(TRAIN_OPTIONS, ["--help"], "sft-edge train")
    text = " " + " ".join(capsys.readouterr().out.split("message and exit", 1)[1].split())
    lines = []
    for part in re.split(r"(?= --[a-z0-9-]+ (?:\[|\{|N|X|SIZE|TEXT|TIME|PATH|JSON))", text)[1:]:
        flag = part.split()[0]
        note = re.search(r"\((?:default: (.*?)|(required))\)(?: |$)", part)
        lines.append(" ".join(filter(None, [flag, note and (note[1] or note[2])])))
    assert lines == FROZEN.split("\n")[1:-1]


def test_every_option_is_described():
    from sft.cli.options import options_of

    assert [option.flag for cls in TRAIN_OPTIONS for option in options_of(cls) if not option.doc] == []


def test_help_needs_neither_torch_nor_transformers():
    code = (
        "import sys; from sft.cli.options import parse; from sft_edge.options.train import TRAIN_OPTIONS\n"
        "try: parse(TRAIN_OPTIONS, ['--help'], 'sft-edge train')\n"
        "finally: assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_of_the_readme_is_understood(tmp_path):
    command = (
        "--model minilm --task sst2 --data-dir data --split-layer 5 --split-rank 8 --max-train-samples 6400 "
        f"--num-train-epochs 1 --per-device-train-batch-size 32 --learning-rate 5e-5 --seed 0 --output-dir {tmp_path}"
    )
    options = parse(TRAIN_OPTIONS, command.split(), "sft-edge train")
    assert options[:2] == (ModelOptions("minilm"), CutOptions("sft", 5, 8))
    assert (options[3].num_train_epochs, options[3].seed, options[4].learning_rate) == (1.0, 0, 5e-5)


@pytest.mark.parametrize("mode", ["sft", "sl", "frozen", "local"])
def test_every_mode_takes_the_same_flags(mode):
    assert CutOptions(mode, split_layer=5, split_rank=8).mode == mode


def test_a_frozen_edge_has_what_pays_unless_it_is_told_otherwise():
    short = CutOptions("frozen", 2)
    assert (short.freeze_edge, short.codec, short.activations) == (True, "int8", "keep-on-cloud")
    other = CutOptions("frozen", 2, activations="resend", codec="fitted")
    assert (other.freeze_edge, other.codec, other.activations) == (True, "fitted", "resend")
    for mode, codec in (("sft", "int8"), ("sl", None), ("local", None)):
        usual = CutOptions(mode, 2)
        assert (usual.freeze_edge, usual.codec, usual.activations) == (False, codec, "resend")


@pytest.mark.parametrize("mode", ["sft", "frozen"])
def test_what_is_said_of_the_type_on_the_wire_holds(mode):
    assert CutOptions(mode, 2, wire_dtype="float32").codec is None
    assert CutOptions(mode, 2, wire_dtype="float32", codec="int4").codec == "int4"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelOptions(), "exactly one of --model and --from-config"),
        (lambda: ModelOptions("minilm", from_config="config.json"), "exactly one of --model and --from-config"),
        (lambda: ModelOptions(from_config="config.json"), "--from-config needs --tokenizer-name"),
        (lambda: ModelOptions("minilm", max_seq_length=0), "--max-seq-length must be 1 or more, not 0"),
        (lambda: CutOptions(), "--split-layer must be given"),
        (lambda: CutOptions("sl"), "--split-layer must be given"),
        (lambda: CutOptions("local", residual="full"), "--split-layer must be given"),
        (lambda: CutOptions("local", residual="low-rank"), "--split-layer must be given"),
        (lambda: CutOptions("sft", 3, residual="full"), "--residual full needs --mode local: .* full width"),
        (lambda: CutOptions("sl", 3, residual="full"), "--residual full needs --mode local"),
        (lambda: CutOptions("sl", 3, residual="low-rank"), "--residual low-rank needs --mode sft or local"),
        (lambda: CutOptions("frozen", 3, residual="low-rank"), "--residual low-rank needs --mode sft or local"),
        (lambda: CutOptions("frozen"), "--split-layer must be given"),
        (lambda: CutOptions("frozen", 3, gradient_codec="int8"), "--gradient-codec says nothing with --freeze-edge"),
        (lambda: CutOptions("local", freeze_edge=True), "--freeze-edge needs --mode sft, sl or frozen"),
        (lambda: CutOptions("sft", 3, activations="keep-on-edge"), "--activations keep-on-edge needs --freeze-edge"),
        (lambda: CutOptions("sft", 3, activations="keep-on-cloud"), "--activations keep-on-cloud needs --freeze-edge"),
        *(
            (
                make,
                "--codec fitted needs --mode frozen, or sl with --freeze-edge: it is fitted to activations that stay",
            )
            for make in (
                lambda: CutOptions("sl", 3, codec="fitted"),
                lambda: CutOptions("sft", 3, codec="fitted", freeze_edge=True),
                lambda: VerifyOptions(mode="sl", codec="fitted"),
                lambda: VerifyOptions(codec="fitted", freeze_edge=True),
                lambda: DoctorOptions(codec="fitted"),
            )
        ),
        (
            lambda: CutOptions("local", codec="int8"),
            "--codec int8 needs --mode sft, sl or frozen: one process",
        ),
        (
            lambda: CutOptions("sft", 3, freeze_edge=True, gradient_codec="int8"),
            "--gradient-codec says nothing with --freeze-edge",
        ),
        (
            lambda: VerifyOptions(freeze_edge=True, gradient_codec="int8"),
            "--gradient-codec says nothing with --freeze-edge",
        ),
        (
            lambda: CutOptions("local", wire_dtype="bfloat16"),
            "--wire-dtype bfloat16 needs --mode sft, sl or frozen: one process",
        ),
        (lambda: DataOptions("sst2", max_train_samples=0), "--max-train-samples must be 1 or more"),
        (lambda: DataOptions("sst2", dataloader_num_workers=-1), "--dataloader-num-workers must be 0 or more"),
        (lambda: LoggingOptions(logging_steps=0), "--logging-steps must be 1 or more"),
        (lambda: LinkOptions(reply_timeout=Duration(0)), "--reply-timeout must be above 0"),
        (lambda: LinkOptions(keepalive_time=Duration("5s")), "--keepalive-time must be 10s or more, not 5s"),
        (lambda: LinkOptions("cloud.example"), "--server must be HOST:PORT"),
        (lambda: LinkOptions(token_file=Path("token")), "--token-file needs --server"),
        (lambda: LinkOptions("cloud:1", tls_key=Path("key")), "--tls-cert and --tls-key belong together"),
    ],
)
def test_what_makes_no_sense_is_named(make, message):
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize(
    ("link", "message"),
    [
        (
            LinkOptions("cloud.example:50051"),
            "--server cloud.example:50051 needs --mode sft, sl or frozen: one process has no",
        ),
        (LinkOptions(labels="local"), "--labels local needs --mode sft, sl or frozen: in one process"),
    ],
)
def test_what_one_process_has_no_use_for_is_named(link, message):
    with pytest.raises(UsageError, match=message):
        check_together(CutOptions("local"), link, TrainingOptions(), LoraOptions())
    check_together(CutOptions("sl", 3, wire_dtype="float16"), link, TrainingOptions(), LoraOptions())
    check_together(CutOptions("local"), LinkOptions(), TrainingOptions(), LoraOptions())


@pytest.mark.parametrize(
    ("cut", "named"),
    [(CutOptions("frozen", 2), "--mode frozen"), (CutOptions("sl", 2, freeze_edge=True), "--freeze-edge")],
)
@pytest.mark.parametrize("half", ["both", "edge"])
def test_adapters_of_a_half_that_is_not_trained(cut, named, half):
    with pytest.raises(UsageError, match=f"{named} trains nothing of the edge's half: add --lora-half cloud"):
        check_together(cut, LinkOptions(), TrainingOptions(), LoraOptions(lora_r=4, lora_half=half))
    check_together(cut, LinkOptions(), TrainingOptions(), LoraOptions(lora_r=4, lora_half="cloud"))


@pytest.mark.parametrize("flags", ["--labels local", "--server localhost:50051", "--wire-dtype float16"])
def test_the_command_has_no_use_for_it_either(capsys, flags):
    argv = f"train --mode local --model minilm --task sst2 {flags}"
    assert main(argv.split()) == 2
    assert f"error: {flags} needs --mode sft, sl or frozen: " in capsys.readouterr().err


@pytest.mark.parametrize(("layer", "rank", "flag"), [(0, 8, "--split-layer"), (3, 0, "--split-rank")])
def test_a_cut_outside_of_any_model_is_a_cut_error(layer, rank, flag):
    with pytest.raises(CutError, match=flag):
        CutOptions("sft", layer, rank)


def test_only_the_plain_local_mode_has_no_cut():
    assert not CutOptions("local").is_cut
    assert CutOptions("local", 3, residual="full").is_cut
    assert CutOptions("local", 3, residual="low-rank").is_cut
    assert CutOptions("sl", 3).is_cut
    assert CutOptions("frozen", 3).is_cut


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_device_train_batch_size": 0}, "--per-device-train-batch-size must be 1 or more"),
        ({"gradient_accumulation_steps": 0}, "--gradient-accumulation-steps must be 1 or more"),
        ({"num_train_epochs": 0.0}, "--num-train-epochs must be above 0"),
        ({"max_steps": 0}, "--max-steps must be 1 or more, or -1"),
        ({"max_steps": -2}, "--max-steps must be 1 or more, or -1"),
        ({"eval_steps": 10}, "--eval-steps needs --eval-strategy steps"),
        ({"eval_steps": 0, "eval_strategy": "steps"}, "--eval-steps must be 1 or more"),
        ({"save_steps": -1}, "--save-steps must be 0 or more"),
        ({"save_total_limit": 0}, "--save-total-limit must be 1 or more"),
        ({"seed": -1}, "--seed must be 0 or more"),
        ({"seed": 2**63}, "--seed must be 0 or more and below"),
        ({"device": "tpu"}, "--device must be auto, cpu, cuda or cuda:N, not 'tpu'"),
    ],
)
def test_a_run_that_makes_no_sense_is_named(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        TrainingOptions(tmp_path / "out", **changes)


def test_a_good_run_leaves_no_trace(tmp_path):
    options = TrainingOptions(tmp_path / "a" / "b", max_steps=3, eval_strategy="steps", eval_steps=1, device="cuda:1")
    assert options.output_dir == tmp_path / "a" / "b"
    assert list(tmp_path.iterdir()) == []


def test_a_filled_output_dir_is_refused_unless_asked_for(tmp_path):
    check_output_dir(tmp_path, overwrite=False)
    (tmp_path / "model.safetensors").write_text("weights")
    with pytest.raises(UsageError, match=f"--output-dir {tmp_path} is not empty; .* --overwrite-output-dir"):
        TrainingOptions(tmp_path)
    assert TrainingOptions(tmp_path, overwrite_output_dir=True).output_dir == tmp_path


def test_what_a_run_leaves_that_is_killed_before_it_saved_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / ACTIVATIONS).touch()
    assert TrainingOptions(tmp_path).output_dir == tmp_path


def test_a_run_that_goes_on_finds_a_filled_output_dir(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(UsageError, match=r"is not empty; .* or --resume-from-checkpoint to go on"):
        TrainingOptions(tmp_path)
    for flags in (["--resume-from-checkpoint"], ["--resume-from-checkpoint", "newest"]):
        with pytest.raises(UsageError, match="--resume-from-checkpoint needs --output-dir, or the directory"):
            parse([TrainingOptions], flags, "sft-edge train")
        (options,) = parse([TrainingOptions], [*flags, "--output-dir", str(tmp_path)], "sft-edge train")
        assert (options.resume_from_checkpoint, options.output_dir) == ("newest", tmp_path)
    (options,) = parse([TrainingOptions], ["--resume-from-checkpoint", f"{tmp_path}/checkpoint-3"], "sft-edge train")
    assert options.output_dir == tmp_path
    for flags, meant in ([], None), (["--resume_from_checkpoint", "False"], None):
        (options,) = parse([TrainingOptions], flags, "sft-edge train")
        assert options.resume_from_checkpoint is meant
    flags = ["--resume_from_checkpoint", "True", "--output-dir", str(tmp_path)]
    assert parse([TrainingOptions], flags, "sft-edge train")[0].resume_from_checkpoint == "newest"


def test_a_run_that_goes_on_takes_no_place_of_another_trainers_model(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "model.safetensors").write_text("another's")
    with pytest.raises(UsageError, match=r"holds model\.safetensors, and neither a model nor a checkpoint of sft-edge"):
        TrainingOptions(tmp_path, resume_from_checkpoint="newest")
    assert TrainingOptions(tmp_path, overwrite_output_dir=True, resume_from_checkpoint="newest")
    (tmp_path / "sft.json").write_text("{}")
    assert TrainingOptions(tmp_path, resume_from_checkpoint="newest")


@pytest.mark.parametrize("name", ["file", "file/out"])
def test_an_output_dir_that_cannot_be_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=f"{tmp_path}/file is not a directory"):
        TrainingOptions(tmp_path / name, overwrite_output_dir=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_dir_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="no permission to write"):
        TrainingOptions(tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["predict", "--model", "m", "--text", "caf\udce9"], "--text is no text in this locale; .*--file"),
        (["export", "--model", "m", "--to", "caf\udce9"], r"--to 'caf\\udce9': its name is not UTF-8"),
        (["demo", "--output-dir", "caf\udce9"], r"--output-dir 'caf\\udce9': its name is not UTF-8"),
    ],
)
def test_what_is_not_utf8_is_said_before_anything_begins(
    capsys: pytest.CaptureFixture[str], arguments: List[str], says: str
) -> None:
    assert main(arguments) == 2
    assert re.search(says, capsys.readouterr().err)


def test_every_codec_has_its_name_among_the_options() -> None:
    assert list(get_args(Codec)) == list(NAMES)
