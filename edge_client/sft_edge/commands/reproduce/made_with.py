"""What runs were made with, and whether those of one table were made alike."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Sequence

from sft.cli.environment import environment
from sft.printable import counted

_PACKAGE = "split-fine-tuning"
_CODE = ("sft", "sft_edge", "sft_cloud")
_THEN = ", then "


def made_with(jobs: int = 1) -> Dict[str, Any]:
    """Versions and devices of this machine, and how many runs are side by side, for each run to be told with."""
    found = environment()
    libraries = {name: one["version"] for name, one in found["libraries"].items() if one["version"]}
    torch: Dict[str, Any] = found["torch"] or {}
    threads = torch.get("threads", {}).get("within")
    devices = [device["name"] for device in torch.get("devices", [])]
    ours = f"{found['package']} (code {code_digest()})"
    return {
        "versions": {_PACKAGE: ours, "python": found["python"], **libraries},
        "devices": [*devices, f"{found['cpus']['usable']} processors, {threads} threads of torch"],
        "side_by_side": jobs,
    }


def joined(before: Mapping[str, Any], now: Mapping[str, Any]) -> Dict[str, Any]:
    """Of a run that was begun with the one and goes on with the other: versions that differ are told one after the
    other, and who was side by side once was so."""
    versions = dict(before.get("versions", {}))
    for name, version in now.get("versions", {}).items():
        told = versions.get(name, version)
        versions[name] = told if told.split(_THEN)[-1] == version else f"{told}{_THEN}{version}"
    return {
        "versions": versions,
        "devices": list(dict.fromkeys([*before.get("devices", []), *now.get("devices", [])])),
        "side_by_side": max(before.get("side_by_side", 1), now.get("side_by_side", 1)),
    }


def code_digest(packages: Sequence[Path] = ()) -> str:
    """Eight digits that tell the code apart which is run here, or in these directories: a version stands for many
    commits, and a checkout may have what no commit has."""
    digest = hashlib.sha256()
    for package in packages or list(_packages()):
        for path in sorted(package.rglob("*.py")):
            digest.update(f"{package.name}/{path.relative_to(package).as_posix()}\n".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:8]


def _packages() -> Iterator[Path]:
    for name in _CODE:
        spec = importlib.util.find_spec(name)
        yield from map(Path, (spec and spec.submodule_search_locations) or [])


def as_line(made: Mapping[str, Any], names: Sequence[str] = ()) -> str:
    """For people; `names`: of the versions to show, all without any."""
    versions = made.get("versions", {})
    shown = ", ".join(f"{name} {versions[name]}" for name in names or versions if name in versions)
    jobs = made.get("side_by_side", 1)
    return "; ".join([shown, *made.get("devices", []), *([f"{jobs} runs side by side"] if jobs > 1 else [])])


def differences(each: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line where the runs of a table are not of the same versions; `each`: what each of them was made with."""
    names = dict.fromkeys(name for made in each for name in made.get("versions", {}))
    told: List[str] = []
    for name in names:
        versions = [made.get("versions", {}).get(name, "none") for made in each]
        counts = {version: versions.count(version) for version in dict.fromkeys(versions)}
        if len(counts) > 1:
            each_version = (f"{version} ({counted(count, 'run')})" for version, count in counts.items())
            told.append(f"{name} {', '.join(each_version)}")
    if told:
        yield f"these runs were made with different versions, which may be why they differ: {'; '.join(told)}"
