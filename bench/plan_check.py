"""Holds what `sft-edge plan` says of a step against what training takes, through a link of limited bandwidth.

The link is that of `bench/emulate.py`: two network namespaces, tc's token bucket at both ends; needs root and iproute2.
Edge and cloud have a processor core each. The plan is made once, by the rows that the runs then train on, an epoch of
them each. It prints predicted and measured seconds a step, how far off the prediction is, and whether what it takes for
the fastest of the settings was so.

    python bench/plan_check.py --rate 100mbit --data-dir DIR
    python bench/plan_check.py --settings sft/5/8/int8 frozen/2/0/int8 --steps 5

What this program does not know is passed on to both `sft-edge plan` and `sft-edge train`; of the cut a setting wins
over it: with `--mode frozen --settings frozen/2/0/int8 frozen/4/0/int8` the plan is of a frozen edge alone, which is
quicker. Without --data-dir it takes the synthetic data of the demo.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from runs import BIN, train
from shaped_link import CLOUD_HOST, ShapedLink

from sft.errors import SFTError, UsageError
from sft_edge.systems.cloud_process import CloudProcess
from sft_edge.tasks.synthetic import write_synthetic

BATCH = 32
FLAGS = ("--model=minilm", "--task=sst2", f"--per-device-train-batch-size={BATCH}", "--max-seq-length=64", "--seed=0")
RUN_FLAGS = ("--num-train-epochs=1", "--max-eval-samples=64", "--learning-rate=1e-4")


class Setting(NamedTuple):
    """As plans have it; nothing of it is 0 or empty but where there is none."""

    mode: str
    split_layer: int = 0
    split_rank: int = 0
    codec: str = ""

    @classmethod
    def named(cls, text: str) -> Setting:
        """`sft/5/8/int8`. Raises UsageError for other text."""
        mode, layer, rank, codec = (*text.split("/"), "0", "0", "")[:4]
        try:
            return cls(mode, int(layer), int(rank), codec)
        except ValueError:
            raise UsageError(f"--settings {text}: give mode/block/rank/codec, such as sft/5/8/int8") from None

    def flags(self) -> list[str]:
        """Of `sft-edge train`."""
        flags = [f"--mode={self.mode}"]
        flags += [f"--split-layer={self.split_layer}"] if self.split_layer else []
        flags += [f"--split-rank={self.split_rank}"] if self.split_rank else []
        return [*flags, *([f"--codec={self.codec}"] if self.codec else [])]


SETTINGS = (
    "sft/1/8/int8",
    "sft/3/32/float32",
    "sft/5/8/int8",
    "sl/2/0/int8",
    "sl/5/0/float32",
    "frozen/1/0/int8",
    "frozen/2/0/fitted",
    "frozen/4/0/int4",
)


def main() -> int:
    """Returns the exit code: that of the class of the error, or of the command that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="100mbit", help="bandwidth of the link, each way, in tc's units")
    parser.add_argument("--steps", type=int, default=30, help="of each run")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, help="mode/block/rank/codec")
    parser.add_argument("--data-dir", type=Path)
    options, passed_on = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the namespaces are deleted
    try:
        with tempfile.TemporaryDirectory() as directory:
            settings = [Setting.named(text) for text in options.settings]
            check(settings, options.rate, options.steps, options.data_dir, Path(directory), passed_on)
    except SFTError as error:
        print(f"plan_check: {error}", file=sys.stderr)
        return error.exit_code
    except subprocess.CalledProcessError as error:
        return error.returncode  # sft-edge has said why
    return 0


def check(
    settings: list[Setting], rate: str, steps: int, data_dir: Path | None, directory: Path, passed_on: list[str]
) -> None:
    """Plans, trains and prints. Raises UsageError where there are not two cores, or no link can be made."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise UsageError("edge and cloud need a processor core each")
    if data_dir is None:
        data_dir = directory / "data"
        write_synthetic(data_dir)
    on_edge, on_cloud = (["taskset", "--cpu-list", str(core)] for core in cores[:2])
    serve = [*on_cloud, str(BIN / "sft-cloud"), "serve", "--host", CLOUD_HOST, "--port", "0", "--exit-with-stdin"]
    serve.append("--insecure")  # nobody else is on this network
    with ShapedLink(rate) as link, CloudProcess(command=link.on_cloud(serve)) as cloud:
        flags = [*FLAGS, f"--data-dir={data_dir}", f"--max-train-samples={steps * BATCH}", *passed_on]
        reach = [f"--server={cloud.address}", "--tls=false"]
        plans = planned([*flags, *reach], link.on_edge(on_edge))
        check_planned(settings, plans)
        print(f"{'setting':<24}{'predicted':>12}{'measured':>12}{'off by':>9}", flush=True)
        measured: dict[Setting, float] = {}
        for number, setting in enumerate(settings):
            way = [] if setting.mode == "local" else reach
            own = [*flags, *RUN_FLAGS, *setting.flags(), *way]
            results = train(own, directory / f"out-{number}", link.on_edge(on_edge))
            seconds = measured[setting] = results["train_runtime"] / results["train_steps"]
            off = plans[setting] / seconds - 1
            print(
                f"{'/'.join(map(str, setting)):<24}{plans[setting]:>10.4f} s{seconds:>10.4f} s{off:>9.1%}", flush=True
            )
    errors = [abs(plans[setting] / seconds - 1) for setting, seconds in measured.items()]
    chosen, fastest = min(measured, key=lambda one: plans[one]), min(measured, key=lambda one: measured[one])
    slower = measured[chosen] / measured[fastest] - 1
    print(f"off by {max(errors):.1%} at most, {sum(errors) / len(errors):.1%} on average")
    print(f"fastest by the plan {'/'.join(map(str, chosen))}, which took {slower:.1%} more than the fastest measured")


def check_planned(settings: list[Setting], plans: dict[Setting, float]) -> None:
    """Raises UsageError, before anything is trained, for a setting that is no way to train here."""
    for setting in settings:
        if setting not in plans:
            spelled = "/".join(map(str, setting))
            like = (
                ", ".join("/".join(map(str, one)) for one in plans if one.mode == setting.mode) or "none of that mode"
            )
            raise UsageError(f"--settings {spelled}: the plan has no such way; it has {like}")


def planned(flags: list[str], prefix: list[str]) -> dict[Setting, float]:
    """Seconds of a step of the first epoch, by what `sft-edge plan` says."""
    command = [*prefix, str(BIN / "sft-edge"), "plan", *flags, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found: list[dict[str, Any]] = json.loads(done.stdout)["plans"]
    return {Setting(*(one[name] for name in Setting._fields)): one["step_seconds"] for one in found}


if __name__ == "__main__":
    sys.exit(main())
