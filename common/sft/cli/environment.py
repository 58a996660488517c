"""What a bug report needs to know of a machine, and nothing that says whose it is.

Of a path only its end is told. Of environment variables those whose values are numbers and words are shown; of
others that matter, tokens among them, only that they are set.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import sys
import warnings
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

from sft.printable import format_bytes, printable
from sft.version import __version__

_LIBRARIES = {
    "torch": "torch",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "numpy": "numpy",
    "grpcio": "grpc",
    "protobuf": "google.protobuf",
    "peft": "peft",
}
"""Distributions, and what is imported to see whether each works."""

_SHOWN = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "GRPC_TRACE",
    "HF_HUB_OFFLINE",
    "LANG",
    "LC_ALL",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "PYTHONHASHSEED",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TOKENIZERS_PARALLELISM",
    "TRANSFORMERS_OFFLINE",
)
_NAMED = (
    "HF_HOME",
    "HF_TOKEN",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "PYTHONPATH",
    "SFT_TOKEN",
    "SSL_CERT_FILE",
    "grpc_proxy",
    "http_proxy",
    "https_proxy",
    "no_proxy",
)
_HARMLESS = re.compile(r"[A-Za-z0-9_.,:=-]{0,80}")
"""A number, a word, a list of them; no path and no URL."""

_DIRECTORIES = re.compile(r"(?:\b[A-Za-z]:)?[/\\](?:[^/\\:'\"\n]+[/\\])+")
"""Of a path, all but its end. Names may have spaces in them, so that what stands between two paths goes, too."""

_RELEASES = (Path("/etc/os-release"), Path("/etc/nv_tegra_release"), Path("/proc/device-tree/model"))
"""The distribution; on a Jetson its JetPack and its board."""


def environment() -> Dict[str, Any]:
    """What there is, as JSON has it. What is missing or broken is said in its place; nothing is raised."""
    libraries = {name: _library(name, module) for name, module in _LIBRARIES.items()}
    torch = None
    if not libraries["torch"]["error"]:
        try:
            torch = _torch()
        except Exception as error:  # it can be imported, and is not whole, or another module of that name
            libraries["torch"]["error"] = f"does not work: {_anonymous(error)}"
    return {
        "package": __version__,
        "python": f"{platform.python_version()} {platform.python_implementation()}",
        "virtual_environment": sys.prefix != sys.base_prefix,
        "libraries": libraries,
        "system": _system(),
        "cpus": {"present": os.cpu_count(), "usable": _usable_cpus()},
        "memory_bytes": _memory_bytes(),
        "torch": torch,
        "variables": {name: _value(os.environ[name]) for name in _SHOWN if name in os.environ},
        "variables_set": [name for name in _NAMED if os.environ.get(name)],
    }


def as_text(found: Dict[str, Any]) -> str:
    """For people: a line a thing."""
    rows = {
        "package": found["package"],
        "python": found["python"] + (", in a virtual environment" if found["virtual_environment"] else ""),
    }
    for name, library in found["libraries"].items():
        rows[name] = ", but ".join(text for text in (library["version"], library["error"]) if text)
    rows["system"] = ", ".join(found["system"])
    rows["cpus"] = f"{found['cpus']['present']}, of which {found['cpus']['usable']} may be used"
    rows["memory"] = "unknown" if found["memory_bytes"] is None else format_bytes(found["memory_bytes"])
    if found["torch"] is not None:
        threads = found["torch"]["threads"]
        rows["threads"] = f"{threads['within']} within an operation of torch, {threads['between']} between operations"
        rows["cuda"] = found["torch"]["cuda"]
        for index, device in enumerate(found["torch"]["devices"]):
            rows[f"cuda:{index}"] = (
                f"{device['name']}, {format_bytes(device['memory_bytes'])}, compute capability {device['capability']}"
            )
    shown = [name if value is None else f"{name}={value}" for name, value in found["variables"].items()]
    rows["variables"] = " ".join([*shown, *(f"{name} (set)" for name in found["variables_set"])]) or "none that matter"
    width = max(map(len, rows))
    return "".join(f"{name:{width}}  {text}\n" for name, text in rows.items())


def _library(name: str, module: str) -> Dict[str, Optional[str]]:
    version: Optional[str] = None
    with suppress(metadata.PackageNotFoundError):
        version = metadata.version(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            imported = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever a broken installation raises
        if isinstance(error, ModuleNotFoundError) and version is None and module.startswith(error.name or "?"):
            return {"version": None, "error": "not installed"}
        return {"version": version, "error": f"cannot be imported: {_anonymous(error)}"}
    own = getattr(imported, "__version__", None)  # of torch with its build, which a package's metadata may lack
    return {"version": str(own or version or "of an unknown version"), "error": None}


def _system() -> List[str]:
    """The distribution, the kernel, the machine, the C library; nothing of its name."""
    found = []
    for path in _RELEASES:
        try:
            text = path.read_text(encoding="utf-8", errors="replace").rstrip("\0")
        except OSError:
            continue
        pretty = re.search(r'^PRETTY_NAME="?([^"\n]*)', text, flags=re.MULTILINE)
        found.append(printable(pretty[1] if pretty else (text.splitlines() or [""])[0])[:100])
    libc = " ".join(platform.libc_ver())
    found += [f"{platform.system()} {platform.release()}", platform.machine(), libc]
    return [text for text in found if text.strip()]


def _usable_cpus() -> Optional[int]:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory_bytes() -> Optional[int]:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):  # a system that does not tell
        return None


def _torch() -> Dict[str, Any]:
    """Threads, and what CUDA says; a driver that does not work warns or raises, and that is what is told."""
    import torch

    devices: List[Dict[str, Any]] = []
    cudnn: Any = torch.backends.cudnn  # has no types
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            if torch.version.cuda is None:
                cuda = "torch was built without it"
            elif not torch.cuda.is_available():
                cuda = f"{torch.version.cuda}, but no device can be used"
            else:
                cuda = f"{torch.version.cuda}, cuDNN {cudnn.version()}"
                for index in range(torch.cuda.device_count()):
                    of_device = torch.cuda.get_device_properties(index)
                    devices.append(
                        {
                            "name": of_device.name,
                            "memory_bytes": of_device.total_memory,
                            "capability": f"{of_device.major}.{of_device.minor}",
                        }
                    )
        except Exception as error:  # a driver and a torch that do not go together raise many things
            cuda = f"{torch.version.cuda}, but {_anonymous(error)}"
    if warned:
        cuda += f": {_anonymous(warned[0].message)}"
    return {
        "threads": {"within": torch.get_num_threads(), "between": torch.get_num_interop_threads()},
        "cuda": cuda,
        "devices": devices,
    }


def _value(text: str) -> Optional[str]:
    return text if _HARMLESS.fullmatch(text) else None


def _anonymous(error: Union[BaseException, str]) -> str:
    """One line of at most 300 characters, in which of every path its end alone is left: the rest may name somebody."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return printable(_DIRECTORIES.sub("…/", text))[:300]
