"""Options of `sft-edge plan`, and `auto`."""

import pytest

from sft.cli.options import parse
from sft.errors import CutError, UsageError
from sft_edge.options import PLAN_OPTIONS, TRAIN_OPTIONS, CutOptions, PlanOptions, RunOptions, check_together

RUN = ["--model", "minilm", "--task", "sst2"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-bytes-per-step", "0"], "--max-bytes-per-step must be above 0"),
        (["--max-bytes-per-step", "many"], "--max-bytes-per-step: 'many' is not a size"),
        (["--max-edge-memory", "0GB"], "--max-edge-memory must be above 0"),
        (["--max-run-time", "0s"], "--max-run-time must be above 0"),
        (["--max-run-time", "an hour"], "--max-run-time: 'an hour' is not a duration"),
        (["--min-accuracy", "nan"], "--min-accuracy must be from -100 to 0, not nan"),
        (["--min-accuracy", "98"], "--min-accuracy must be from -100 to 0, not 98.0"),
        (["--min-accuracy", "good"], "--min-accuracy: 'good' is not a number"),
        (["--price-per-gb", "-1"], "--price-per-gb must be 0 or more"),
        (["--price-per-gb", "nan"], "--price-per-gb must be 0 or more"),
        (["--svg", "."], "--svg . is a directory"),
    ],
)
def test_a_limit_that_makes_no_sense(flags, message):
    with pytest.raises(UsageError, match=message):
        parse((PlanOptions,), flags, "sft-edge plan")


def test_what_is_not_given_of_the_cut_is_open():
    cut = parse(PLAN_OPTIONS, [*RUN, "--codec", "int4"], "sft-edge plan")[2]
    assert [str(value) for value in (cut.mode, cut.split_layer, cut.split_rank, cut.codec)] == ["auto"] * 3 + ["int4"]
    assert cut.is_open
    assert cut.activations is None, "a frozen edge's are kept, others are not: it is not known yet which"
    assert not parse(PLAN_OPTIONS, [*RUN, "--mode", "local"], "sft-edge plan")[2].is_open


def test_the_flags_of_a_run_are_taken_though_nothing_is_written(tmp_path):
    (tmp_path / "README.md").touch()
    for flags in (["--resume-from-checkpoint"], ["--resume-from-checkpoint", str(tmp_path)], []):
        groups = parse(PLAN_OPTIONS, [*RUN, "--output-dir", str(tmp_path), *flags], "sft-edge plan")
        assert groups[4].output_dir is None


def test_which_way_can_leave_is_not_known_before_one_is_chosen():
    flags = ["--detach", "--server", "cloud.example:1"]
    options = RunOptions(*parse(PLAN_OPTIONS, [*RUN, *flags], "sft-edge plan")[1:])
    check_together(options.cut, options.link, options.training, options.lora)
    options = RunOptions(*parse(TRAIN_OPTIONS, [*RUN, *flags, "--split-layer", "2"], "sft-edge train"))
    with pytest.raises(UsageError, match="--detach needs --activations keep-on-cloud"):
        check_together(options.cut, options.link, options.training, options.lora)


@pytest.mark.parametrize(
    ("flags", "is_open"),
    [
        (["--split-layer", "auto"], True),
        (["--split-layer", "3", "--split-rank", "auto"], True),
        (["--split-layer", "3", "--codec", "auto"], True),
        (["--mode", "auto", "--split-layer", "3"], True),
        (["--mode", "frozen", "--split-layer", "3"], False),
    ],
)
def test_what_train_leaves_open(flags, is_open):
    assert parse(TRAIN_OPTIONS, [*RUN, *flags], "sft-edge train")[1].is_open is is_open


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--split-layer", "automatic"], UsageError, "--split-layer: 'automatic' is not a whole number, nor auto"),
        (["--split-layer", "0"], CutError, "--split-layer counts blocks from 1, not 0"),
        (["--split-layer", "3", "--split-rank", "0"], CutError, "--split-rank must be 1 or more, not 0"),
        (["--split-layer", "3", "--split-rank", "1.5"], UsageError, "--split-rank: '1.5' is not a whole number"),
        (["--mode", "local", "--split-layer", "auto"], UsageError, "auto chooses a cut"),
        (["--mode", "local", "--split-rank", "auto"], UsageError, "auto chooses a cut"),
        (["--mode", "local", "--codec", "auto"], UsageError, "--codec auto needs --mode sft, sl or frozen"),
        (["--mode", "auto"], UsageError, "--split-layer must be given"),
    ],
)
def test_auto_where_it_makes_no_sense(flags, error, message):
    with pytest.raises(error, match=message):
        parse(TRAIN_OPTIONS, [*RUN, *flags], "sft-edge train")


def test_a_number_is_one():
    cut = parse(TRAIN_OPTIONS, [*RUN, "--split-layer", "3", "--split-rank", "16"], "sft-edge train")[1]
    assert (type(cut.split_layer), type(cut.split_rank)) == (int, int)
    assert cut == CutOptions("sft", 3, 16)
