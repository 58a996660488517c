"""What the options of a client mean: encryption, certificates, and where a token comes from and goes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Dict, Optional

import pytest

from sft.client.address import split_address
from sft.client.credentials import PLAINTEXT, ClientOptions, Credentials, is_loopback, read_credentials
from sft.errors import UsageError

TOKEN = "sft_0123456789ab_" + "s" * 43
HERE, THERE = "127.0.0.1:50051", "cloud.example:50051"
CERTIFICATE = b"-----BEGIN CERTIFICATE-----\nMA==\n-----END CERTIFICATE-----\n"
KEY = b"-----BEGIN EC PRIVATE KEY-----\nMA==\n-----END EC PRIVATE KEY-----\n"
SHOWN = (("authorization", f"Bearer {TOKEN}"),)


@pytest.fixture
def files(tmp_path: Path) -> Dict[str, Path]:
    """One for each option that names a file, which only their owner can read."""
    contents = {"tls_ca": CERTIFICATE, "tls_cert": CERTIFICATE, "tls_key": KEY, "token_file": TOKEN.encode() + b"\n"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(0o600)
    return {name: tmp_path / name for name in contents}


def read(server: Optional[str], environment: Optional[Dict[str, str]] = None, **options: Any) -> Credentials:
    return read_credentials(ClientOptions(server=server, **options), environment=environment or {})


def refusal(server: Optional[str], environment: Optional[Dict[str, str]] = None, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        read(server, environment, **options)
    assert TOKEN not in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("server", ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1"])
def test_this_machine_is_called_in_plaintext(server: str) -> None:
    assert is_loopback(split_address(server, "--server").host)
    assert not read(server).encrypted


@pytest.mark.parametrize(
    "server", [THERE, "192.0.2.7:1", "[2001:db8::1]:1", "localhost.example:1", "127.0.0.1.example:1", "0.0.0.0:1"]
)
def test_other_machines_are_called_encrypted(server: str) -> None:
    assert not is_loopback(split_address(server, "--server").host)
    assert read(server).encrypted


def test_a_certificate_means_encryption_here_too(files: Dict[str, Path]) -> None:
    assert read(HERE, tls=True).encrypted
    assert read(HERE, tls_ca=files["tls_ca"]).root_certificates == CERTIFICATE
    both = read(HERE, tls_cert=files["tls_cert"], tls_key=files["tls_key"])
    assert both.certificate_files == (files["tls_cert"], files["tls_key"])
    assert (both.encrypted, both.certificate_chain, both.private_key) == (True, CERTIFICATE, KEY)
    assert not read(THERE, tls=False).encrypted


def test_the_system_s_roots_count_where_no_ca_is_named(tmp_path: Path) -> None:
    roots = tmp_path / "roots.pem"
    roots.write_bytes(CERTIFICATE)
    assert read(THERE, {"SSL_CERT_FILE": str(roots)}).root_certificates == CERTIFICATE


@pytest.mark.parametrize("content", [None, b"", b"no certificate"])
def test_roots_that_the_environment_names_are_never_replaced_by_others(
    tmp_path: Path, content: Optional[bytes]
) -> None:
    roots = tmp_path / "roots.pem"
    if content is not None:
        roots.write_bytes(content)
    assert f"SSL_CERT_FILE: {roots}" in refusal(THERE, {"SSL_CERT_FILE": str(roots)})
    assert not read(HERE, {"SSL_CERT_FILE": str(roots)}).encrypted  # nobody asks for it there


def test_a_token_comes_from_its_file_or_else_from_the_environment(files: Dict[str, Path]) -> None:
    other = {"SFT_TOKEN": "another"}
    assert read(THERE).metadata() == ()
    assert not read(THERE).has_token
    assert read(THERE, other).metadata() == (("authorization", "Bearer another"),)
    assert read(THERE, other, token_file=files["token_file"]).metadata() == SHOWN
    assert read(HERE, {"SFT_TOKEN": ""}).metadata() == ()


def test_a_new_token_in_the_file_counts_for_the_next_call(files: Dict[str, Path]) -> None:
    credentials = read(THERE, token_file=files["token_file"])
    files["token_file"].write_bytes(b"\xef\xbb\xbfa_new_one\r\n")  # as Notepad does
    new = (("authorization", "Bearer a_new_one"),)
    assert credentials.metadata() == new
    files["token_file"].write_text("")  # half written
    assert credentials.metadata() == new
    files["token_file"].unlink()
    assert credentials.metadata() == new


def test_a_token_does_not_cross_a_network_in_plaintext(files: Dict[str, Path]) -> None:
    for where in ({"token_file": files["token_file"]}, {"environment": {"SFT_TOKEN": TOKEN}}):
        said = refusal(THERE, tls=False, **where)
        assert said.startswith(f"the token would cross the network to {THERE} for everybody to read")
        assert read(THERE, tls=False, insecure=True, **where).metadata() == SHOWN
        assert read(HERE, **where).metadata() == SHOWN
    assert not read(THERE, tls=False).encrypted  # without one, plaintext is the user's own choice


def test_a_cloud_of_one_s_own_gets_no_token(files: Dict[str, Path]) -> None:
    assert read(None, {"SFT_TOKEN": TOKEN}) is PLAINTEXT
    assert refusal(None, token_file=files["token_file"]) == "--token-file needs --server"
    assert refusal(None, tls=False) == "--tls needs --server"
    assert refusal(None, insecure=True) == "--insecure needs --server"


def test_options_that_do_not_go_together(files: Dict[str, Path]) -> None:
    assert "--tls-cert and --tls-key belong together" in refusal(THERE, tls_cert=files["tls_cert"])
    assert "--tls-cert and --tls-key belong together" in refusal(THERE, tls_key=files["tls_key"])
    assert "--tls-ca is for encrypted calls; leave out --tls false" in refusal(THERE, tls=False, tls_ca=files["tls_ca"])


@pytest.mark.parametrize("name", ["tls_ca", "tls_cert", "tls_key", "token_file"])
def test_files_that_cannot_be_used_are_named(files: Dict[str, Path], name: str) -> None:
    flag = "--" + name.replace("_", "-")
    path = files[name]
    for content in (b"", b"two words", "\u00e9".encode(), b"x" * 513):
        path.write_bytes(content)
        said = refusal(THERE, **files)
        assert said.startswith(f"{flag} {path} holds no ")
        assert "two words" not in said
    path.unlink()
    assert refusal(THERE, **files) == f"{flag} {path}: No such file or directory"


def test_a_script_is_told_of_arguments_rather_than_flags(files: Dict[str, Path]) -> None:
    with pytest.raises(UsageError, match=r"^tls_cert and tls_key belong together"):
        read_credentials(ClientOptions(server=THERE, tls_cert=files["tls_cert"]), dashes="", environment={})


def test_a_token_in_the_environment_that_is_none() -> None:
    assert "environment variable SFT_TOKEN holds no token" in refusal(THERE, {"SFT_TOKEN": "a b"})


def test_a_key_with_a_passphrase(files: Dict[str, Path]) -> None:
    files["tls_key"].write_bytes(KEY.replace(b"EC PRIVATE", b"ENCRYPTED PRIVATE"))
    assert "has a passphrase" in refusal(THERE, **files)


@pytest.mark.parametrize("name", ["token_file", "tls_key"])
def test_a_secret_that_others_can_read_is_told(
    files: Dict[str, Path], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        read(THERE, **files)
        assert caplog.text == ""
        files[name].chmod(0o640)
        read(THERE, **files)
    assert f"{files[name]} can be read by others on this machine: chmod 600 it" in caplog.text
    assert TOKEN not in caplog.text


def test_what_is_printed_of_credentials_has_no_secret(files: Dict[str, Path]) -> None:
    assert repr(read(THERE, **files)) == "Credentials(encrypted=True, certificate=True)"
    assert "PRIVATE" not in repr(read(THERE, **files))


def test_certificates_are_read_again(files: Dict[str, Path]) -> None:
    before = read(THERE, **files)
    assert before.can_change
    files["tls_ca"].write_bytes(CERTIFICATE * 2)
    files["tls_key"].write_bytes(KEY * 2)
    after = before.renewed()
    assert (after.root_certificates, after.private_key) == (CERTIFICATE * 2, KEY * 2)
    files["tls_cert"].write_bytes(b"half of")
    assert after.renewed() is after, "what is being written leaves what was there before"
    assert not read(THERE, {"SFT_TOKEN": TOKEN}).can_change
