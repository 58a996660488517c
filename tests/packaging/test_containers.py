"""The files for Docker, whose engine the tests do without: they parse, copy what exists, and pass flags that exist."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from dockerfile_parse import DockerfileParser
from support.servers import start_server

from sft.cli.durations import Duration
from sft.cli.options import parse
from sft_cloud.access.protection import make_access
from sft_cloud.options import ServeOptions, ServerAccess
from sft_cloud.server import GRACE_SECONDS
from sft_edge.options.link import LinkOptions
from sft_edge.options.train import TRAIN_OPTIONS

ROOT = Path(__file__).parents[2]
DOCKERFILES = ("cloud_server/Dockerfile", "edge_client/Dockerfile", "edge_client/Dockerfile.jetson")
OPTIONS = {"serve": (ServeOptions, ServerAccess), "train": TRAIN_OPTIONS}


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
    wanted = re.search(r'"\.\[([a-z0-9,]+)\]"', (ROOT / dockerfile).read_text())
    assert wanted
    extras = set(wanted[1].split(","))
    assert ("cloud" if dockerfile.startswith("cloud") else "edge") in extras
    declared = re.findall(r"^([a-z0-9]+) = \[", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert extras <= set(declared)
    if dockerfile.startswith("cloud"):  # whoever calls it can install nothing there
        assert {"otel", "peft", "s3"} <= extras


def test_the_cloud_image_serves_with_options_that_exist(tmp_path: Path) -> None:
    assert value_of("cloud_server/Dockerfile", "ENTRYPOINT") == '["sft-cloud"]'
    options, access = parse_command(yaml.safe_load(value_of("cloud_server/Dockerfile", "CMD")), tmp_path)
    assert access == serving_access(tmp_path)
    assert options.host == "0.0.0.0"
    assert str(options.port) == value_of("cloud_server/Dockerfile", "EXPOSE")
    assert options.state_dir == tmp_path / value_of("cloud_server/Dockerfile", "VOLUME").strip("/")


def serving_access(tmp_path: Path) -> ServerAccess:
    """What both the image and compose serve with."""
    secrets = tmp_path / "secrets"
    return ServerAccess(secrets / "server.pem", secrets / "server-key.pem", tokens=secrets / "tokens.json")


@pytest.fixture
def make_secrets(tmp_path: Path) -> Callable[[], None]:
    """Runs the start of a cloud's container, its directories being those of this test."""
    program = tmp_path / "bin" / "sft-cloud"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m sft_cloud "$@"\n')
    program.chmod(0o755)
    for name in ("secrets", "edge-secrets"):
        (tmp_path / name).mkdir()
    environment = {
        **os.environ,
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "SFT_CLOUD_SECRETS": str(tmp_path / "secrets"),
        "SFT_EDGE_SECRETS": str(tmp_path / "edge-secrets"),
    }

    def run() -> None:
        command = [str(ROOT / "docker/with_secrets.sh"), "sh", "-c", "echo started"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "started", done.stderr
        assert "sft_" not in done.stdout + done.stderr

    return run


def test_a_container_makes_its_secrets_once(make_secrets: Callable[[], None], tmp_path: Path) -> None:
    def contents() -> dict[str, bytes]:
        return {
            f"{path.parent.name}/{path.name}": path.read_bytes()
            for name in ("secrets", "edge-secrets")
            for path in (tmp_path / name).iterdir()
        }

    make_secrets()
    made = contents()
    assert set(made) == {
        *(f"secrets/{name}" for name in ("ca.pem", "server.pem", "server-key.pem", "tokens.json", "tokens.json.lock")),
        *(f"edge-secrets/{name}" for name in ("ca.pem", "token")),
    }
    make_secrets()
    assert contents() == made
    (tmp_path / "edge-secrets" / "token").unlink()  # as where it was killed before it came to that
    make_secrets()
    assert set(contents()) == set(made)
    assert contents()["edge-secrets/token"] != made["edge-secrets/token"]


def test_compose_starts_a_cloud_that_the_edge_can_reach(
    compose: dict[str, Any], make_secrets: Callable[[], None], tmp_path: Path
) -> None:
    make_secrets()
    of_edge = tmp_path / "on-the-edge"
    of_edge.mkdir()
    (of_edge / "secrets").symlink_to(tmp_path / "edge-secrets")
    (link,) = [
        part for part in parse_command(compose["services"]["edge"]["command"], of_edge) if isinstance(part, LinkOptions)
    ]
    host, port = link.server.split(":")
    assert link.credentials.encrypted
    assert link.credentials.has_token
    for name in ("cloud", "cloud-gpu"):
        service = compose["services"][name]
        options, access_options = parse_command(service["command"], tmp_path)
        assert options.host == "0.0.0.0"
        assert str(options.port) == port
        assert access_options == serving_access(tmp_path)
        assert make_access(access_options, options.host).interceptor is not None
        assert host in service["networks"]["link"]["aliases"]
        assert service["entrypoint"] == ["with_secrets", "sft-cloud"]
        check = ["python", "/opt/sft/healthcheck.py", f"localhost:{port}", "/secrets/ca.pem"]
        assert service["healthcheck"]["test"][1:] == check
        assert compose["services"]["edge"]["depends_on"][name]["condition"] == "service_healthy"
    mounted = dict(volume.split(":")[:2] for volume in compose["services"]["cloud"]["volumes"])
    assert mounted["edge-secrets"] == compose["services"]["cloud"]["environment"]["SFT_EDGE_SECRETS"]
    assert mounted["cloud-secrets"] == compose["services"]["cloud"]["environment"]["SFT_CLOUD_SECRETS"]
    assert not any("cloud-secrets" in volume for volume in compose["services"]["edge"]["volumes"])
    certified = read_certificate(tmp_path / "secrets" / "server.pem")
    assert host in certified


def read_certificate(path: Path) -> list[str]:
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


def test_compose_lets_the_cloud_wait_for_checkpoints(
    compose: dict[str, Any], make_secrets: Callable[[], None], tmp_path: Path
) -> None:
    make_secrets()
    for name in ("cloud", "cloud-gpu"):
        service = compose["services"][name]
        options, _ = parse_command(service["command"], tmp_path)
        assert Duration(service["stop_grace_period"]) > options.grace + GRACE_SECONDS


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


def health_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "cloud_server/healthcheck.py")
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.first_only
@pytest.mark.parametrize("protected", [False, True])
def test_the_health_check_tells_a_server_that_serves(
    tmp_path: Path, make_secrets: Callable[[], None], protected: bool
) -> None:
    make_secrets()
    access = make_access(serving_access(tmp_path) if protected else ServerAccess(), "127.0.0.1")
    ca = [str(tmp_path / "secrets" / "ca.pem")] if protected else []
    server = start_server(tmp_path, 1, access=access)
    try:
        assert health_check(server.address, *ca).returncode == 0
    finally:
        server.stop(grace_seconds=0)
    done = health_check(server.address, *ca)
    assert done.returncode == 1
    assert "UNAVAILABLE" in done.stderr
