"""`sft-edge verify`: split training over a real connection computes what one process computes.

The reference is written as anyone would write it, without this project's loop, link or systems: the cut model in one
piece, `loss.backward()`, clipping, `optimizer.step()`. Both start from the same seed, on the CPU, in float32, dropout
off, and see the same batches. After every step their losses and all their parameters are compared.
"""

from __future__ import annotations

import math
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Dict, Iterator, List, Optional, Union

import torch
from safetensors.torch import load
from torch import Tensor
from transformers import BertConfig, PretrainedConfig

from sft.batch import IGNORED, Batch, attention_mask
from sft.errors import UsageError, VerificationError
from sft.models import HEADS, Cut, max_positions
from sft.models.seeding import derive_seed
from sft.optim.gradients import clip_scale
from sft.wire.codec.elements import codecs_named
from sft.wire.codec.messages import outputs_of
from sft_edge.commands.verify.one_process import OneProcess
from sft_edge.files import json_text
from sft_edge.link import retry_policy_of, transport_of
from sft_edge.model_files import Source, open_model
from sft_edge.options import LinkOptions, OptimizerOptions, VerifyOptions
from sft_edge.systems import CloudProcess, System, halve, open_split_system

_CPU = torch.device("cpu")


@dataclass
class Report:
    """What was found."""

    mode: str
    split_layer: int
    split_rank: Optional[int]
    steps: int
    max_loss_difference: float
    max_parameter_difference: float
    """over every parameter of both halves, after every step"""
    parameters_compared: int
    """numbers, not tensors"""
    first_step_over_tolerance: Optional[int]
    """counted from 1; None when no difference exceeded the tolerance"""
    tolerance: float
    first_loss: float
    last_loss: float

    @property
    def passed(self) -> bool:
        """Whether no difference exceeded the tolerance."""
        return self.first_step_over_tolerance is None


def verify_and_report(options: VerifyOptions, optimizer: OptimizerOptions, link: LinkOptions) -> None:
    """Prints what `verify` finds. Raises VerificationError when a difference exceeds the tolerance."""
    report = verify(options, optimizer, link)
    if options.json:
        sys.stdout.write(json_text({**asdict(report), "passed": report.passed}))
    else:
        for name, value in asdict(report).items():
            sys.stdout.write(f"{name}: {value}\n")
    if not report.passed:
        raise VerificationError(
            f"split and one-process training differ by {report.max_loss_difference:.3g} in the loss and "
            f"{report.max_parameter_difference:.3g} in a parameter, over {options.tolerance:g} from step "
            f"{report.first_step_over_tolerance} on"
        )


def verify(options: VerifyOptions, optimizer: OptimizerOptions, link: LinkOptions) -> Report:
    """Trains both ways and compares. Sets torch to one thread: sums in another order have other last bits."""
    torch.set_num_threads(1)
    source = _source(options)
    rank = options.split_rank if options.mode == "sft" else 0
    cut = Cut(options.mode, options.split_layer, rank, options.residual)
    calibration = _calibration(options, source.config)
    reference = OneProcess(source, options, cut, optimizer, calibration)
    with ExitStack() as stack:
        address = link.server or stack.enter_context(CloudProcess(["--device", "cpu", "--threads", "1"])).address
        start = halve(
            source,
            options.head,
            cut,
            reference.optimizer_spec,
            options.seed,
            codecs_named("float32", options.codec, options.gradient_codec),
            freeze_edge=options.freeze_edge,
            calibration=calibration,
        )
        transport, policy = transport_of(address, link), retry_policy_of(link)
        system = open_split_system(start, _CPU, transport, policy, labels=link.labels)
        stack.enter_context(system.link)
        reference.code_as(system.codecs)
        return _compare(options, cut, optimizer, reference, system)


def _compare(
    options: VerifyOptions, cut: Cut, optimizer: OptimizerOptions, reference: OneProcess, system: System
) -> Report:
    scheduler = optimizer.scheduler(system.optimizer, options.steps)
    worst_loss = worst_parameter = 0.0
    losses, first_over = [], None
    for step in range(options.steps):
        batches = list(_batches(options, reference.config, step))
        expected = reference.step(batches)
        loss = _split_step(system, batches, step, optimizer.max_grad_norm)
        scheduler.step()
        losses.append(loss)
        loss_difference = abs(loss - expected)
        parameter_difference = _difference(reference.parameters(), _parameters(system))
        # NaN compares false: written so that it counts as a difference.
        if not (loss_difference <= options.tolerance and parameter_difference <= options.tolerance):
            first_over = first_over or step + 1
        worst_loss = _worse(worst_loss, loss_difference)
        worst_parameter = _worse(worst_parameter, parameter_difference)
    return Report(
        mode=options.mode,
        split_layer=cut.split_layer,
        split_rank=cut.split_rank or None,
        steps=options.steps,
        max_loss_difference=worst_loss,
        max_parameter_difference=worst_parameter,
        parameters_compared=sum(x.numel() for x in reference.parameters().values()),
        first_step_over_tolerance=first_over,
        tolerance=options.tolerance,
        first_loss=losses[0],
        last_loss=losses[-1],
    )


def _split_step(system: System, batches: List[Batch], step: int, max_grad_norm: float) -> float:
    losses = [system.forward_backward(batch, step, index, 1 / len(batches)) for index, batch in enumerate(batches)]
    system.update(step, clip_scale(system.gradient_norm(), max_grad_norm))
    return sum(losses) / len(losses)


def _parameters(system: System) -> Dict[str, Tensor]:
    return {name: x for shard in system.shards() for name, x in load(b"".join(shard.chunks)).items()}


def _difference(expected: Dict[str, Tensor], actual: Dict[str, Tensor]) -> float:
    if expected.keys() != actual.keys():
        odd = sorted(expected.keys() ^ actual.keys())[0]
        raise VerificationError(f"parameter '{odd}' is on one side only")
    differences = [(actual[name] - x).abs().max() for name, x in expected.items()]
    return float(torch.stack(differences).max())


def _worse(a: float, b: float) -> float:
    return a if math.isnan(a) or b <= a else b


def _source(options: VerifyOptions) -> Source:
    labels = 1 if options.problem_type == "regression" and options.head == "sequence-classification" else 3
    overrides: Dict[str, Any] = {"num_labels": labels, "problem_type": options.problem_type}
    if options.head == "question-answering":
        overrides = {"num_labels": 2}
    elif options.head == "token-classification":
        overrides = {"num_labels": 3}
    elif options.head != "sequence-classification":
        overrides = {}
    if options.model is not None or options.from_config is not None:
        source = open_model(options.model, options.from_config, overrides)
    else:
        config = BertConfig(
            vocab_size=1000,  # the table is most of such a model, and says least about the cut
            hidden_size=384,
            num_hidden_layers=6,
            num_attention_heads=12,
            intermediate_size=1536,
            **overrides,
        )
        source = Source("", config, None)
    _switch_dropout_off(source.config)
    if options.max_seq_length > max_positions(source.config):
        raise UsageError(f"--max-seq-length must be at most {max_positions(source.config)} for this model")
    return source


def _switch_dropout_off(config: PretrainedConfig) -> None:
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):  # GPT-2 has resid_pdrop, OPT layerdrop
            setattr(config, name, 0.0)
    config.classifier_dropout = 0.0  # some of the library's heads have one that no configuration declares


def _calibration(options: VerifyOptions, config: PretrainedConfig) -> List[Batch]:
    """What a low-rank residual, or a codec, is fitted to; nothing where there is none."""
    is_fitted = options.residual == "low-rank" or options.codec == "fitted"
    return list(_batches(options, config, "calibration")) if is_fitted else []


def _batches(options: VerifyOptions, config: PretrainedConfig, step: Union[int, str]) -> Iterator[Batch]:
    """Random tokens, lengths and labels of one step, the same for the same seed."""
    generator = torch.Generator().manual_seed(derive_seed(options.seed, "batches", step))
    B = options.per_device_train_batch_size
    for _ in range(options.gradient_accumulation_steps):
        lengths = torch.randint(1, options.max_seq_length + 1, (B,), generator=generator).tolist()
        S = max(lengths)
        ids_BS = torch.randint(4, config.vocab_size, (B, S), generator=generator)
        for row, length in enumerate(lengths):
            ids_BS[row, length:] = config.pad_token_id or 0
        if HEADS[options.head].learns == "tokens":
            labels = {"labels": _of_tokens(ids_BS % outputs_of(config, options.head), lengths, generator)}
        else:
            labels = _labels(options, config, lengths, generator)
        yield Batch({"input_ids": ids_BS}, lengths, labels)


def _of_tokens(y_BS: Tensor, lengths: List[int], generator: torch.Generator) -> Tensor:
    """A number for each token, some of which are not to be learned; padding is not."""
    mask_BS = attention_mask(lengths, y_BS.shape[1]).bool()
    learned_BS = mask_BS & (torch.rand(y_BS.shape, generator=generator) < 0.8)
    learned_BS[max(range(len(lengths)), key=lengths.__getitem__), 1:] = True  # of the longest, or there is no loss
    return y_BS.masked_fill(~learned_BS, IGNORED)


def _labels(
    options: VerifyOptions, config: PretrainedConfig, lengths: List[int], generator: torch.Generator
) -> Dict[str, Tensor]:
    B, C = len(lengths), int(config.num_labels or 1)
    if options.head == "question-answering":
        pairs = [sorted(torch.randint(length, (2,), generator=generator).tolist()) for length in lengths]
        return {
            "start_positions": torch.tensor([start for start, _ in pairs]),
            "end_positions": torch.tensor([end for _, end in pairs]),
        }
    if options.head == "multiple-choice":
        choices = 2 if B % 2 == 0 else B
        return {"labels": torch.randint(choices, (B // choices,), generator=generator)}
    if options.problem_type == "regression":
        return {"labels": torch.rand(B, generator=generator) * 5}
    if options.problem_type == "multi_label_classification":
        return {"labels": torch.randint(2, (B, C), generator=generator).float()}
    return {"labels": torch.randint(C, (B,), generator=generator)}
