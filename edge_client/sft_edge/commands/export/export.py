"""`sft-edge export`: a trained model as a directory that transformers opens where this package is not installed."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Iterator, List, Optional

from sft.errors import StorageError, VerificationError
from sft.files.temporary import TemporaryDirectory
from sft_edge.commands.export.card import export_card
from sft_edge.commands.export.check import Question, ask_elsewhere, ask_here, largest_difference, texts_for
from sft_edge.commands.export.content import Export
from sft_edge.files import check_room, json_text, storage_errors, write_file
from sft_edge.model_files import DENSE, FACTORED, load_model
from sft_edge.options import ExportOptions

TOLERANCES = {DENSE: 1e-4, FACTORED: 1e-5}
"""The largest difference of a logit; a product of three matrices is rounded otherwise than their effects are."""


@dataclass
class Report:
    """What was exported, and how well."""

    directory: str
    architecture: str
    opened_with: str
    """one of transformers' classes"""
    form: Optional[str]
    """"dense" or "factored"; None where no layer was decomposed"""
    trust_remote_code: bool
    """whether code travels along"""
    weight_bytes: int
    logits_compared: int
    max_logit_difference: float
    tolerance: float


def export(options: ExportOptions) -> None:
    """Exports, checks and prints the report.

    Raises CheckpointError, UsageError, StorageError, and VerificationError when the exported model says something else
    than the trained one; then, and when it is interrupted, nothing is left behind.
    """
    report = _export(options)
    if options.json:
        sys.stdout.write(json_text(asdict(report)))
        return
    form = "" if report.form is None else f", {report.form}"
    trust = ", trust_remote_code=True" if report.trust_remote_code else ""
    sys.stdout.write(
        f"{report.architecture}{form}, {report.weight_bytes:,} bytes of weights\n"
        f"largest difference of {report.logits_compared:,} logits from the trained model's, asked in a process without "
        f"this package: {report.max_logit_difference:.2g}\n"
        f"exported to {report.directory}; open it with transformers:\n"
        f"  {report.opened_with}.from_pretrained({report.directory!r}{trust})\n"
    )


def _export(options: ExportOptions) -> Report:
    exported = Export(load_model(options.model), FACTORED if options.factored else DENSE)
    check_room("--to", options.to, exported.size())
    with _whole_or_not_at_all(options.to) as directory:
        exported.write(directory)
        write_file(directory / "README.md", [export_card(exported).encode("utf-8")])
        report = Report(
            directory=str(options.to),
            architecture=exported.architecture,
            opened_with=exported.auto_class,
            form=exported.form,
            trust_remote_code=exported.has_code,
            weight_bytes=exported.size(),
            logits_compared=0,
            max_logit_difference=0.0,
            tolerance=TOLERANCES[exported.form or DENSE],
        )
        texts = texts_for(exported.description)
        del exported  # the other process holds the model, too: not both at once
        _compare(report, directory, options.model, texts)
    return report


def _compare(report: Report, directory: Path, model: Path, texts: List[List[str]]) -> None:
    (answer,) = ask_elsewhere([Question(directory, report.opened_with, report.trust_remote_code, texts)])
    expected = ask_here(load_model(model), texts)
    report.logits_compared = sum(x.numel() for x in expected.logits)
    report.max_logit_difference = largest_difference(expected, answer)
    if not math.isfinite(report.max_logit_difference):
        raise VerificationError(
            f"nothing was exported: logits are not finite, so they cannot be compared; the weights in {model} are not "
            "finite, or too large"
        )
    if report.max_logit_difference > report.tolerance:
        instead = "; --factored rounds nothing" if report.form == DENSE else ""
        raise VerificationError(
            f"nothing was exported: a logit differs from the trained model's by {report.max_logit_difference:.3g}, "
            f"over {report.tolerance:g}{instead}"
        )
    if not answer.base_difference <= report.tolerance:  # NaN is no less
        raise VerificationError(
            "nothing was exported: a hidden state of the base model, as AutoModel opens it, differs from that inside "
            f"{report.architecture} by {answer.base_difference:.3g}, over {report.tolerance:g}"
        )


@contextlib.contextmanager
def _whole_or_not_at_all(to: Path) -> Iterator[Path]:
    """An empty directory whose content is moved into `to` at the end of the block, or is gone when the block fails."""
    made = [path for path in (to, *to.parents) if not path.exists()]
    inside = str(to)
    try:
        with storage_errors(to):
            to.mkdir(parents=True, exist_ok=True)
            aside = TemporaryDirectory(".sft-aside-", to)
        with aside:
            directory = Path(aside.name) / "export"
            inside = str(directory)
            with storage_errors(to):
                directory.mkdir()
            yield directory
            _move(directory, to)
    except BaseException as error:
        for path in made:
            with contextlib.suppress(OSError):  # it is not there, or somebody else has written into it
                path.rmdir()
        if isinstance(error, StorageError):
            raise StorageError(str(error).replace(inside, str(to)).replace("--output-dir", "--to")) from error
        raise


def _move(directory: Path, to: Path) -> None:
    moved = []
    try:
        # The configuration last: without it a directory is no model.
        for path in sorted(directory.iterdir(), key=lambda path: path.name == "config.json"):
            moved.append(to / path.name)
            with storage_errors(to):
                os.replace(str(path), str(moved[-1]))
    except BaseException:  # Ctrl-C too
        for path in moved:
            path.unlink(missing_ok=True)
        raise
