"""The options of the optimizer and its schedule, and what torch and transformers make of them."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Dict, Optional

from sft.cli.options import at_least, flag, parse_scalar
from sft.errors import UsageError

if TYPE_CHECKING:  # the module itself stays light, for the sake of `--help`
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


_OF_TRAINING_ARGUMENTS = {
    "adamw_torch": "AdamW",
    "adamw_torch_fused": "AdamW",
    "sgd": "SGD",
    "adagrad": "Adagrad",
    "rmsprop": "RMSprop",
}
"""The names of transformers' TrainingArguments for what torch.optim has; the others are other packages' or its own."""

_STEPPED_ON_A_METRIC = ("reduce_lr_on_plateau", "greedy")


@dataclass
class OptimizerOptions:
    """The optimizer, the same on both sides."""

    optim: str = "AdamW"
    """a class of torch.optim, or transformers' name of one, such as adamw_torch"""

    optim_args: Optional[str] = None
    """further arguments of that class, such as momentum=0.9,nesterov=true"""

    learning_rate: float = 5e-5
    """the highest learning rate of the schedule"""

    factor_learning_rate: Optional[float] = None
    """the same of u, S and v, the factors of the layer that is decomposed, by default --learning-rate"""

    weight_decay: float = 0.0
    """weight decay, of all but biases and normalization weights"""

    adam_beta1: float = 0.9
    """decay of the mean of gradients, for optimizers with `betas`"""

    adam_beta2: float = 0.999
    """decay of the mean of squared gradients, for optimizers with `betas`"""

    adam_epsilon: float = 1e-8
    """what keeps the division from zero, for optimizers with `betas`"""

    max_grad_norm: float = 1.0
    """the norm over both halves that gradients are clipped to; 0 does not clip"""

    lr_scheduler_type: str = "linear"
    """a schedule of transformers, such as linear, cosine or constant_with_warmup"""

    lr_scheduler_kwargs: Dict[str, Any] = field(default_factory=dict)
    """further arguments of the schedule"""

    warmup_steps: float = 0
    """steps in which the learning rate rises from 0; below 1 their share of all steps"""

    warmup_ratio: float = 0.0
    """the same as --warmup-steps below 1"""

    def __post_init__(self) -> None:
        at_least(self, 0, "learning_rate", "factor_learning_rate", "weight_decay", "max_grad_norm", "warmup_steps")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{flag(name)} must be 0 or more and below 1, not {getattr(self, name)}")
        at_least(self, 0, "adam_epsilon")
        if not 0 <= self.warmup_ratio <= 1:
            raise UsageError(f"--warmup-ratio must be between 0 and 1, not {self.warmup_ratio}")
        if self.warmup_steps and self.warmup_ratio:
            raise UsageError("only one of --warmup-steps and --warmup-ratio may be given")
        if 0 < self.warmup_steps < 1:
            self.warmup_ratio, self.warmup_steps = self.warmup_steps, 0
        self.warmup_steps = int(self.warmup_steps)
        self.optim = _OF_TRAINING_ARGUMENTS.get(self.optim, self.optim)
        self.arguments()
        self._check_schedule()

    def arguments(self) -> Dict[str, Any]:
        """What the class `optim` is made with besides the parameters: numbers, flags, text, and `betas` as a tuple.

        Raises UsageError for a class that torch.optim does not have or that cannot train here, and for arguments it
        does not take.
        """
        from sft.optim.spec import optimizer_class

        try:
            chosen = optimizer_class(self.optim)
        except UsageError as error:
            raise UsageError(f"--optim: {error}") from error
        if self.optim != chosen.__name__:
            raise UsageError(f"--optim: torch.optim has no optimizer {self.optim!r}; it has {chosen.__name__}")
        taken = set(inspect.signature(chosen).parameters) - {"params"}
        arguments: Dict[str, Any] = {"lr": self.learning_rate}
        if "weight_decay" in taken:
            arguments["weight_decay"] = self.weight_decay
        elif self.weight_decay:
            raise UsageError(f"--optim {self.optim} has no --weight-decay")
        if "betas" in taken:
            arguments["betas"] = (self.adam_beta1, self.adam_beta2)
            if "eps" in taken:
                arguments["eps"] = self.adam_epsilon
        extra = self._extra_arguments()
        for name in extra:
            if name in arguments:
                raise UsageError(f"--optim-args: {name} has an option of its own")
            if name not in taken:
                raise UsageError(f"--optim-args: {self.optim} takes no {name!r}; it takes {', '.join(sorted(taken))}")
        return {**arguments, **extra}

    def scheduler(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """The schedule over `total_steps`, to be stepped once a step. Warm-up is rounded up, as transformers does."""
        from transformers import get_scheduler

        scheduler: LRScheduler = get_scheduler(
            self.lr_scheduler_type,
            optimizer,
            num_warmup_steps=int(self.warmup_steps) or math.ceil(total_steps * self.warmup_ratio),
            num_training_steps=total_steps,
            scheduler_specific_kwargs=dict(self.lr_scheduler_kwargs),
        )
        return scheduler

    def _extra_arguments(self) -> Dict[str, Any]:
        """`optim_args` taken apart."""
        arguments: Dict[str, Any] = {}
        for part in filter(None, (part.strip() for part in (self.optim_args or "").split(","))):
            name, _, value = (piece.strip() for piece in part.partition("="))
            if not (name and value):
                raise UsageError(f"--optim-args: {part!r} is not of the form name=value")
            arguments[name] = parse_scalar(value)
        return arguments

    def _check_schedule(self) -> None:
        import torch
        from transformers.trainer_utils import SchedulerType

        names = [kind.value for kind in SchedulerType if kind.value not in _STEPPED_ON_A_METRIC]
        if self.lr_scheduler_type not in names:
            raise UsageError(f"--lr-scheduler-type {self.lr_scheduler_type!r} is none of {', '.join(names)}")
        try:
            self.scheduler(torch.optim.SGD([torch.zeros(1)], lr=self.learning_rate), total_steps=100)
        except (TypeError, ValueError) as error:
            raise UsageError(f"--lr-scheduler-kwargs do not suit {self.lr_scheduler_type}: {error}") from error
