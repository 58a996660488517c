"""Trains plain split learning and split fine-tuning through a link of limited bandwidth, and prints both side by side.

The topology of docker-compose.yml without containers: `sft-cloud serve` in one network namespace, `sft-edge train` in
another, a veth pair between them, tc's token bucket filter at both ends. Needs root and iproute2.

    make emulate RATE=10mbit
    make emulate RATE=10mbit ARGS="--task sst2 --data-dir DIR --split-layer 3 --max-steps 100"

What this program does not know is passed on to `sft-edge train`, and wins over what it passes itself. Without --task or
--data-dir it trains MiniLM on the synthetic data of the demo.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from runs import BIN, train
from shaped_link import CLOUD_HOST, ShapedLink

from sft.errors import SFTError
from sft.printable import format_bytes
from sft_edge.systems.cloud_process import CloudProcess
from sft_edge.tasks.synthetic import write_synthetic

MODES = ("sl", "sft")
DEFAULTS = (
    "--model=minilm",
    "--task=sst2",
    "--split-layer=5",
    "--split-rank=8",
    "--per-device-train-batch-size=32",
    "--max-steps=30",
    "--learning-rate=5e-5",
    "--logging-steps=10",
    "--seed=0",
)
BESIDE_THE_METRICS = ("eval_runtime", "eval_samples", "eval_wire")


def main() -> int:
    """Returns the exit code: that of the class of the error, or of the command that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="100mbit", help="bandwidth of the link, each way, in tc's units")
    parser.add_argument("--output-dir", type=Path, default=Path("output/emulate"), help="where both runs write")
    options, passed_on = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the namespaces are deleted
    try:
        compare(options.rate, options.output_dir, passed_on)
    except SFTError as error:
        print(f"emulate: {error}", file=sys.stderr)
        return error.exit_code
    except subprocess.CalledProcessError as error:
        return error.returncode  # sft-edge has said why
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def compare(rate: str, output_dir: Path, passed_on: list[str]) -> None:
    """Both modes with the same flags through the same link and the same cloud, one after the other."""
    flags = [*DEFAULTS, *passed_on]
    with ShapedLink(rate) as link:
        if not any(flag.split("=")[0] == "--data-dir" for flag in passed_on):
            write_synthetic(output_dir / "data")
            flags.append(f"--data-dir={output_dir / 'data'}")
        up, down = link.measure()
        print(f"link of {rate}: {up / 1e6:.1f} Mbit/s measured from edge to cloud, {down / 1e6:.1f} back", flush=True)
        serve = [str(BIN / "sft-cloud"), "serve", "--host", CLOUD_HOST, "--port", "0", "--exit-with-stdin"]
        serve.append("--insecure")  # nobody else is on this network
        with CloudProcess(command=link.on_cloud(serve)) as cloud:
            results = []
            for mode in MODES:
                print(f"training, mode {mode}", flush=True)
                own = [f"--mode={mode}", f"--server={cloud.address}", "--tls=false"]
                results.append(train([*flags, *own], output_dir / mode, link.on_edge([])))
    print_table(results)


def print_table(results: list[dict[str, Any]]) -> None:
    """A column for each mode."""
    rows = {"": [run["mode"] for run in results]}
    steps = [run["train_steps"] for run in results]
    rows["steps"] = [str(count) for count in steps]
    bytes_each = [run["wire_bytes_sent"] + run["wire_bytes_received"] for run in results]
    rows["bytes/step"] = [format_bytes(total / count) for total, count in zip(bytes_each, steps, strict=True)]
    rows["seconds/step"] = [f"{run['train_runtime'] / run['train_steps']:.3f}" for run in results]
    rows["of them, the link"] = [f"{run['uplink_wait_seconds'] / run['train_steps']:.3f}" for run in results]
    rows["reduction"] = [f"{run['wire_reduction']:.1f}" for run in results]
    for name in results[0]:
        if name.startswith("eval_") and not name.startswith(BESIDE_THE_METRICS):
            rows[name] = [f"{run[name]:.4g}" for run in results]
    for name, cells in rows.items():
        print(f"{name:<18}" + "".join(f"{cell:>12}" for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
