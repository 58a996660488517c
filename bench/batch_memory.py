"""How far the cloud's estimate of a batch's memory is from what the batch takes.

    python bench/batch_memory.py

For a BERT and a GPT-2 of six blocks of width 384, in five shapes of batch: what the server would charge for a training
micro-batch, before anything is made of it, and the most that torch's allocator then holds beside what it held before.
Exit code 1 where a batch took more than was charged. On the CPU.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.tiny import make_tiny_model
from support.tiny_edge import TinyEdge
from transformers import AutoConfig

from sft.models import Cut
from sft.v1 import split_training_pb2 as pb
from sft_cloud.engine.build import build, make_session
from sft_cloud.engine.request import check_request
from sft_cloud.session import Session

CPU = torch.device("cpu")
SIZES = {
    "bert": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "max_position_embeddings": 512},
    "gpt2": {"n_embd": 384, "n_head": 6, "n_inner": 1536, "n_positions": 512},
}
SHAPES = ((1, 512), (4, 256), (8, 128), (32, 64), (64, 16))
"""Sequences, tokens of each."""


def main() -> int:
    """Prints a row a batch, and returns the exit code."""
    print(f"{'':<6}{'batch':>10}{'charged':>12}{'taken':>12}{'above':>8}")
    above = []
    with tempfile.TemporaryDirectory() as scratch:
        for family, sizes in SIZES.items():
            directory = make_tiny_model(Path(scratch) / family, family, layers=6, **sizes)
            config = AutoConfig.from_pretrained(
                directory,
                num_labels=2,
                problem_type="single_label_classification",
                trust_remote_code=False,
                local_files_only=True,
            )
            for sequences, length in SHAPES:
                edge = TinyEdge(directory, config, cut=Cut("sft", 1, 8), lengths=(length,) * sequences)
                charged, taken = measured(edge)
                above.append(charged / taken - 1)
                print(f"{family:<6}{f'{sequences} x {length}':>10}{_mib(charged)}{_mib(taken)}{above[-1]:>8.0%}")
    print(f"\nfrom {min(above):.0%} to {max(above):.0%} above")
    return 1 if min(above) < 0 else 0


def measured(edge: TinyEdge) -> tuple[int, int]:
    """Bytes: as charged, and at the peak of a step in which the gradients are made already."""
    spec = check_request(edge.request())
    session = make_session(spec, build(spec, CPU), [*edge.weights, *edge.factors], CPU)
    session.handle(_labelled(edge, 0))
    message = _labelled(edge, 1)
    return session._half.training_bytes(message.forward.activation), _peak(session, message)


def _labelled(edge: TinyEdge, micro_batch: int) -> pb.EdgeMessage:
    classes = pb.Labels.Classes(ids=[0] * len(edge.lengths))
    return edge.forward(0, micro_batch, labels=pb.Labels(classes=classes))


def _peak(session: Session, message: pb.EdgeMessage) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        session.handle(message)
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    changes = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        most = max(most, held)
    return most


def _mib(size: int) -> str:
    return f"{size / (1 << 20):>8.1f} MiB"


if __name__ == "__main__":
    sys.exit(main())
