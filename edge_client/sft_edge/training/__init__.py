"""An ordinary PyTorch loop, its judging and its telling."""

from sft_edge.training.ahead import most_ahead
from sft_edge.training.evaluation import EvaluationSet, ask, evaluate, evaluate_with
from sft_edge.training.loop import TrainingLoop
from sft_edge.training.progress import Progress, TensorBoard, open_progress
from sft_edge.training.recovery import Recovery
from sft_edge.training.report import all_results, ledger_lines, peak_memory_bytes, print_report

__all__ = [
    "EvaluationSet",
    "Progress",
    "Recovery",
    "TensorBoard",
    "TrainingLoop",
    "all_results",
    "ask",
    "evaluate",
    "evaluate_with",
    "ledger_lines",
    "most_ahead",
    "open_progress",
    "peak_memory_bytes",
    "print_report",
]
