"""Whole jobs in miniature: data sets of a few rows, written where each task looks for them, and command lines."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Dict, List, Tuple

from safetensors.torch import load_file
from torch import Tensor

from sft_edge.options.train import TRAIN_OPTIONS, RunOptions

_GOOD, _BAD = ("good", "great", "best"), ("bad", "worst", "no")
STEADY = {"lr_scheduler_type": "constant", "logging_steps": 1, "max_steps": 50}
"""Options with which a run of fewer steps is the beginning of a longer one."""

_FILLERS = ["the", "film", "is", "a", "story", "of", "people", "and", "their", "plot", "in", "it", "for", "one"]


def run_options(**values: object) -> RunOptions:
    """What `sft-edge train` would be given by flags of these names, of a run on the CPU."""
    values = {"model": "tiny", "task": "sst2", "split_layer": 2, "device": "cpu", **values}
    unknown = set(values) - {field.name for group in TRAIN_OPTIONS for field in fields(group)}
    assert not unknown, unknown
    return RunOptions(
        *(group(**{f.name: values[f.name] for f in fields(group) if f.name in values}) for group in TRAIN_OPTIONS)
    )


@dataclass(frozen=True)
class Job:
    """A task and its files, in numbers that a test can count on."""

    task: str
    data_dir: Path
    train_rows: int
    eval_rows: int

    def flags(self, **options: object) -> List[str]:
        """Arguments of `sft-edge train`, without a model; `options` are flags with underscores, and win over these."""
        values: Dict[str, object] = {
            "task": self.task,
            "data_dir": self.data_dir,
            "split_layer": 2,
            "split_rank": 4,
            "max_seq_length": 64,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "learning_rate": 1e-3,
            "seed": 7,
            "device": "cpu",
            **options,
        }
        return flags(**values)


def flags(**options: object) -> List[str]:
    """`split_layer=2` as `--split-layer 2`; True is a flag alone, None is left out."""
    words = []
    for name, value in options.items():
        if value is None:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(str(value))
    return words


def opinions(rows: int, seed: int) -> List[Tuple[str, int]]:
    """Sentences of different lengths whose label one word gives away."""
    draw = random.Random(seed)
    examples = []
    for index in range(rows):
        words = draw.choices(_FILLERS, k=draw.randint(2, 12))
        words.insert(draw.randint(0, len(words)), draw.choice((_BAD, _GOOD)[index % 2]))
        examples.append((" ".join(words), index % 2))
    return examples


def sst2(directory: Path, train_rows: int = 32, eval_rows: int = 13) -> Job:
    """Two classes, separable by a word."""
    for name, rows, seed in (("train", train_rows, 0), ("dev", eval_rows, 1)):
        lines = ["sentence\tlabel"] + [f"{text}\t{label}" for text, label in opinions(rows, seed)]
        _write(directory / "SST-2" / f"{name}.tsv", "\n".join(lines) + "\n")
    return Job("sst2", directory, train_rows, eval_rows)


def stsb(directory: Path, train_rows: int = 24, eval_rows: int = 9) -> Job:
    """Pairs of sentences, and how many of their words they share, from 0 to 5."""
    for name, rows, seed in (("train", train_rows, 0), ("dev", eval_rows, 1)):
        lines = ["index\tsentence1\tsentence2\tscore"]
        for index, (text, _) in enumerate(opinions(rows, seed)):
            words = text.split()
            shared = index % (min(len(words), 5) + 1)
            other = words[:shared] + ["what"] * (len(words) - shared)
            lines.append(f"{index}\t{text}\t{' '.join(other)}\t{5.0 * shared / len(words):.3f}")
        _write(directory / "STS-B" / f"{name}.tsv", "\n".join(lines) + "\n")
    return Job("stsb", directory, train_rows, eval_rows)


def multi_label(directory: Path, train_rows: int = 24, eval_rows: int = 9) -> Job:
    """Task `text` with any number of labels a row: the first words of the text."""
    names = ("film", "plot", "story")
    for name, rows, seed in (("train", train_rows, 0), ("dev", eval_rows, 1)):
        records = []
        for index, (text, _) in enumerate(opinions(rows, seed)):
            labels = [one for bit, one in enumerate(names) if index >> bit & 1]
            records.append(json.dumps({"text": " ".join(labels + [text]), "label": labels}))
        _write(directory / f"{name}.jsonl", "\n".join(records) + "\n")
    return Job("text", directory, train_rows, eval_rows)


def squad(directory: Path, train_rows: int = 16, eval_rows: int = 7) -> Job:
    """Questions for a word of the context."""
    for name, rows, seed in (("train-v1.1", train_rows, 0), ("dev-v1.1", eval_rows, 1)):
        paragraphs = []
        for index, (text, _) in enumerate(opinions(rows, seed)):
            answer = next(word for word in text.split() if word in _GOOD + _BAD)
            answers = [{"text": answer, "answer_start": text.index(answer)}]
            question = {"id": f"q{index}", "question": "what was it like", "answers": answers}
            paragraphs.append({"context": text, "qas": [question]})
        content = {"version": "1.1", "data": [{"title": "films", "paragraphs": paragraphs}]}
        _write(directory / "SQuAD" / f"{name}.json", json.dumps(content))
    return Job("squad", directory, train_rows, eval_rows)


JOBS = {"sst2": sst2, "stsb": stsb, "text": multi_label, "squad": squad}
"""By task; each takes the directory to write to."""


def weights_of(directory: Path) -> Dict[str, Tensor]:
    """Every tensor of a model's directory, of all its files."""
    tensors: Dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        of_file = load_file(str(path))
        assert not tensors.keys() & of_file.keys(), "a tensor is in two files"
        tensors.update(of_file)
    assert tensors, f"{directory} holds no weights"
    return tensors


def same_bits(one: Dict[str, Tensor], other: Dict[str, Tensor]) -> bool:
    """Whether two models have the same tensors, bit for bit."""
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def error_line(stderr: str) -> str:
    """The one line in which a command told its error, without the command's name."""
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if ": error: " in line]
    assert len(lines) == 1, stderr
    assert stderr.endswith(lines[0] + "\n"), stderr
    return lines[0].partition(": error: ")[2]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
