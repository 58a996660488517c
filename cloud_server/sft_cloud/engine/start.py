"""From a server's options to what opens its sessions, and to the engine that has them."""

from __future__ import annotations

import torch

from sft.cli.devices import find_device
from sft.errors import UsageError
from sft.printable import format_bytes
from sft_cloud.engine.in_process import InProcessEngine
from sft_cloud.engine.opener import Opener, TransformersOpener
from sft_cloud.engine.saved_session import Checkpoints
from sft_cloud.engine.weights import WeightsFinder
from sft_cloud.memory import MemoryBudget, process_bytes
from sft_cloud.options import LimitOptions, ServeOptions
from sft_cloud.session import default_budget
from sft_cloud.storage import BlobStore, CheckpointStore, KeptStore, check_writable


def make_opener(options: ServeOptions, limits: LimitOptions) -> TransformersOpener:
    """For any model of the library. Raises UsageError for a device that is not here, StorageError."""
    device, blobs = find_device(options.device), uploads(options, limits)
    check_writable(options.state_dir, "--state-dir")
    # Without a model directory, names are still not looked up as paths: they come from edges.
    weights = WeightsFinder(options.model_dir or options.state_dir / "models", limits.download_models)
    checkpoints = CheckpointStore(options.checkpoint_store or options.state_dir / "checkpoints")
    checkpoints.try_out()  # here somebody reads what is wrong; later, a caller's run would end
    budget = make_budget(limits, device)
    kept = KeptStore(options.state_dir, limits.max_kept_bytes)
    saved = Checkpoints(checkpoints, limits.max_upload_bytes)
    return TransformersOpener(device, blobs, weights, saved, budget, kept, limits.only_torch_optimizers)


_LEAST_BYTES = 64 << 20
"""Beside what the process takes itself, for a small session."""


def make_budget(limits: LimitOptions, device: torch.device) -> MemoryBudget:
    """For all that a server of this process holds for its callers, on the device and in the machine's memory.

    Raises UsageError for a limit that the process takes by itself.
    """
    if device.type == "cuda":
        host = _of_process(default_budget(torch.device("cpu")))
        return MemoryBudget(limits.memory_limit or default_budget(device), host=host)
    if limits.memory_limit is not None:
        import transformers.modeling_utils  # noqa: F401  # 100 MiB that the first session would bring otherwise
    return _of_process(limits.memory_limit or default_budget(device))


def _of_process(limit: int) -> MemoryBudget:
    taken = process_bytes()
    if limit <= taken:
        raise UsageError(
            f"--memory-limit is of the whole process, which takes {format_bytes(taken)} before its first session: it "
            f"has {format_bytes(limit)}; give it at least {taken + _LEAST_BYTES}"
        )
    return MemoryBudget(limit - taken, taken, process_bytes)


def start_engine(options: ServeOptions, opener: Opener) -> InProcessEngine:
    """Each call waits for at most one piece of work, and so does each session whose edge has left, in no call: the
    worker's queue holds whatever is admitted.
    """
    return InProcessEngine(opener, options.max_calls + options.max_sessions, options.threads)


def uploads(options: ServeOptions, limits: LimitOptions) -> BlobStore:
    """What callers have uploaded; the service adds to it, and sessions are made of it."""
    return BlobStore(options.state_dir / "blobs", limits.max_upload_bytes)
