"""`sft-edge doctor` against the real server: models, TLS, tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.jobs import Job
from support.servers import start_server
from support.tiny import make_tiny_model
from support.tls import Certificates, make_certificates, make_token

from sft_cloud.access.protection import make_access
from sft_cloud.options import ServerAccess
from sft_cloud.server import CloudServer
from sft_edge.cli import main

Examine = Callable[..., tuple[int, dict[str, dict[str, str]]]]


@pytest.fixture
def examine(capsys: pytest.CaptureFixture[str]) -> Examine:
    """Runs the command; gives its exit code and the findings by name."""

    def run(server: str, *arguments: object) -> tuple[int, dict[str, dict[str, str]]]:
        command = ["doctor", "--server", server, "--idle", "50ms", "--json", *map(str, arguments)]
        capsys.readouterr()  # of a run before
        code = main(command)
        report = json.loads(capsys.readouterr().out)
        assert report["passed"] is (code == 0)
        return code, {finding["name"]: finding for finding in report["findings"]}

    return run


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


CUT = ("--split-layer", 2, "--split-rank", 4)


def test_a_model_that_the_server_does_not_have_and_then_has(
    examine: Examine, start_cloud: Callable[..., CloudServer], train: Callable[..., Path], job: Job, model: Path
) -> None:
    server = start_cloud()
    code, found = examine(server.address, "--model", model, *CUT)
    assert code == 0
    assert {finding["verdict"] for finding in found.values()} == {"ok"}
    assert "the server has not these weights" in found["model"]["found"]
    assert "a first run sends" in found["model"]["found"]
    assert found["idle"]["found"] == "a stream that was idle for 50ms could be used again"
    assert "the way takes" in found["step"]["found"]
    assert len(server.sessions) == 0  # nothing was opened
    train(job, model=model, max_steps=1, server=server.address)
    _, found = examine(server.address, "--model", model, *CUT)
    assert f"the server has the weights of {model.name}, bit for bit (SHA-256 " in found["model"]["found"]


def test_a_server_with_a_model_of_its_own(
    examine: Examine, start_cloud: Callable[..., CloudServer], model: Path, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "models" / model.name)
    address = start_cloud(model_dir=tmp_path / "models").address
    _, found = examine(address, "--model", model, "--mode", "sl", "--split-layer", 2)
    assert "bit for bit" in found["model"]["found"]
    assert "sends" not in found["model"]["found"]
    other = make_tiny_model(tmp_path / "other" / model.name, layers=3, seed=1)
    _, found = examine(address, "--model", other, "--mode", "sl", "--split-layer", 2)
    assert "the server has not these weights" in found["model"]["found"]


def test_a_cut_that_the_model_does_not_have(examine: Examine, cloud: str, model: Path) -> None:
    code, found = examine(cloud, "--model", model, "--split-layer", 99)
    assert code == 5
    assert found["model"]["verdict"] == "failed"
    assert "99" in found["model"]["found"]


@pytest.fixture
def start_protected(tmp_path: Path) -> Any:
    """`start_protected(tls_cert=..., tokens=...)` serves with these options on a loopback port."""
    servers: list[CloudServer] = []

    def start(**options: Path) -> CloudServer:

        access = make_access(ServerAccess(**options), "127.0.0.1")
        state = tmp_path / f"cloud-{len(servers)}"
        servers.append(start_server(state, 2, access=access))
        return servers[-1]

    yield start
    for server in servers:
        server.stop(grace_seconds=0)


def client(certificates: Certificates, **files: Path) -> list[object]:
    """Flags of an edge that knows the CA."""
    values = {"tls_ca": certificates.ca, **files}
    return [word for name, path in values.items() for word in ("--" + name.replace("_", "-"), path)]


def test_tls_and_a_token_that_are_good(
    examine: Examine, certificates: Certificates, start_protected: Callable[..., CloudServer], tmp_path: Path
) -> None:
    token = make_token(tmp_path / "tokens", "anna", lifetime_seconds=86400.0, max_split_rank=16)
    server = start_protected(
        tls_cert=certificates.server.cert, tls_key=certificates.server.key, tokens=tmp_path / "tokens"
    )
    token_file = tmp_path / "token"
    token_file.write_text(token)
    token_file.chmod(0o600)
    code, found = examine(server.address, *client(certificates, token_file=token_file))
    assert code == 0
    # The certificates of tests are good for ten days.
    assert found["encryption"]["verdict"] == "warning"
    assert found["encryption"]["found"].startswith("TLSv1.3; the server's certificate is good until ")
    assert "days from now" in found["encryption"]["found"]
    assert (
        "the server knows us as anna, who may use ranks up to 16; the token is good until" in found["access"]["found"]
    )
    assert found["access"]["verdict"] == "warning"  # it ends tomorrow
    assert found["idle"]["verdict"] == "ok"
    code, found = examine(server.address, *client(certificates))
    assert (code, found["access"]["verdict"]) == (5, "failed")
    assert "asks for a valid token" in found["access"]["found"]


@pytest.mark.parametrize(
    ("served", "says"),
    [
        ("other_server", "of a CA that is not known here"),
        ("expired_server", "has expired"),
        ("elsewhere", "for other names than 127.0.0.1"),
    ],
)
def test_certificates_that_are_not_good(
    examine: Examine,
    certificates: Certificates,
    start_protected: Callable[..., CloudServer],
    served: str,
    says: str,
) -> None:
    files = getattr(certificates, served)
    server = start_protected(tls_cert=files.cert, tls_key=files.key)
    code, found = examine(server.address, *client(certificates))
    assert code == 5
    assert list(found) == ["address", "connection", "encryption"]
    assert found["encryption"]["verdict"] == "failed"
    assert says in found["encryption"]["found"]
    assert found["encryption"]["advice"]


@pytest.mark.parametrize(
    ("name", "says"),
    [(None, "asks for a client certificate"), ("other_alice", "does not accept the client certificate"), ("alice", "")],
)
def test_a_server_that_wants_our_certificate(
    examine: Examine,
    certificates: Certificates,
    start_protected: Callable[..., CloudServer],
    name: str | None,
    says: str,
) -> None:
    files = certificates.server
    server = start_protected(tls_cert=files.cert, tls_key=files.key, tls_client_ca=certificates.ca)
    ours = {}
    if name is not None:
        ours = {"tls_cert": getattr(certificates, name).cert, "tls_key": getattr(certificates, name).key}
    code, found = examine(server.address, *client(certificates, **ours))
    assert code == (5 if says else 0)
    assert says in found["encryption"]["found"]
    if not says:
        assert found["access"]["found"].startswith("the server knows us as alice; ")


def test_plaintext_where_there_is_tls(
    examine: Examine, certificates: Certificates, start_protected: Callable[..., CloudServer]
) -> None:
    server = start_protected(tls_cert=certificates.server.cert, tls_key=certificates.server.key)
    code, found = examine(server.address)
    assert code == 5
    assert found["encryption"]["found"] == "the server speaks TLS"
    assert "--tls-ca" in found["encryption"]["advice"]


def test_status_of_a_protected_server(
    certificates: Certificates,
    start_protected: Callable[..., CloudServer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from sft_cloud.cli import main as cloud_main

    token = make_token(tmp_path / "tokens", "anna")
    server = start_protected(
        tls_cert=certificates.server.cert, tls_key=certificates.server.key, tokens=tmp_path / "tokens"
    )
    command = ["status", "--server", server.address, "--tls-ca", str(certificates.ca)]
    assert cloud_main(command) == 5
    assert "asks for a valid token" in capsys.readouterr().err
    monkeypatch.setenv("SFT_TOKEN", token)
    assert cloud_main(command) == 0
    assert "you are anna\n" in capsys.readouterr().out
