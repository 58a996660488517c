"""`sft-edge train`'s options of LoRA."""

import subprocess
import sys

import pytest
from peft import LoraConfig

from sft.cli.options import parse
from sft.errors import UsageError
from sft_edge.options.lora import LoraOptions


def options(*argv):
    (parsed,) = parse((LoraOptions,), argv, "sft-edge train")
    return parsed


def test_they_are_pefts():
    config = options(
        *("--lora-r", "4", "--lora-alpha", "16", "--lora-dropout", "0.1", "--use-rslora"),
        *("--lora-target-modules", "query", "value"),
    ).config()
    assert config == LoraConfig(
        r=4, lora_alpha=16, lora_dropout=0.1, use_rslora=True, target_modules=["query", "value"]
    )


def test_peft_chooses_the_modules_unless_they_are_named():
    assert options("--lora-r", "4").config().target_modules is None
    assert options("--lora-r", "4", "--lora-target-modules", "all-linear").config().target_modules == "all-linear"


@pytest.mark.parametrize(
    ("argv", "on_edge", "on_cloud"),
    [
        ([], False, False),
        (["--lora-r", "4"], True, True),
        (["--lora-r", "4", "--lora-half", "edge"], True, False),
        (["--lora-r", "4", "--lora-half", "cloud"], False, True),
    ],
)
def test_which_half_gets_adapters(argv, on_edge, on_cloud):
    parsed = options(*argv)
    assert (parsed.on_edge, parsed.on_cloud) == (on_edge, on_cloud)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--lora-r", "-1"], "--lora-r must be 0 or more"),
        (["--lora-r", "4", "--lora-alpha", "0"], "--lora-alpha must be 1 or more"),
        (["--lora-r", "4", "--lora-dropout", "1"], "--lora-dropout must be 0 or more and below 1"),
        (["--lora-r", "4", "--lora-dropout", "nan"], "--lora-dropout must be"),
        (["--lora-r", "4", "--lora-half", "none"], "none of both, edge, cloud"),
        (["--lora-alpha", "16"], "needs --lora-r"),
        (["--lora-half", "edge"], "needs --lora-r"),
    ],
)
def test_bad_values(argv, says):
    with pytest.raises(UsageError, match=says):
        options(*argv)


def test_peft_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"pip install 'split-fine-tuning\[peft\]'"):
        options("--lora-r", "4").config()


def test_they_import_nothing_heavy():
    code = "import sys, sft_edge.options.lora; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
