"""`auto` of `sft-edge train`: what was left open of the cut, before a run begins or as it was chosen then."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any, Dict, Mapping, Sequence

from sft.cli.whole_or_auto import is_auto
from sft.errors import CheckpointError, UsageError
from sft.plan.plans import Limits, Plan, best
from sft.printable import format_seconds
from sft_edge.checkpoints import options_before
from sft_edge.commands.plan.plan import make_plans
from sft_edge.options import CutOptions, RunOptions, check_together

LEAST_POINTS = -1.0
"""Against the whole model, that a cut is to be expected to have, or it is not chosen."""

_MODES = ("sft", "sl", "frozen")


def chosen(options: RunOptions) -> RunOptions:
    """With all of the cut decided: as in the checkpoint that the run goes on from, if there is one, or else the fastest
    that the record says loses little. Says why, in a line.

    Raises UsageError where the record says that of none, and with --data-cap, which measuring would not keep; any
    SFTError of a run that begins.
    """
    before = options_before(options.training)
    if before:
        cut = _decided(options.cut, _values_before(before, options.cut))
        said = f"{_flags(cut)}, as the run began"
    else:
        _check_cap(options)
        planned = make_plans(options, _MODES, on_status=_say)
        limits = Limits(points=LEAST_POINTS)
        plan = best(planned.plans, limits)
        if plan is None:
            raise UsageError(_nothing(planned.plans))
        cut = _decided(options.cut, _values_of(plan))
        spread = "" if plan.spread is None else f" +/- {plan.spread:.1f}"
        enough = sum(not limits.excess(one) for one in planned.plans)
        said = (
            f"{_flags(cut)}: about {plan.step_seconds:.3g} s a step, {format_seconds(plan.run_seconds)} in all, and "
            f"{plan.points:+.1f}{spread} points to expect; the fastest of {enough} ways, out of {len(planned.plans)}, "
            f"that are to lose no more than {-LEAST_POINTS:g}"
        )
    _say(f"auto: {said}")
    check_together(cut, options.link, options.training, options.lora, options.budget)
    return options._replace(cut=cut)


def _check_cap(options: RunOptions) -> None:
    if options.budget.data_cap is not None:
        raise UsageError(
            f"auto does not go with --data-cap {options.budget.data_cap}: it measures on the link before the run "
            "begins, outside of that; let sft-edge plan choose where the link is free, and give what it says"
        )


def _decided(given: CutOptions, values: Mapping[str, Any]) -> CutOptions:
    """With these in the place of what was left open."""
    return replace(given, **{name: value for name, value in values.items() if is_auto(getattr(given, name))})


def _values_of(plan: Plan) -> Dict[str, Any]:
    rank = plan.split_rank or CutOptions.split_rank
    return {"mode": plan.mode, "split_layer": plan.split_layer, "split_rank": rank, "codec": plan.codec}


def _values_before(before: Mapping[str, str], given: CutOptions) -> Dict[str, Any]:
    """Raises CheckpointError, and UsageError for a run that was in one process, and is to be cut now."""
    try:
        mode, layer, rank = before["--mode"], before["--split-layer"], int(before["--split-rank"])
        values = {"mode": mode, "split_layer": None if layer == str(None) else int(layer), "split_rank": rank}
        codec = None if mode == "local" else before["--codec"]
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint does not say how the model is cut ({error}): give what it was"
        ) from error
    if mode == "local" and not is_auto(given.mode):
        raise UsageError(
            f"the run was trained with --mode local, now it is {given.mode}: give the same, or begin anew without "
            "--resume-from-checkpoint"
        )
    return {**values, "codec": codec}


def _flags(cut: CutOptions) -> str:
    if cut.mode == "local":
        return "--mode local"
    rank = f" --split-rank {cut.split_rank}" if cut.mode == "sft" else ""
    return f"--mode {cut.mode} --split-layer {cut.split_layer}{rank} --codec {cut.written_in}"


def _nothing(plans: Sequence[Plan]) -> str:
    known = [(one.points, one) for one in plans if one.points is not None]
    if not known:
        return (
            "auto: no record says what accuracy any of these ways to train has: give --split-layer, --split-rank and "
            "--codec, or see sft-edge plan"
        )
    points, near = max(known, key=lambda one: one[0])
    return (
        f"auto: of all these ways to train the best on record, {near.name}, is to lose {-points:.1f} points, more "
        f"than {-LEAST_POINTS:g}: give --split-layer, --split-rank and --codec, or leave more of them to choose"
    )


def _say(text: str) -> None:
    if text:  # a link that is whole again has nothing to say
        sys.stderr.write(f"{text}\n")
