"""What runs leave in their directories, by the functions that write it, without the training."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Sequence

from support.jobs import run_options

from sft.wire.ledger import NO_TRAFFIC, Ledger, StepRecord, Traffic
from sft_edge.files import write_file, write_json
from sft_edge.model_files import Description
from sft_edge.options import OPTIONS_FILE, repeatable
from sft_edge.training import TrainerState, all_results, ledger_lines


def leave_run(
    directory: Path,
    *,
    scores: Sequence[float] = (60.0, 80.0, 70.0),
    metric: str = "accuracy",
    steps: int = 6,
    planned: int = 6,
    sent: int = 1000,
    **options: Any,
) -> Path:
    """A run whose loss fell from 1 by a tenth a step, with an evaluation for each of `scores`, the last at its end.

    `sent`: bytes a step, half as many came back; `options` as of `run_options`.
    """
    given = run_options(**options)
    moved = Traffic(sent, sent // 2, sent, sent // 2) if given.cut.mode != "local" else NO_TRAFFIC
    ledger, state = Ledger(), TrainerState(planned, 1.0, 8, 1)
    evaluated = {steps * (index + 1) // len(scores): score for index, score in enumerate(scores)}
    evaluation = {}
    for step in range(1, steps + 1):
        ledger.add(StepRecord(step - 1, 8, moved, 8000, 0.5, 0.25, 0.125, 0.5))
        state.global_step, state.epoch = step, step / planned
        state.log({"loss": 1.0 - step / 10, "learning_rate": 1e-3, "grad_norm": 1.0})
        if step in evaluated:
            evaluation = {f"eval_{metric}": evaluated[step], "eval_loss": 0.5, "eval_samples": 10, "eval_runtime": 1.0}
            state.record_metric(evaluated[step])
            state.log(evaluation)
    ledger.add_evaluation(moved, 10)
    cut = given.cut
    results = all_results(
        mode=cut.mode,
        split_layer=None if cut.mode == "local" else cut.split_layer,
        split_rank=cut.split_rank if cut.mode == "sft" else None,
        ledger=ledger,
        train_loss=0.65,
        train_runtime=12.0,
        evaluation=evaluation if steps == planned else {},
        edge_peak_memory_bytes=10**9,
    )
    described = Description(given.data.task, "sequence-classification", None, None, 128, "tiny", cut.mode)
    write_json(directory / "sft.json", asdict(described))
    write_json(directory / OPTIONS_FILE, repeatable(given))
    write_json(directory / "all_results.json", results)
    write_json(directory / "trainer_state.json", state)
    write_file(directory / "ledger.csv", ledger_lines(ledger))
    return directory
