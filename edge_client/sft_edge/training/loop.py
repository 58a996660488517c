"""The training loop: an ordinary PyTorch loop over a system, whichever of the three it is."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from itertools import count, islice
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sized, Tuple

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler

from sft.batch import Batch
from sft.errors import CloudMemoryError, NonFiniteLossError
from sft.models.seeding import derive_seed
from sft.optim.gradients import clip_scale
from sft.wire.ledger import Traffic
from sft_edge.link import Left
from sft_edge.options import RunOptions
from sft_edge.signals import interrupts_deferred, note_termination_in_worker
from sft_edge.systems import System
from sft_edge.tasks import Feature, Task
from sft_edge.training.ahead import MEMORY_TRIES, StepsAhead, send
from sft_edge.training.progress import Progress
from sft_edge.training.report import TrainerState

Evaluate = Callable[[int], Dict[str, float]]
"""Takes the number of steps done, gives `eval_*` figures."""


class TrainingLoop:
    """Takes the steps of a run and keeps its history."""

    def __init__(
        self,
        system: System,
        task: Task,
        features: List[Feature],
        options: RunOptions,
        progress: Progress,
        evaluate: Optional[Evaluate] = None,
        report: Optional[Callable[[int, Dict[str, Any]], None]] = None,
        after_step: Callable[[TrainingLoop], None] = lambda loop: None,
        pauses_after: Callable[[int], bool] = lambda steps: False,
        ask: Callable[[int], None] = lambda steps: None,
    ) -> None:
        """`evaluate` runs as `--eval-strategy` says; `report` gets every entry of the history and its step.

        `after_step` is called when all of a step has been noted, but the evaluation of an epoch that ends with it: then
        `saved_state` is that of a run which goes on from there. Where steps are sent ahead it is called when none is on
        its way, as at the latest after so many steps as `pauses_after` is asked about. `ask` sends what `evaluate`
        does.
        """
        training, optimizer = options.training, options.optimizer
        self.system = system
        self.main_metric = f"eval_{task.main_metric}"
        self.seconds = 0.0
        """Of training, waiting for data included, evaluation left out."""
        self._since = time.perf_counter()
        self._order = torch.Generator()
        self._rows = _Rows(features, training.per_device_train_batch_size, self._order)
        self._loader: DataLoader[Any] = DataLoader(
            features,  # type: ignore[arg-type]  # a list is a map-style dataset
            batch_sampler=self._rows,
            generator=self._order,
            collate_fn=task.collate,
            num_workers=options.data.dataloader_num_workers,
            worker_init_fn=note_termination_in_worker,
        )
        self._training = training
        self._max_grad_norm = optimizer.max_grad_norm
        self._progress = progress
        self._evaluate = evaluate
        self._report = report
        self._after = after_step
        self._pauses_after = pauses_after
        self._ask = ask
        self._ahead = StepsAhead(system, optimizer.max_grad_norm)
        self.steps_per_epoch = math.ceil(len(self._loader) / training.gradient_accumulation_steps)
        by_epochs = math.ceil(training.num_train_epochs * self.steps_per_epoch)
        max_steps = training.max_steps if training.max_steps > 0 else by_epochs
        self.state = TrainerState(
            max_steps=max_steps,
            num_train_epochs=max_steps / self.steps_per_epoch,
            train_batch_size=training.per_device_train_batch_size,
            logging_steps=options.logging.logging_steps,
        )
        self._scheduler = optimizer.scheduler(system.optimizer, max_steps)
        self._losses = _Mean()
        self._all_losses = _Mean()

    @property
    def train_loss(self) -> float:
        """Mean over the steps taken."""
        return self._all_losses.value

    def run(self) -> None:
        """Takes every step that is left. Raises NonFiniteLossError, before the step in question is taken."""
        self._progress.start(self.state.max_steps, self.state.global_step)
        self._since = time.perf_counter()
        if self.state.global_step == self.state.max_steps:
            return
        if self.state.global_step and self.system.keeps_activations:
            self._prepare()
        for groups in self._epochs():
            for group in groups:
                self._advance(group)
                if self.state.global_step == self.state.max_steps:
                    return
            if self._training.eval_strategy == "epoch":
                self.evaluate()

    def leave(self, announce: Callable[[Left], None]) -> None:
        """Has the cloud take all steps that are left, and answer all evaluations: `run` makes them again and notes what
        came of them, in a loop that goes on from here. `announce` is told before. Raises what it does, and
        CloudMemoryError where the cloud does not take that; the loop is then as it was.
        """
        before = self._scheduler.state_dict()
        try:
            self.system.leave(self._send_rest, announce)
        except BaseException:
            self._scheduler.load_state_dict(before)
            self.take_up_schedule()
            raise

    def _send_rest(self) -> None:
        steps = self.state.global_step
        for groups in self._epochs():
            for group in groups:
                send(self.system, steps, group, self._rates(), self._max_grad_norm)
                self._next_rates()
                steps += 1
                if steps == self.state.max_steps or self._is_evaluated_after(steps):
                    self._ask(steps)
                if steps == self.state.max_steps:
                    return
            if self._training.eval_strategy == "epoch":
                self._ask(steps)

    def _epochs(self) -> Iterator[Iterator[List[Batch]]]:
        """Of each epoch the steps' micro-batches that are left; of that in which the run is there may be none."""
        first_epoch, done = self._position()
        for epoch in count(first_epoch):
            self._order.manual_seed(derive_seed(self._training.seed, "order", epoch))
            self._rows.skip, done = done * self._training.gradient_accumulation_steps, 0
            yield _groups(self._loader, self._training.gradient_accumulation_steps)

    def _rates(self) -> List[float]:
        return [float(group["lr"]) for group in self.system.optimizer.param_groups]

    def _next_rates(self) -> None:
        self.system.optimizer.step()  # nothing here has a gradient, but the scheduler warns of an optimizer that rests
        self._scheduler.step()

    def saved_state(self) -> Dict[str, Any]:
        """What `load_state` takes: numbers and text, which JSON holds as they are (NaN as Python writes it)."""
        return {
            "trainer_state": asdict(self.state),
            "scheduler": self._scheduler.state_dict(),
            "losses": self._losses.saved_state(),
            "all_losses": self._all_losses.saved_state(),
            "seconds": self.seconds,
        }

    def load_state(self, saved: Mapping[str, Any]) -> None:
        """Goes on where a loop over the same rows was. The optimizer's own state is loaded after this, and then
        `take_up_schedule` is for a run of another length.
        """
        for name in ("global_step", "epoch", "best_metric", "log_history"):
            setattr(self.state, name, saved["trainer_state"][name])
        self._scheduler.load_state_dict(saved["scheduler"])
        self._losses, self._all_losses = _Mean(*saved["losses"]), _Mean(*saved["all_losses"])
        self.seconds = saved["seconds"]

    def take_up_schedule(self) -> None:
        """Sets the learning rates of the next step, where those that were loaded are of a run of another length."""
        schedule: Any = self._scheduler  # a LambdaLR, as all that transformers makes and that go by steps
        for group, base, factor in zip(self.system.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas):
            group["lr"] = base * factor(schedule.last_epoch)

    def evaluate(self) -> Dict[str, float]:
        """Evaluates the model as it is now, and notes the result in the history."""
        if self._evaluate is None:
            return {}
        self._progress.status("evaluating")
        results = self._evaluate(self.state.global_step)
        self._progress.status("")
        if self.main_metric in results:
            self.state.record_metric(results[self.main_metric])
        self._log(dict(results))
        self._since = time.perf_counter()
        return results

    def catch_up(self) -> None:
        """Waits for the steps that are on their way, for who ends the run with them. Raises NonFiniteLossError."""
        while self._ahead:
            settled = self._ahead.settle()
            self._count(self._checked(settled.losses, settled.norm))

    def _advance(self, group: List[Batch]) -> None:
        """One step of Algorithm 1, lines 5 to 14, over the micro-batches of the group: taken, or on its way."""
        if not self.system.sends_ahead:
            self._step(group)
            return
        number = self.state.global_step + len(self._ahead)
        self._ahead.send(number, group, self._rates())
        self._next_rates()
        pauses = self._pauses(number + 1)
        while self._ahead and (pauses or self._ahead.is_full):
            sent = self.system.ledger.traffic
            settled = self._ahead.settle()
            self._count(self._checked(settled.losses, settled.norm))
            self._note(settled.rate, settled.norm, sent)

    def _pauses(self, steps: int) -> bool:
        """Whether all so many steps are to be settled before another is sent."""
        ends_epoch = steps % self.steps_per_epoch == 0 and self._training.eval_strategy == "epoch"
        is_last = steps == self.state.max_steps
        return is_last or ends_epoch or self._is_evaluated_after(steps) or self._pauses_after(steps)

    def _step(self, group: List[Batch]) -> None:
        step, sent = self.state.global_step, self.system.ledger.traffic
        rate = float(self.system.optimizer.param_groups[0]["lr"])
        losses = self._losses_of(group, step)
        self._check_finite("loss", sum(losses) / len(losses))
        norm = self.system.gradient_norm()
        loss = self._checked(losses, norm)
        with interrupts_deferred():  # half a step could not be taken back
            self.system.update(step, clip_scale(norm, self._max_grad_norm))
            self._scheduler.step()
            self._count(loss)
        self._note(rate, norm, sent)

    def _checked(self, losses: List[float], norm: float) -> float:
        """The step's loss. Raises NonFiniteLossError, and nothing of later steps is left."""
        loss = sum(losses) / len(losses)
        try:
            self._check_finite("loss", loss)
            self._check_finite("norm of the gradient", norm)
        except NonFiniteLossError:
            self._ahead.forget()
            raise
        return loss

    def _count(self, loss: float) -> None:
        """A step is taken."""
        self.state.global_step += 1
        self._losses.add(loss)
        self._all_losses.add(loss)
        self._last_loss = loss

    def _note(self, rate: float, norm: float, sent: Traffic) -> None:
        """Of a step that is counted; `sent`: all traffic before it."""
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now
        self.state.epoch = round(self.state.global_step / self.steps_per_epoch, 4)
        traffic = self.system.ledger.traffic
        wire_bytes = traffic.bytes_sent + traffic.bytes_received - sent.bytes_sent - sent.bytes_received
        self._progress.step(self.state.global_step, self._last_loss, wire_bytes)
        self._after_step(rate, norm)
        if not self._ahead:
            self._after(self)
        self._since = time.perf_counter()

    def _prepare(self) -> None:
        """What a run that goes on had kept of the first epoch is there again, in the same batches, if it was lost."""
        self._progress.status("looking up the activations of the first epoch; what is lost is computed anew")
        self._order.manual_seed(derive_seed(self._training.seed, "order", 0))
        self._rows.skip = 0
        done = self.state.global_step * self._training.gradient_accumulation_steps
        for batch in islice(self._loader, min(done, len(self._loader))):
            self.system.prepare(batch)
        self._progress.status("")

    def _position(self) -> Tuple[int, int]:
        """The epoch that is being trained on and how many of its steps are done.

        At the end of an epoch that is all of them: it is to be evaluated yet.
        """
        if not self.state.global_step:
            return 0, 0
        epoch, last = divmod(self.state.global_step - 1, self.steps_per_epoch)
        return epoch, last + 1

    def _losses_of(self, group: List[Batch], step: int) -> List[float]:
        """Of each micro-batch. A step that the cloud had no memory for is begun anew, with the same bits."""
        tries_left = MEMORY_TRIES
        while True:
            try:
                return [
                    self.system.forward_backward(batch, step, micro_batch, 1 / len(group))
                    for micro_batch, batch in enumerate(group)
                ]
            except CloudMemoryError:
                self.system.undo()
                tries_left -= 1
                if not tries_left:
                    raise

    def _after_step(self, rate: float, norm: float) -> None:
        step, is_last = self.state.global_step, self.state.global_step == self.state.max_steps
        if step % self.state.logging_steps == 0 or is_last:
            self._log({"loss": self._losses.value, "learning_rate": rate, "grad_norm": norm}, quiet=True)
            self._losses = _Mean()
        if self._is_evaluated_after(step):
            self.evaluate()

    @property
    def evaluates_next(self) -> bool:
        """Whether an evaluation is made before the run is between two steps again."""
        steps = self.state.global_step
        ended_epoch = steps > 0 and steps % self.steps_per_epoch == 0
        return (ended_epoch and self._training.eval_strategy == "epoch") or self._is_evaluated_after(steps + 1)

    def evaluations_in(self, steps: int) -> int:
        """How many are made in so many steps, but that at the end of the run."""
        if self._training.eval_strategy == "no":
            return 0
        by_steps = self._training.eval_strategy == "steps"
        every = self._training.eval_steps or self.state.logging_steps if by_steps else self.steps_per_epoch
        return (steps - (steps == self.state.max_steps)) // every

    def _is_evaluated_after(self, step: int) -> bool:
        every = self._training.eval_steps or self.state.logging_steps
        return self._training.eval_strategy == "steps" and step % every == 0 and step != self.state.max_steps

    def _log(self, values: Dict[str, Any], quiet: bool = False) -> None:
        entry = self.state.log(values)
        if self._report is not None:
            self._report(self.state.global_step, entry)
        if not quiet:
            self._progress.log(entry)

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"the {what} is {value} at step {self.state.global_step + 1}; "
                "a lower --learning-rate or a longer warm-up may help"
            )


class _Rows(Sampler):  # type: ignore[type-arg]  # torch 2.1's does not say of what
    """Which rows are in which batch: all of them once, in an order drawn from the generator.

    Its length is that of a whole epoch. What is skipped is drawn, but nobody prepares it.
    """

    def __init__(self, features: Sized, batch_size: int, order: torch.Generator) -> None:
        self.skip = 0
        self._batches = BatchSampler(RandomSampler(features, generator=order), batch_size, drop_last=False)

    def __iter__(self) -> Iterator[List[int]]:
        return islice(iter(self._batches), self.skip, None)

    def __len__(self) -> int:
        return len(self._batches)


class _Mean:
    def __init__(self, total: float = 0.0, count: int = 0) -> None:
        self._sum, self._count = total, count

    def saved_state(self) -> List[float]:
        return [self._sum, self._count]

    def add(self, value: float) -> None:
        self._sum, self._count = self._sum + value, self._count + 1

    @property
    def value(self) -> float:
        return self._sum / self._count if self._count else math.nan


def _groups(batches: Iterable[Batch], size: int) -> Iterator[List[Batch]]:
    iterator = iter(batches)
    while True:
        group = list(islice(iterator, size))
        if not group:
            return
        yield group
