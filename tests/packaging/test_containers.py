"""The files for Docker, whose engine the tests do without: they parse, copy what exists, and pass flags that exist."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from dockerfile_parse import DockerfileParser

from sft.config import parse
from sft_cloud.cli import ServeOptions
from sft_cloud.serve import CloudServer
from sft_edge.options import TRAIN_OPTIONS

ROOT = Path(__file__).parents[2]
DOCKERFILES = ("cloud_server/Dockerfile", "edge_client/Dockerfile", "edge_client/Dockerfile.jetson")
OPTIONS = {"serve": (ServeOptions,), "train": TRAIN_OPTIONS}


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    structure = DockerfileParser(fileobj=io.BytesIO((ROOT / dockerfile).read_bytes())).structure
    return [(part["instruction"], part["value"]) for part in structure if part["instruction"] != "COMMENT"]


def value_of(dockerfile: str, instruction: str) -> str:
    (value,) = (value for name, value in instructions(dockerfile) if name == instruction)
    return value


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return content


def parse_command(command: list[str], tmp_path: Path) -> tuple[Any, ...]:
    """Reads a container's command as the real command line does, its absolute paths moved under `tmp_path`."""
    (tmp_path / "models").mkdir(exist_ok=True)
    name, *arguments = (re.sub(r"(^|=)/", rf"\1{tmp_path}/", argument) for argument in command)
    return parse(OPTIONS[name], arguments, name)


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_what_an_image_copies_exists_and_is_sent_to_the_builder(dockerfile: str) -> None:
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    sources = [source for name, value in instructions(dockerfile) if name == "COPY" for source in value.split()[:-1]]
    assert {"pyproject.toml", "README.md", "LICENSE", "common"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source.split("/")[0] in sent, source


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_an_image_installs_extras_that_the_package_has(dockerfile: str) -> None:
    wanted = re.search(r'"\.\[([a-z,]+)\]"', (ROOT / dockerfile).read_text())
    assert wanted
    extras = set(wanted[1].split(","))
    assert ("cloud" if dockerfile.startswith("cloud") else "edge") in extras
    declared = re.findall(r"^([a-z]+) = \[", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert extras <= set(declared)


def test_the_cloud_image_serves_with_options_that_exist(tmp_path: Path) -> None:
    assert value_of("cloud_server/Dockerfile", "ENTRYPOINT") == '["sft-cloud"]'
    (options,) = parse_command(yaml.safe_load(value_of("cloud_server/Dockerfile", "CMD")), tmp_path)
    assert options.host == "0.0.0.0"
    assert str(options.port) == value_of("cloud_server/Dockerfile", "EXPOSE")
    assert options.state_dir == tmp_path / value_of("cloud_server/Dockerfile", "VOLUME").strip("/")


def test_compose_starts_a_cloud_that_the_edge_can_reach(compose: dict[str, Any], tmp_path: Path) -> None:
    (link,) = [
        part for part in parse_command(compose["services"]["edge"]["command"], tmp_path) if hasattr(part, "server")
    ]
    host, port = link.server.split(":")
    for name in ("cloud", "cloud-gpu"):
        service = compose["services"][name]
        (options,) = parse_command(service["command"], tmp_path)
        assert options.host == "0.0.0.0"
        assert str(options.port) == port
        assert host in service["networks"]["link"]["aliases"]
        assert service["healthcheck"]["test"][1:] == ["python", "/opt/sft/healthcheck.py", f"localhost:{port}"]
        assert compose["services"]["edge"]["depends_on"][name]["condition"] == "service_healthy"


def test_compose_asks_for_a_gpu_in_its_profile_only(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert services["cloud-gpu"]["profiles"] == ["gpu"]
    (device,) = services["cloud-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert "PIP_EXTRA_INDEX_URL" not in services["cloud-gpu"]["build"].get("args", {}), "this image needs CUDA"
    assert services["cloud"]["profiles"] == ["cpu"]
    assert "deploy" not in services["cloud"]
    assert "COMPOSE_PROFILES=cpu" in (ROOT / ".env").read_text().splitlines()


def test_compose_mounts_what_the_commands_name(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        mounted = [re.sub(r":ro$", "", volume).rsplit(":", 1)[1] for volume in service["volumes"]]
        for argument in service["command"]:
            path = argument.partition("=")[2]
            if path.startswith("/"):
                assert any(path == target or path.startswith(f"{target}/") for target in mounted), f"{name}: {argument}"
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in compose["volumes"] or source.startswith("${"), volume


def test_every_variable_of_compose_has_its_default_in_the_env_file() -> None:
    used = set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()))
    env = (ROOT / ".env").read_text()
    assert used == set(re.findall(r"^(SFT_\w+)=", env, flags=re.MULTILINE))


def health_check(address: str) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "cloud_server/healthcheck.py")
    return subprocess.run([sys.executable, script, address], capture_output=True, text=True, timeout=60)


def test_the_health_check_tells_a_server_that_serves(tmp_path: Path) -> None:
    server = CloudServer("127.0.0.1", 0, torch.device("cpu"), tmp_path, None, max_sessions=1, threads=1)
    try:
        assert health_check(server.address).returncode == 0
    finally:
        server.stop(grace_seconds=0)
    done = health_check(server.address)
    assert done.returncode == 1
    assert "UNAVAILABLE" in done.stderr
