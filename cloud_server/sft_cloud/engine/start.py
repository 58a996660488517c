"""From a server's options to what opens its sessions, and to the engine that has them."""

from __future__ import annotations

from sft.cli.devices import find_device
from sft_cloud.engine.in_process import InProcessEngine
from sft_cloud.engine.opener import Opener, TransformersOpener
from sft_cloud.engine.saved_session import Checkpoints
from sft_cloud.engine.weights import WeightsFinder
from sft_cloud.options import LimitOptions, ServeOptions
from sft_cloud.session import MemoryBudget, default_budget
from sft_cloud.storage import BlobStore, CheckpointStore


def make_opener(options: ServeOptions, limits: LimitOptions) -> TransformersOpener:
    """For any model of the library. Raises UsageError for a device that is not here, StorageError."""
    device, blobs = find_device(options.device), uploads(options, limits)
    # Without a model directory, names are still not looked up as paths: they come from edges.
    weights = WeightsFinder(options.model_dir or options.state_dir / "models", limits.download_models)
    checkpoints = CheckpointStore(options.checkpoint_store or options.state_dir / "checkpoints")
    budget = MemoryBudget(limits.memory_limit or default_budget(device))
    return TransformersOpener(device, blobs, weights, Checkpoints(checkpoints, limits.max_upload_bytes), budget)


def start_engine(options: ServeOptions, opener: Opener) -> InProcessEngine:
    """Each call waits for at most one piece of work, so the worker's queue holds whatever is admitted."""
    return InProcessEngine(opener, options.max_calls, options.threads)


def uploads(options: ServeOptions, limits: LimitOptions) -> BlobStore:
    """What callers have uploaded; the service adds to it, and sessions are made of it."""
    return BlobStore(options.state_dir / "blobs", limits.max_upload_bytes)
