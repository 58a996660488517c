"""Which runs a table or a figure of the paper is made of, and what `sft-edge train` is told for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Iterable, Iterator, List, Mapping, NamedTuple, Sequence, Tuple

from sft.cli.options import flag, options_of
from sft.errors import CutError
from sft_edge.commands.reproduce import paper
from sft_edge.options import PAPER_TASKS, LinkOptions, ReproduceOptions

_FIGURE_TASKS = ("sst2", "qnli")
_MAX_SEQ_LENGTH = 128


class _Sample(NamedTuple):
    """Of a task by default, for MiniLM: what a core should train on and be judged by in about 100 seconds."""

    max_train_samples: int
    max_eval_samples: int = 1000
    max_seq_length: int = _MAX_SEQ_LENGTH
    num_train_epochs: float = 2.0
    learning_rate: float = 2e-4
    per_device_train_batch_size: int = 32


# Where pairs of sentences are to be understood, or grammar, so few rows need smaller batches, which are more steps, and
# shorter sequences: a batch costs as much as its longest.
_SAMPLES: Mapping[str, _Sample] = {
    "sst2": _Sample(2000),
    "qnli": _Sample(1200, max_seq_length=64, per_device_train_batch_size=16),
    "mnli": _Sample(1280, max_seq_length=64, per_device_train_batch_size=16),
    "qqp": _Sample(1280, per_device_train_batch_size=16),
    "cola": _Sample(3600, per_device_train_batch_size=16),
    "rte": _Sample(960, max_seq_length=96, learning_rate=1e-4, per_device_train_batch_size=8),
    "stsb": _Sample(2400),
    "mrpc": _Sample(1040, per_device_train_batch_size=16),
    "squad": _Sample(480, 300, 384, learning_rate=1e-4, per_device_train_batch_size=8),
}

_USUAL_CODECS = {"sft": "float32", "frozen": "int8", "sl": "int8"}
"""By mode; a run with another says so in its name."""

_ALL_ROWS = ("max_train_samples", "max_eval_samples")
"""Where 0 is given."""


@dataclass(frozen=True)
class System:
    """One way to train: a row of Table I, or a point of a curve of a figure."""

    name: str
    """What is done, without the numbers."""

    mode: str
    split_layer: int = 0
    """0 where nothing is cut."""

    split_rank: int = 0
    """0 where nothing is decomposed."""

    residual: str = "none"
    codec: str = ""
    """Empty where nothing crosses a wire."""

    more: Tuple[Tuple[str, str], ...] = ()
    """Further flags of `sft-edge train` with their values, which win over all others."""

    @property
    def curve(self) -> str:
        """`SFT(R=8)`: what systems that differ in the block alone have in common."""
        return f"{self.name}(R={self.split_rank})" if self.split_rank else self.name

    @property
    def title(self) -> str:
        """`SFT(l=11,R=8)`, as the paper writes it."""
        numbers = [f"l={self.split_layer}"] if self.split_layer else []
        numbers += [f"R={self.split_rank}"] if self.split_rank else []
        return f"{self.name}({','.join(numbers)})" if numbers else self.name

    def flags(self) -> Dict[str, str]:
        """Of `sft-edge train`, without `more`."""
        flags = {"--mode": self.mode}
        if self.split_layer:
            flags["--split-layer"] = str(self.split_layer)
        if self.split_rank:
            flags["--split-rank"] = str(self.split_rank)
        if self.residual != "none":
            flags["--residual"] = self.residual
        if self.codec:
            flags["--codec"] = self.codec
        return flags


BASELINE = System("local", "local")


@dataclass(frozen=True)
class Run:
    """One run of `sft-edge train`."""

    task: str
    system: System
    seed: int
    flags: Mapping[str, str]
    """All that decides what comes of it, but not where that goes, nor where the cloud is."""

    @property
    def name(self) -> str:
        """Of its directory."""
        system = self.system
        words = [self.task, system.mode]
        words += [f"l{system.split_layer}"] if system.split_layer else []
        words += [f"r{system.split_rank}"] if system.split_rank else []
        words += [f"{system.residual}-residual"] if system.residual != "none" else []
        words += [system.codec] if system.codec != _USUAL_CODECS.get(system.mode, "") else []
        words += [f"{flag.strip('-')}-{value}" for flag, value in system.more]
        return "-".join([*words, f"seed{self.seed}"])


def runs_of(options: ReproduceOptions, link: LinkOptions, blocks: int) -> List[Run]:
    """Those of the figure, of a model of so many blocks; of each seed and task the baseline first.

    Raises CutError for a block that the model does not have.
    """
    check_layers(options.split_layers, blocks)
    tasks = options.tasks or (PAPER_TASKS if options.figure == "table1" else _FIGURE_TASKS)
    return runs_with(_systems(options, blocks), tasks, options, link)


def check_layers(split_layers: Sequence[int], blocks: int) -> None:
    """Raises CutError for one that a model of so many blocks does not have."""
    beyond = [layer for layer in split_layers if layer > blocks]
    if beyond:
        raise CutError(f"--split-layers {beyond[0]}: this model has blocks 1 to {blocks}; choose among them")


def runs_with(
    systems: Iterable[System], tasks: Sequence[str], options: ReproduceOptions, link: LinkOptions
) -> List[Run]:
    """Of each seed and task one with each system, in that order; `options` say how large they are."""
    each = list(dict.fromkeys(systems))
    return [
        Run(task, system, seed, _flags(options, link, task, system, seed))
        for seed in dict.fromkeys(options.seeds or [0])
        for task in dict.fromkeys(tasks)
        for system in each
    ]


def _systems(options: ReproduceOptions, blocks: int) -> Iterator[System]:
    yield BASELINE
    every = range(1, blocks + 1)
    if options.figure == "table1":
        for layer in options.split_layers or [max(blocks - 1, 1)]:
            yield from (_split(layer, rank) for rank in options.split_ranks or paper.RANKS)
    elif options.figure == "fig2":
        for rank in options.split_ranks or [1]:
            for layer in options.split_layers or every:
                yield System("residual kept", "local", layer, rank, "full")
    else:
        for rank in options.split_ranks or [paper.RANK]:
            yield from (_split(layer, rank) for layer in options.split_layers or every)
        for layer in options.split_layers or every:
            yield System("frozen int8", "frozen", layer, codec="int8")
        for layer in options.split_layers or every:
            yield System("trained int8", "sl", layer, codec="int8")


def _split(layer: int, rank: int) -> System:
    """The paper's: in float32, as nothing of a code is said there."""
    return System("SFT", "sft", layer, rank, codec="float32")


def _flags(options: ReproduceOptions, link: LinkOptions, task: str, system: System, seed: int) -> Dict[str, str]:
    flags = {
        "--model": options.model or "minilm",
        "--task": task,
        "--data-dir": str(options.data_dir),
        **system.flags(),
        "--seed": str(seed),
        "--device": options.device,
    }
    sample = _SAMPLES[task]
    if options.max_train_samples == 0:  # what few rows need is not for all of them
        sample = _Sample(0, sample.max_eval_samples, max(sample.max_seq_length, _MAX_SEQ_LENGTH))
    for name, usual in sample._asdict().items():
        given = getattr(options, name)
        if given != 0 or name not in _ALL_ROWS:
            flags[flag(name)] = str(usual if given is None else given)
    if system.mode != "local" and link.labels != "cloud":
        flags["--labels"] = link.labels
    return {**flags, **dict(system.more)}


def link_arguments(link: LinkOptions) -> List[str]:
    """How `sft-edge train` is told the way to the cloud, where one was given."""
    words = []
    for option in options_of(LinkOptions):
        value = getattr(link, option.name)
        if value != option.default and option.name != "labels":  # they are among a run's flags
            words += [option.flag, str(value).lower() if option.type is bool else str(value)]
    return words
