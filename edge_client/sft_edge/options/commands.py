"""The options of every command but `train`, whose are in `train`. This module, too, imports nothing heavy."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import List, Literal, Optional

from sft.cli.durations import Duration
from sft.cli.options import above_zero, at_least, flag
from sft.errors import UsageError
from sft_edge.options.cut import Codec, GradientCodec, check_codecs, default_codec
from sft_edge.options.train import check_name, check_output_file

Head = Literal[
    "sequence-classification", "question-answering", "causal-lm", "token-classification", "multiple-choice", "masked-lm"
]


@dataclass
class AttachOptions:
    """The run."""

    output_dir: Path
    """directory of the run that was left; its name alone will do, without the option"""


@dataclass
class EvaluateOptions:
    """The evaluation."""

    model: Path
    """directory that `sft-edge train` or `export` wrote, or `save_pretrained` of a model with a head"""

    data_dir: Path
    """directory with the task's files"""

    task: Optional[str] = None
    """the task; without it the one the model was trained for, which it must be in any case"""

    max_eval_samples: Optional[int] = None
    """evaluate on the first so many rows only"""

    per_device_eval_batch_size: int = 32
    """sequences in a batch"""

    output_file: Optional[Path] = None
    """JSON file for the results, besides standard output"""

    def __post_init__(self) -> None:
        at_least(self, 1, "max_eval_samples", "per_device_eval_batch_size")


@dataclass
class CompareOptions:
    """The comparison."""

    runs: List[Path]
    """directories that `sft-edge train` wrote; their names alone will do, without the option, before all others"""

    baseline: Optional[Path] = None
    """which of them the others are held against; without it the first"""

    group_seeds: bool = False
    """runs that differ in nothing but --seed are one column: their mean, and their standard deviation"""

    json: bool = False
    """write it as JSON, with every point of the curves"""

    html: Optional[Path] = None
    """file for a page with tables and charts, which needs nothing from elsewhere"""

    svg: Optional[Path] = None
    """file for the charts alone"""

    overwrite: bool = False
    """replace the files of --html and --svg where they are there already"""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UsageError("no run is named: sft-edge compare RUN RUN")
        for option, path in (("--html", self.html), ("--svg", self.svg)):
            if path is not None:
                check_output_file(option, path, self.overwrite)
        if self.html is not None and self.svg is not None and self.html.resolve() == self.svg.resolve():
            raise UsageError(f"--html and --svg name the same file, {self.html}")


@dataclass
class PredictOptions:
    """The question."""

    model: Path
    """directory that `sft-edge train` or `export` wrote, or `save_pretrained` of a model with a head"""

    text: Optional[str] = None
    """the text; of a pair of texts the first, of question answering the question"""

    text_pair: Optional[str] = None
    """the second text of a pair; of question answering the context"""

    file: Optional[Path] = None
    """instead of --text: a .txt file with one text a line, or a .tsv, .csv or .jsonl file with the task's columns"""

    json_lines: bool = False
    """write one JSON object a row"""

    per_device_eval_batch_size: int = 32
    """sequences in a batch"""

    def __post_init__(self) -> None:
        at_least(self, 1, "per_device_eval_batch_size")
        if (self.text is None) == (self.file is None):
            raise UsageError("exactly one of --text and --file must be given")
        if self.text_pair is not None and self.text is None:
            raise UsageError("--text-pair needs --text")
        for name in ("text", "text_pair"):
            if any("\ud800" <= character <= "\udfff" for character in getattr(self, name) or ""):
                raise UsageError(
                    f"{flag(name)} is no text in this locale; put it into a file of UTF-8, and give --file"
                )


@dataclass
class VerifyOptions:
    """What is verified."""

    mode: Literal["sft", "sl"] = "sft"
    """split fine-tuning or plain split learning"""

    split_layer: int = 3
    """the block that is cut, counted from 1"""

    split_rank: int = 8
    """rank R of the decomposed layer; sft only"""

    residual: Literal["none", "low-rank"] = "none"
    """the residual around the layer that is decomposed: dropped as in the paper, or kept as far as rank R holds it"""

    freeze_edge: bool = False
    """train the cloud's half only"""

    codec: Codec = "float32"
    """how activations are written on the wire; one process then writes and reads them likewise. fitted is for --mode sl
    with --freeze-edge"""

    gradient_codec: Optional[GradientCodec] = None
    """how their gradients are; by default as --codec"""

    head: Head = "sequence-classification"
    """what the model predicts; causal-lm needs --model or --from-config of a decoder, such as GPT-2"""

    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] = (
        "single_label_classification"
    )
    """what the labels of sequence classification are"""

    model: Optional[str] = field(default=None, metadata={"names_place": True})
    """a model on the hub, a directory, or minilm; without it random weights in MiniLM-L6's shape"""

    from_config: Optional[Path] = None
    """instead of --model: a config.json whose shape gets random weights"""

    steps: int = 20
    """steps to train"""

    per_device_train_batch_size: int = 8
    """sequences in a micro-batch"""

    gradient_accumulation_steps: int = 1
    """micro-batches in a step"""

    max_seq_length: int = 32
    """tokens of the longest sequence; lengths are drawn from 1 to it"""

    seed: int = 0
    """draws weights and batches"""

    tolerance: float = 1e-6
    """the largest difference of a loss or a parameter that passes"""

    json: bool = False
    """write the report as JSON"""

    def __post_init__(self) -> None:
        at_least(self, 1, "split_layer", "split_rank", "steps", "per_device_train_batch_size", "max_seq_length")
        at_least(self, 1, "gradient_accumulation_steps")
        above_zero(self, "tolerance")
        if self.model is not None and self.from_config is not None:
            raise UsageError("only one of --model and --from-config may be given")
        if self.head == "causal-lm" and self.model is None and self.from_config is None:
            raise UsageError("--head causal-lm needs --from-config or --model of a decoder, such as GPT-2")
        if self.residual != "none" and self.mode == "sl":
            raise UsageError(f"--residual {self.residual} needs --mode sft: --mode sl cuts between two blocks")
        check_codecs(self.codec, self.gradient_codec, self.mode, self.freeze_edge)


@dataclass
class DoctorOptions:
    """What is looked at."""

    model: Optional[str] = field(default=None, metadata={"names_place": True})
    """a model on the hub, a directory, or minilm, which the server is asked about; without it no model is"""

    from_config: Optional[Path] = None
    """instead of --model: a config.json whose shape gets random weights"""

    model_name: Optional[str] = None
    """what the server is told the model is called, as with train"""

    mode: Literal["sft", "sl", "frozen"] = "sft"
    """split fine-tuning, plain split learning, or a frozen edge"""

    split_layer: int = 1
    """the block that is cut, counted from 1"""

    split_rank: int = 8
    """rank R of the decomposed layer; sft only"""

    head: Head = "sequence-classification"
    """what the model predicts"""

    wire_dtype: Optional[Literal["float32", "bfloat16", "float16"]] = None
    """type of tensors on the wire that no codec is for; without --codec of activations and gradients, too"""

    codec: Optional[Codec] = None
    """how activations are written on the wire: by default as --wire-dtype says, and where it is not given int8, with
    --mode sl float32; int8 and int4 have a scale for every 64 elements of a token, fitted has tables, which are
    fitted to training rows and sent once: with --mode frozen, or sl and --freeze-edge"""

    gradient_codec: Optional[GradientCodec] = None
    """how their gradients are, which come back; by default as --codec. int8 and int4 round them up or down by chance"""

    per_device_train_batch_size: int = 32
    """sequences in a micro-batch"""

    max_seq_length: int = 128
    """tokens a sequence is cut to"""

    seed: int = 42
    """draws what no checkpoint holds"""

    idle: Duration = Duration("10s")
    """how long a stream is kept without a message before it is used again; 0s leaves that out"""

    json: bool = False
    """write the findings as JSON"""

    def __post_init__(self) -> None:
        at_least(self, 1, "split_layer", "split_rank", "per_device_train_batch_size", "max_seq_length")
        at_least(self, 0, "seed", "idle")
        self.codec = self.codec or default_codec(self.mode, self.wire_dtype)
        check_codecs(self.codec, None, self.mode, freeze_edge=True)  # how a run is to be trained is not asked here
        if self.model is not None and self.from_config is not None:
            raise UsageError("only one of --model and --from-config may be given")


@dataclass
class EnvOptions:
    """What is told."""

    json: bool = False
    """write it as JSON"""


@dataclass
class DemoOptions:
    """The demo."""

    output_dir: Path = Path("demo-output")
    """where data, models and results go; what an earlier demo left there is replaced"""

    model: str = field(default="minilm", metadata={"names_place": True})
    """a model on the hub, a directory, or minilm for the weights of the demo extra"""

    split_layer: int = 5
    """the block that is cut, counted from 1"""

    split_rank: int = 8
    """rank R of the decomposed layer"""

    num_train_epochs: float = 2.0
    """passes over the training rows"""

    max_train_samples: int = 1600
    """train on the first so many rows"""

    learning_rate: float = 1e-4
    """the highest learning rate"""

    seed: int = 0
    """draws the data, new weights, the order of the rows and dropout"""

    def __post_init__(self) -> None:
        at_least(self, 1, "split_layer", "split_rank", "max_train_samples")
        check_name("--output-dir", self.output_dir)


@dataclass
class ExportOptions:
    """The export."""

    model: Path
    """directory that `sft-edge train` or `export` wrote, or `save_pretrained` of a model with a head"""

    to: Path
    """directory that the exported model becomes; a new one, or an empty one"""

    dense: bool = False
    """one matrix where the layer was decomposed, the product of the three; what is done without --factored, too"""

    factored: bool = False
    """keep the three layers of the decomposition, which are smaller than one matrix"""

    json: bool = False
    """write the report as JSON"""

    def __post_init__(self) -> None:
        check_name("--to", self.to)
        if self.dense and self.factored:
            raise UsageError("only one of --dense and --factored may be given")
        if os.path.lexists(str(self.to)) and not self.to.is_dir():  # a link to nothing is no directory either
            raise UsageError(f"--to {self.to} is not a directory")
        if self.to.is_dir() and any(self.to.iterdir()):
            raise UsageError(f"--to {self.to} is not empty; name another")
