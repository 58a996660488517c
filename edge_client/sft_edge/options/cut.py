"""The options of the cut: where a model is cut, and how what crosses there is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Optional

from sft.cli.whole_or_auto import AUTO, WholeOrAuto, is_auto
from sft.errors import CutError, UsageError

GradientCodec = Literal["float32", "bfloat16", "float16", "int8", "int4"]
Codec = Literal["float32", "bfloat16", "float16", "int8", "int4", "fitted"]
"""As `sft.wire.codec.rows` names them, which would be heavy to import."""

CodecOrAuto = Literal["float32", "bfloat16", "float16", "int8", "int4", "fitted", "auto"]


@dataclass
class CutOptions:
    """The cut."""

    mode: Literal["sft", "sl", "frozen", "local", "auto"] = "sft"
    """split fine-tuning; plain split learning (the full-width activation crosses the wire); a frozen edge, whose
    full-width activation crosses once, in a code, so that the cut may be low; or one process. auto, here and in the
    options of the cut below, has the fastest chosen of those that lose little accuracy, by measuring before the run:
    one of the first three"""

    split_layer: Optional[WholeOrAuto] = None
    """the block that is cut, counted from 1; with --mode sl and frozen the last block of the edge; or auto"""

    split_rank: WholeOrAuto = 8  # type: ignore[assignment]  # what is made of a number is an int
    """rank R of the decomposed layer, which is the width of the activation on the wire; sft only; or auto"""

    residual: Literal["none", "low-rank", "full"] = "none"
    """the residual around the layer that is decomposed: dropped as in the paper, kept as far as the activation of rank
    R holds it (fitted to the first training rows), or kept in full, which only --mode local can"""

    freeze_edge: bool = False
    """train the cloud's half only: on the edge no backward pass and no dropout, and no gradient comes down; with --mode
    sft and sl, and always with frozen"""

    activations: Optional[Literal["resend", "keep-on-edge", "keep-on-cloud"]] = None
    """of a frozen edge, where they are the same in every epoch: compute and send them again each time, which --mode sft
    and sl do; keep them in a file in --output-dir after the first, and send them again; or have the cloud keep them, so
    that each crosses once, which frozen does"""

    wire_dtype: Optional[Literal["float32", "bfloat16", "float16"]] = None
    """type of tensors on the wire that no codec is for; without --codec of activations and gradients, too"""

    codec: Optional[CodecOrAuto] = None
    """how activations are written on the wire: by default as --wire-dtype says, and where it is not given int8, with
    --mode sl float32; int8 and int4 have a scale for every 64 elements of a token, fitted has tables, which are
    fitted to training rows and sent once: with --mode frozen, or sl and --freeze-edge; or auto"""

    gradient_codec: Optional[GradientCodec] = None
    """how their gradients are, which come back; by default as --codec. int8 and int4 round them up or down by chance"""

    def __post_init__(self) -> None:
        if self.mode == "frozen":
            self.freeze_edge = True
            self.activations = self.activations or "keep-on-cloud"
        if self.mode != "auto":  # what it means is known when one is chosen
            self.activations = self.activations or "resend"
            self.codec = self.codec or default_codec(self.mode, self.wire_dtype)
        if self.residual == "full" and self.mode != "local":
            raise UsageError(
                "--residual full needs --mode local: over a wire the residual would have to cross at full width beside "
                "the rank-R activation, which is what the cut avoids; --residual low-rank keeps what fits into that"
            )
        if self.residual != "none" and self.cuts_between_blocks:
            raise UsageError(
                f"--residual {self.residual} needs --mode sft or local: --mode {self.mode} cuts between two blocks"
            )
        if self.freeze_edge and self.mode == "local":
            raise UsageError("--freeze-edge needs --mode sft, sl or frozen: one process has no edge")
        for option, name in (
            ("--wire-dtype", None if self.wire_dtype == "float32" else self.wire_dtype),
            ("--codec", self.codec),
            ("--gradient-codec", self.gradient_codec),
        ):
            if name is not None and self.mode == "local":
                raise UsageError(f"{option} {name} needs --mode sft, sl or frozen: one process has no wire")
        if self.mode != "auto":
            check_codecs(self.codec, self.gradient_codec, self.mode, self.freeze_edge)
        if self.activations not in (None, "resend") and not self.freeze_edge and self.mode != "auto":
            raise UsageError(
                f"--activations {self.activations} needs --freeze-edge, or --mode frozen: those of an edge that "
                "is trained change"
            )
        if self.split_layer is None and self.is_cut:
            raise UsageError("--split-layer must be given (a block counted from 1, or auto), or --mode local")
        if self.split_layer is not None and self.split_layer < 1 and not is_auto(self.split_layer):
            raise CutError(f"--split-layer counts blocks from 1, not {self.split_layer}")
        if self.split_rank < 1 and not is_auto(self.split_rank):
            raise CutError(f"--split-rank must be 1 or more, not {self.split_rank}")
        if self.mode == "local" and self.is_open:
            raise UsageError("auto chooses a cut: it needs --mode sft, sl, frozen or auto")

    @property
    def cuts_between_blocks(self) -> bool:
        """Whether no layer is decomposed, and the activation is of full width."""
        return self.mode in ("sl", "frozen")

    @property
    def written_in(self) -> str:
        """The code of activations, however it was said; of no account in one process, and while it is open."""
        return self.codec or self.wire_dtype or "float32"

    @property
    def is_open(self) -> bool:
        """Whether something of it is to be chosen yet."""
        return any(map(is_auto, (self.mode, self.split_layer, self.split_rank, self.codec)))

    @property
    def is_cut(self) -> bool:
        """Whether a block is singled out: everywhere but in plain `--mode local`, which trains the model as it is."""
        return self.mode != "local" or self.residual != "none"


@dataclass
class PlanCutOptions(CutOptions):
    """What is given of the cut: all plans have it, and what is not given is theirs."""

    mode: Literal["sft", "sl", "frozen", "local", "auto"] = "auto"
    split_layer: Optional[WholeOrAuto] = AUTO  # type: ignore[assignment]  # it is one, whatever __new__ says
    split_rank: WholeOrAuto = AUTO  # type: ignore[assignment]  # likewise
    codec: Optional[CodecOrAuto] = "auto"

    def __post_init__(self) -> None:
        if self.mode == "local":  # of it nothing is open
            self.split_layer = None if is_auto(self.split_layer) else self.split_layer
            self.split_rank = CutOptions.split_rank if is_auto(self.split_rank) else self.split_rank
            self.codec = None if self.codec == "auto" else self.codec
        super().__post_init__()


def default_codec(mode: str, wire_dtype: Optional[str]) -> Optional[Codec]:
    """Of activations; None is what `wire_dtype` is."""
    return "int8" if mode in ("sft", "frozen") and wire_dtype is None else None


def check_codecs(codec: Optional[str], gradient_codec: Optional[GradientCodec], mode: str, freeze_edge: bool) -> None:
    """Raises UsageError for one that nothing would be written in, or that is not for this cut."""
    if codec == "fitted" and not (mode in ("sl", "frozen") and freeze_edge):
        raise UsageError(
            "--codec fitted needs --mode frozen, or sl with --freeze-edge: it is fitted to activations that stay as "
            "they are; choose that, or int8"
        )
    if gradient_codec is not None and freeze_edge:
        raise UsageError("--gradient-codec says nothing with --freeze-edge, where no gradient comes: leave it out")
