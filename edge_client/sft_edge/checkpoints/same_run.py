"""What two attempts at a run must have in common, or the second could not end with the bits of the first."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Dict, Mapping, Sequence

from sft.cli.options import flag
from sft.errors import SFTError, UsageError
from sft.models.checked_config import other_setting
from sft.models.configuration import settings_of
from sft_edge.files import json_text
from sft_edge.model_files import Source
from sft_edge.options import DataOptions, RunOptions, TrainingOptions
from sft_edge.tasks import Feature

_FREE = {
    # Options that neither weights nor losses depend on; of the others all must be the same.
    DataOptions: {"data_dir", "max_eval_samples", "dataloader_num_workers"},
    TrainingOptions: {
        "output_dir",
        "overwrite_output_dir",
        "per_device_eval_batch_size",
        "eval_strategy",
        "eval_steps",
        "device",
        "save_steps",
        "save_total_limit",
        "resume_from_checkpoint",
        "detach",
    },
}

_LENGTH = ("--num-train-epochs", "--max-steps")
"""How long the run is to be may differ, which is told: learning rates are those of the length that is asked for now."""

_FLOATS, _CODEC = "--wire-dtype", "--codec"

_BEFORE = {
    _CODEC: str(None),
    "--gradient-codec": str(None),
    "--activations": "resend",
    "--factor-learning-rate": str(None),
}
"""What options would have been in checkpoints of releases that did not have them."""

MODEL, ROWS = "--model", "the training rows, or their tokens"
"""What is compared beside options."""

SETTINGS = "config.json"
"""What the model's says. Checkpoints of before have MODEL alone, which each release of transformers has differently."""


def likeness(options: RunOptions, source: Source, features: Sequence[Feature]) -> Dict[str, str]:
    """By name of the option; the values are text to be compared and shown."""
    found = {"--labels": str(options.link.labels)}
    for group in (options.cut, options.data, options.training, options.optimizer, options.lora):
        free = _FREE.get(type(group), set())
        for field in fields(group):
            if field.name not in free:
                value = getattr(group, field.name)
                found[flag(field.name)] = " ".join(json_text(value).split()) if isinstance(value, dict) else str(value)
    # However it was said: a default of one release may be another in the next.
    found[_FLOATS] = options.cut.wire_dtype or "float32"
    found[_CODEC] = options.cut.codec or found[_FLOATS]
    # The name of a model may change with its place; what it starts from is in the checkpoint.
    found[MODEL] = f"the model with {_shape_of(source)}"
    found[SETTINGS] = json.dumps(settings_of(source.values), sort_keys=True)
    found[ROWS] = _hash_of(features)
    return found


def check_same_run(now: Mapping[str, str], then: Mapping[str, str], directory: Path) -> None:
    """Raises UsageError, which names the first option that is another than it was."""
    skipped = {*_LENGTH, MODEL if SETTINGS in then else SETTINGS}
    for name in (*now, *sorted(then.keys() - now.keys())):
        theirs, ours = then.get(name, _BEFORE.get(name)), now.get(name)
        if name == _CODEC and theirs == str(None):  # before: what the other says
            theirs = then.get(_FLOATS)
        if theirs == ours or name in skipped:
            continue
        if name == SETTINGS:
            _check_settings(str(theirs), str(ours), directory)
            continue
        if name == MODEL:
            raise UsageError(
                f"{directory}: --model has another configuration than it was trained with, or transformers another "
                "release; go on with those of then"
            )
        if name == ROWS:
            raise UsageError(
                f"{directory}: {name} are others than those it was trained with; it cannot go on with these"
            )
        raise UsageError(
            f"{directory} was trained with {name} {theirs}, now it is {ours}: give the same, or begin anew without "
            "--resume-from-checkpoint"
        )


def check_length(taken: int, max_steps: int, directory: Path) -> None:
    """Raises UsageError where more steps are taken than the run is to have."""
    if taken > max_steps:
        raise UsageError(
            f"{directory}: {taken} steps are taken, and --max-steps or --num-train-epochs ask for {max_steps}: name an "
            "older checkpoint, or more steps"
        )


def _check_settings(theirs: str, ours: str, directory: Path) -> None:
    try:
        name = other_setting(json.loads(theirs), json.loads(ours))
    except (ValueError, KeyError, TypeError, SFTError) as error:
        raise UsageError(f"{directory}: --model cannot be compared with what it was trained with ({error})") from error
    if name:
        raise UsageError(
            f"{directory}: --model has another {name} in config.json than it was trained with; it cannot go on "
            "with this one"
        )


def _shape_of(source: Source) -> str:
    """Of all that the library's object prints, its defaults included, as releases before compared it."""
    config = source.config
    if source.values:
        config = type(config).from_dict(dict(source.values), **source.overrides)
    kept = {name: value for name, value in settings_of(config.to_dict()).items() if name != "auto_map"}
    return hashlib.sha256(json_text(dict(sorted(kept.items()))).encode()).hexdigest()


def _hash_of(features: Sequence[Feature]) -> str:
    digest = hashlib.sha256()
    for feature in features:
        digest.update(repr((feature.row, feature.label, feature.span, sorted(feature.padding.items()))).encode())
        for name, ids in sorted(feature.inputs.items()):
            digest.update(f"{name} {ids.dtype} {ids.shape}".encode())
            digest.update(ids.tobytes())
    return digest.hexdigest()
