"""Whole runs through TLS, with client certificates and tokens; and what an edge says that is not let in."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.hosting_script import ScriptCloud
from support.jobs import STEADY, Job, same_bits, weights_of
from support.one_process import run_each
from support.servers import start_server
from support.tls import Certificates, make_certificates, make_token

from sft import SFTOptimizer
from sft.errors import AccessError, UsageError
from sft_cloud.access.protection import make_access
from sft_cloud.access.tokens import TokenFile
from sft_cloud.options import ServerAccess
from sft_cloud.server import CloudServer
from sft_edge.cli import main

SECONDS = 120


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


@pytest.fixture
def alice(tokens: Path, tmp_path: Path) -> Path:
    """A file with a token of alice's."""
    return private_file(tmp_path / "alice", make_token(tokens, "alice"))


def private_file(path: Path, text: str) -> Path:
    path.touch(mode=0o600)
    path.write_text(text)
    return path


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Starts a server with the given access; gives its address."""
    servers: list[CloudServer] = []

    def make(**options: object) -> str:
        access = make_access(ServerAccess(**options), "127.0.0.1")
        state = tmp_path / f"state-{len(servers)}"
        servers.append(start_server(state, 2, access=access))
        return servers[-1].address

    yield make
    for server in servers:
        server.stop(grace_seconds=0)


@pytest.fixture
def everything(certificates: Certificates, tokens: Path, alice: Path) -> dict[str, object]:
    """A server that asks for all there is."""
    return {
        "tls_cert": certificates.server.cert,
        "tls_key": certificates.server.key,
        "tls_client_ca": certificates.ca,
        "tokens": tokens,
    }


@pytest.fixture
def shows(certificates: Certificates, alice: Path) -> dict[str, object]:
    """What alice shows it."""
    return {
        "tls_ca": certificates.ca,
        "tls_cert": certificates.alice.cert,
        "tls_key": certificates.alice.key,
        "token_file": alice,
    }


def test_a_run_through_tls_with_certificate_and_token_has_the_bits_of_one_without(
    train: Callable[..., Path], start: Callable[..., str], job: Job, model: Path, everything: dict, shows: dict
) -> None:
    options = {**STEADY, "model": model, "max_steps": 4}
    plain = weights_of(train(job, **options))
    assert same_bits(plain, weights_of(train(job, **options, server=start(**everything), **shows)))


@pytest.mark.slow
def test_verify_goes_through_it_too(start: Callable[..., str], everything: dict, shows: dict) -> None:
    words = ["--steps", "1", "--max-seq-length", "8", "--server", start(**everything)]
    for name, value in shows.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    assert main(["verify", *words]) == 0


def test_what_an_edge_says_that_is_not_let_in(
    failing: Callable[..., tuple[int, str]],
    start: Callable[..., str],
    certificates: Certificates,
    everything: dict,
    shows: dict,
    tokens: Path,
    tmp_path: Path,
) -> None:
    address = start(**everything)
    plain = start(tokens=tokens)
    bob = private_file(tmp_path / "bob", make_token(tokens, "bob"))
    old = private_file(tmp_path / "old", make_token(tokens, "alice", lifetime_seconds=0))
    none = {"tls_cert": None, "tls_key": None}
    others = {
        name: {"tls_cert": pair.cert, "tls_key": pair.key}
        for name, pair in vars(certificates).items()
        if hasattr(pair, "key")
    }
    not_accepted = "does not accept the client certificate: it has expired, comes from another CA, or is not a client's"
    stranger = "does not let us in: this server does not know the caller: it asks for a valid token and a client"
    for told, expected in (
        ({**shows, **none}, "asks for a client certificate: give --tls-cert FILE and --tls-key FILE"),
        ({**shows, **others["other_alice"]}, not_accepted),
        ({**shows, **others["expired_alice"]}, not_accepted),
        ({**shows, **others["server"]}, not_accepted),
        ({**shows, **others["bob"]}, stranger),
        ({**shows, "token_file": bob}, stranger),
        ({**shows, "token_file": None}, stranger),
        ({**shows, "token_file": old}, "does not let us in: the token expired on 20"),
        ({**shows, "tls_ca": certificates.other_ca}, "has a certificate of a CA that is not known here"),
        ({**shows, "tls_ca": None}, "has a certificate of a CA that is not known here: name its CA with --tls-ca FILE"),
        ({}, "speaks TLS: name its CA with --tls-ca FILE"),
    ):
        code, line = failing(server=address, **told)
        assert (code, line[: len(address) + 1]) == (5, f"{address} ")
        assert line[len(address) + 1 :].startswith(expected), (told, line)
    assert failing(server=plain) == (
        5,
        f"{plain} does not let us in: this server does not know the caller: it asks for a valid token; no token was "
        "shown: give --token-file FILE or set SFT_TOKEN",
    )
    code, line = failing(server=plain, tls_ca=certificates.ca)
    assert (code, line.startswith(f"{plain} does not speak TLS: start it with a certificate, or add --tls false")) == (
        5,
        True,
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        ("expired_server", "has a certificate that has expired"),
        ("elsewhere", "has a certificate for other names than 127.0.0.1"),
        ("alice", "has a certificate that is not for servers"),
        ("other_server", "has a certificate of a CA that is not known here"),
    ],
)
def test_a_server_that_is_not_the_one_it_says(
    failing: Callable[..., tuple[int, str]],
    start: Callable[..., str],
    certificates: Certificates,
    alice: Path,
    pair: str,
    says: str,
) -> None:
    files = getattr(certificates, pair)
    address = start(tls_cert=files.cert, tls_key=files.key)
    code, line = failing(server=address, tls_ca=certificates.ca, token_file=alice)
    assert code == 5
    assert line.startswith(f"{address} {says}")


def test_a_token_that_is_revoked_during_a_run_ends_it(
    failing: Callable[..., tuple[int, str]],
    start: Callable[..., str],
    everything: dict,
    shows: dict,
    tokens: Path,
    at_step: Callable[[int, Callable[[], object]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sft_edge.link.retries.RENEWAL_SECONDS", 0.5)
    at_step(2, lambda: TokenFile(tokens).revoke(lambda token: token.name == "alice"))
    code, line = failing(server=start(**everything), **shows)
    assert code == 5
    assert "does not let us in: the token" in line
    assert "revoked" in line


@pytest.mark.slow
def test_no_secret_reaches_a_log_or_a_result(
    certificates: Certificates, tokens: Path, alice: Path, job: Job, model: Path, tmp_path: Path
) -> None:
    """The real commands in processes of their own, the server at its loudest, good callers and bad ones."""
    command = [sys.executable, "-m", "sft_cloud", "serve", "--port", "0", "--device", "cpu", "--threads", "1"]
    command += ["--state-dir", str(tmp_path / "state"), "--log-level", "debug", "--log-format", "json"]
    command += ["--tls-cert", str(certificates.server.cert), "--tls-key", str(certificates.server.key)]
    command += ["--tls-client-ca", str(certificates.ca), "--tokens", str(tokens), "--exit-with-stdin"]
    log = tmp_path / "server.log"
    bad = private_file(tmp_path / "bad", alice.read_text()[:-3] + "zzz")
    commands = []
    with log.open("wb") as stderr, subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr
    ) as server:
        address = json.loads(server.stdout.readline())["address"]
        for name, files, token in (
            ("a", certificates.alice, alice),
            ("b", certificates.alice, bad),
            ("c", certificates.bob, alice),
            ("d", certificates.other_alice, alice),  # no handshake, of which gRPC has a line of its own to say
        ):
            flags = job.flags(model=model, server=address, max_steps=1, output_dir=tmp_path / "out" / name)
            flags += ["--tls-ca", str(certificates.ca), "--tls-cert", str(files.cert), "--tls-key", str(files.key)]
            commands.append((["train", *flags], {"SFT_TOKEN": token.read_text()}))
        told = run_each("sft_edge.cli", commands, tmp_path / "told", SECONDS)
        server.stdin.close()
        server.wait(SECONDS)
    assert [each.code for each in told] == [0, 5, 5, 5]
    entries = [json.loads(line) for line in log.read_text().splitlines()]  # every line is the log's own
    refused = [entry["reason"] for entry in entries if entry["event"] == "caller refused"]
    assert refused == ["a token that is none of those here", "a token of alice with the certificate of bob"]
    for each in told[1:]:
        opening, error = (each.stdout + each.stderr).splitlines()
        assert opening.startswith("opening a session at ")
        assert error.startswith(f"sft-edge train: error: {address} does not ")
    (token,) = TokenFile(tokens).read().values()
    secrets = [alice.read_text().split("_", 2)[2], bad.read_text().split("_", 2)[2], token.sha256, "PRIVATE KEY"]
    written = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written
    said = {index: (each.stdout + each.stderr).encode() for index, each in enumerate(told)}
    for where, content in {**written, log: log.read_bytes(), **said}.items():
        assert [secret for secret in secrets if secret.encode() in content] == [], where


# Scripts.


def make_module() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def test_a_script_that_hosts_its_model_lets_in_who_has_a_token(
    certificates: Certificates, tokens: Path, alice: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SFT_TOKEN", raising=False)
    split = {"split_at": "2", "split_rank": 2}
    files = {"tls_cert": str(certificates.server.cert), "tls_key": str(certificates.server.key), "tokens": str(tokens)}
    hosted, model = make_module(), make_module()
    with ScriptCloud(hosted, torch.optim.SGD(hosted.parameters(), lr=0.1), **split, **files) as cloud:

        def wrap(**options: object) -> SFTOptimizer:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            return SFTOptimizer(optimizer, role="edge", model=model, server=cloud.address, **split, **options)

        for options, says in (
            ({}, "speaks TLS: name its CA with tls_ca=FILE, or add tls=True"),
            ({"tls_ca": str(certificates.ca)}, "no token was shown: give token_file=FILE or set SFT_TOKEN"),
            ({"tls_ca": str(certificates.other_ca), "token_file": str(alice)}, "of a CA that is not known here"),
        ):
            with pytest.raises(AccessError, match=says):
                wrap(**options)
        with wrap(tls_ca=str(certificates.ca), token_file=str(alice)) as optimizer:
            model(torch.ones(2, 6)).sum().backward()
            optimizer.step()
    assert cloud.error is None


def test_a_script_does_not_host_for_strangers_unless_it_says_so() -> None:
    model = make_module()
    optimizer = SFTOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), role="cloud", model=model, split_at="2", split_rank=2
    )
    with pytest.raises(UsageError, match=r"give tls_cert and tls_key .*, and tokens .* or insecure, where everybody"):
        optimizer.serve("0.0.0.0:0")


def test_a_script_s_token_does_not_cross_a_network_in_plaintext(alice: Path) -> None:
    model = make_module()
    with pytest.raises(UsageError, match="leave out tls false, or add insecure"):
        SFTOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            role="edge",
            model=model,
            server="cloud.example:50051",
            split_at="2",
            split_rank=2,
            tls=False,
            token_file=str(alice),
        )
