"""The command `sft-edge`. What a command needs is imported once its options are understood: torch takes seconds."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any, List, Optional, Tuple

from sft.cli.imports import imports
from sft.cli.options import parse
from sft.cli.run import run
from sft_edge.options import (
    PLAN_OPTIONS,
    TRAIN_OPTIONS,
    AttachOptions,
    CompareOptions,
    DemoOptions,
    DoctorOptions,
    EnvOptions,
    EvaluateOptions,
    ExportOptions,
    LinkOptions,
    OptimizerOptions,
    PredictOptions,
    ReproduceOptions,
    RunOptions,
    VerifyOptions,
    check_together,
)


def train(prog: str, argv: List[str]) -> int:
    """fine-tune a model across this machine and a cloud"""
    options = _run_options(parse(TRAIN_OPTIONS, argv, prog, train.__doc__))
    with imports():
        from sft_edge.commands.train.budget import exit_code_of
        from sft_edge.commands.train.leaving import check_not_left
        from sft_edge.commands.train.train import TrainingRun

    training = options.training
    if options.cut.is_open and training.output_dir is not None and not training.overwrite_output_dir:
        check_not_left(training.output_dir, overwrite=False)  # before minutes of measuring
    return exit_code_of(TrainingRun(_decided(options), argv).run())


def attach(prog: str, argv: List[str]) -> int:
    """come back for the result of a run that left with --detach"""
    if argv and not argv[0].startswith("-"):
        argv = ["--output-dir", *argv]
    (named,) = parse((AttachOptions,), argv, prog, attach.__doc__)
    with imports():
        from sft_edge.commands.train.leaving import read_left
        from sft_edge.commands.train.train import TrainingRun

    left = read_left(named.output_dir)
    output_dir = named.output_dir.resolve()
    with suppress(OSError):  # where it is no more, what was named from there is not there either
        os.chdir(left.directory)
    arguments = [*left.arguments, "--output-dir", str(output_dir), "--resume-from-checkpoint"]
    options = RunOptions(*parse(TRAIN_OPTIONS, arguments, prog, train.__doc__))
    TrainingRun(_decided(options), arguments, left).run()
    return 0


def _run_options(groups: Tuple[Any, ...]) -> RunOptions:
    """Raises UsageError for what does not go together."""
    options = RunOptions(*groups)
    check_together(options.cut, options.link, options.training, options.lora, options.budget)
    return options


def _decided(options: RunOptions) -> RunOptions:
    """With what `auto` stands for."""
    if not options.cut.is_open:
        return options
    with imports():
        from sft_edge.commands.plan.choose import chosen

    return chosen(options)


def evaluate(prog: str, argv: List[str]) -> int:
    """judge a trained model on a task's validation rows, without a cloud"""
    (options,) = parse((EvaluateOptions,), argv, prog, evaluate.__doc__)
    with imports():
        from sft_edge.commands.evaluate import evaluate_saved

    evaluate_saved(options)
    return 0


def predict(prog: str, argv: List[str]) -> int:
    """ask a trained model, without a cloud"""
    (options,) = parse((PredictOptions,), argv, prog, predict.__doc__)
    with imports():
        from sft_edge.commands.predict import predict as print_predictions

    print_predictions(options)
    return 0


def compare(prog: str, argv: List[str]) -> int:
    """hold runs against each other: scores, bytes, time, memory, what differs"""
    if argv and not argv[0].startswith("-"):
        argv = ["--runs", *argv]
    (options,) = parse((CompareOptions,), argv, prog, compare.__doc__)
    from sft_edge.commands.compare.compare import compare as hold_against  # without torch

    hold_against(options)
    return 0


def export(prog: str, argv: List[str]) -> int:
    """make a trained model one that transformers opens without this package"""
    (options,) = parse((ExportOptions,), argv, prog, export.__doc__)
    with imports():
        from sft_edge.commands.export.export import export as export_and_report

    export_and_report(options)
    return 0


def verify(prog: str, argv: List[str]) -> int:
    """show that split training computes what one process computes"""
    options = parse((VerifyOptions, OptimizerOptions, LinkOptions), argv, prog, verify.__doc__)
    with imports():
        from sft_edge.commands.verify.verify import verify_and_report

    verify_and_report(*options)
    return 0


def doctor(prog: str, argv: List[str]) -> int:
    """look at a server and the way to it, and say what would stop a run"""
    options = parse((DoctorOptions, LinkOptions), argv, prog, doctor.__doc__)
    with imports():
        from sft_edge.commands.doctor.doctor import doctor as examine

    return examine(*options)


def env(prog: str, argv: List[str]) -> int:
    """say what a bug report needs to know of this machine; no secrets"""
    (options,) = parse((EnvOptions,), argv, prog, env.__doc__)
    with imports():
        from sft_edge.commands.env import env as describe

    describe(options)
    return 0


def demo(prog: str, argv: List[str]) -> int:
    """train the paper's systems and a frozen edge side by side on a synthetic set"""
    (options,) = parse((DemoOptions,), argv, prog, demo.__doc__)
    with imports():
        from sft_edge.commands.demo import demo as run_demo

    return run_demo(options)


def plan(prog: str, argv: List[str]) -> int:
    """say what each way to train would take here, and which is best"""
    limits, *groups = parse(PLAN_OPTIONS, argv, prog, plan.__doc__)
    options = _run_options(tuple(groups))
    with imports():
        from sft_edge.commands.plan.plan import plan as print_plan

    return print_plan(limits, options)


def reproduce(prog: str, argv: List[str]) -> int:
    """do the paper's experiments again, and show its numbers beside"""
    if argv and not argv[0].startswith("-"):
        argv = ["--figure", *argv]
    options = parse((ReproduceOptions, LinkOptions), argv, prog, reproduce.__doc__)
    with imports():
        from sft_edge.commands.reproduce.reproduce import reproduce as do_again

    return do_again(*options)


COMMANDS = {
    "train": train,
    "attach": attach,
    "evaluate": evaluate,
    "predict": predict,
    "compare": compare,
    "export": export,
    "verify": verify,
    "doctor": doctor,
    "env": env,
    "demo": demo,
    "plan": plan,
    "reproduce": reproduce,
}


def main(argv: Optional[List[str]] = None) -> int:
    """Runs `sft-edge`; returns the exit code."""
    return run("sft-edge", COMMANDS, argv)
