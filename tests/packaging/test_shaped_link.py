"""Links of limited bandwidth, of `make emulate` and of the edge's container; they need root and iproute2."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EMULATE = [sys.executable, str(ROOT / "bench/emulate.py")]


def may_make_namespaces() -> bool:
    name = f"sft-test-{os.getpid()}"
    if shutil.which("ip") is None or subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return False
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return True


pytestmark = pytest.mark.skipif(not may_make_namespaces(), reason="network namespaces need root and iproute2")


def namespaces_of(process: subprocess.Popen[str]) -> list[str]:
    """Those that an emulation has made; others are those of tests in other processes."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [name for name in (line.split()[0] for line in listed.splitlines()) if name.endswith(f"-{process.pid}")]


def emulate(*flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen([*EMULATE, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def namespace() -> Iterator[str]:
    """A namespace with two interfaces beside lo, as a container in two networks has."""
    name = f"sft-test-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        add = ["ip", "-netns", name, "link", "add", "eth0", "type", "veth", "peer", "name", "eth1"]
        subprocess.run(add, check=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


def limit_rate(namespace: str, rate: str, *command: str) -> subprocess.CompletedProcess[str]:
    script = ["ip", "netns", "exec", namespace, "env", f"SFT_RATE={rate}", str(ROOT / "docker/limit_rate.sh")]
    return subprocess.run([*script, *command], capture_output=True, text=True)


def test_the_container_limits_both_directions_of_its_interfaces_and_runs_the_command(namespace: str) -> None:
    done = limit_rate(namespace, "20mbit", "tc", "-json", "qdisc", "show")
    assert done.returncode == 0, done.stderr
    rates = {each["dev"]: each["options"]["rate"] for each in json.loads(done.stdout) if each["kind"] == "tbf"}
    names = ("eth0", "in-eth0", "eth1", "in-eth1")
    assert rates == dict.fromkeys(names, 2_500_000)  # bytes a second
    for name in ("eth0", "eth1"):
        redirected = ["ip", "netns", "exec", namespace, "tc", "filter", "show", "dev", name, "ingress"]
        assert f"in-{name}" in subprocess.run(redirected, capture_output=True, text=True, check=True).stdout


def test_the_container_runs_without_a_limit_when_no_rate_is_set(namespace: str) -> None:
    done = limit_rate(namespace, "", "tc", "-json", "qdisc", "show")
    assert done.returncode == 0, done.stderr
    assert "tbf" not in done.stdout


def test_the_container_does_not_start_with_a_limit_that_cannot_be_set(namespace: str) -> None:
    done = limit_rate(namespace, "20apples", "echo", "started")
    assert done.returncode != 0
    assert "started" not in done.stdout


@pytest.mark.slow
def test_emulation_refuses_a_rate_that_tc_does_not_know(tmp_path: Path) -> None:
    with emulate("--rate=20apples", f"--output-dir={tmp_path}") as emulation:
        _, errors = emulation.communicate()
    assert emulation.returncode == 2
    assert len(errors.splitlines()) == 1
    assert "20apples" in errors
    assert namespaces_of(emulation) == []


@pytest.mark.slow
def test_interrupted_emulation_leaves_no_namespace(tmp_path: Path) -> None:
    with emulate("--rate=1gbit", f"--output-dir={tmp_path}") as emulation:
        assert emulation.stdout is not None
        assert "measured" in emulation.stdout.readline()  # the namespaces are there, the cloud is starting
        assert f"sft-edge-{emulation.pid}" in namespaces_of(emulation)
        emulation.send_signal(signal.SIGINT)
        _, errors = emulation.communicate(timeout=60)
    assert emulation.returncode == 130, errors
    assert namespaces_of(emulation) == []


@pytest.mark.slow
def test_emulation_trains_both_systems_through_the_link(tmp_path: Path, minilm: str) -> None:
    flags = [f"--model={minilm}", "--max-steps=2", "--max-train-samples=64", "--max-eval-samples=32"]
    with emulate("--rate=50mbit", f"--output-dir={tmp_path}", *flags) as emulation:
        told, errors = emulation.communicate(timeout=300)
    assert emulation.returncode == 0, errors
    table = {line[:18].strip(): line[18:].split() for line in told.splitlines()[-10:]}
    assert table[""] == ["sl", "sft"]
    assert table["steps"] == ["2", "2"]
    sl, sft = (json.loads((tmp_path / mode / "all_results.json").read_text()) for mode in ("sl", "sft"))
    # A row of 384 floats, and one of rank 8 in int8: its elements and their scale.
    assert 9 * sl["wire_payload_bytes_sent"] == 384 * 4 * sft["wire_payload_bytes_sent"]
    # What the link lets through in a second is the least that the bytes can have taken.
    assert sl["train_runtime"] > 8 * sl["wire_bytes_sent"] / 50e6
    assert namespaces_of(emulation) == []
