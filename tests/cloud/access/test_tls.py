"""The server's certificate: what is refused at the start, and what changes without a restart."""

import logging
import re
import shutil
import socket
import ssl
import tempfile

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.servers import start_server

from sft.client.credentials import ClientOptions, read_credentials
from sft.client.handshake import look_at_tls, why_no_handshake
from sft.errors import AccessError, UsageError
from sft_cloud.access import tls
from sft_cloud.access.protection import is_here_alone, make_access
from sft_cloud.access.tls import ServerTls
from sft_cloud.cli import main
from sft_cloud.options import ServerAccess

SECONDS = 30


@pytest.fixture
def pair(tmp_path, certificates):
    """Copies that a test may change."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    shutil.copy(certificates.server.cert, cert)
    shutil.copy(certificates.server.key, key)
    return cert, key


@pytest.fixture
def start(tmp_path):
    servers = []

    def make(*options):
        access = make_access(ServerAccess(*options), "127.0.0.1")
        servers.append(start_server(tmp_path / "state", 1, access=access))
        return servers[-1]

    yield make
    for server in servers:
        server.stop(grace_seconds=0)


def shown(server, **limits):
    """The certificate in a handshake now, and the version of TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    context.set_ciphers("DEFAULT@SECLEVEL=0")  # old versions need it on this side
    for name, value in limits.items():
        setattr(context, name, value)
    plain = socket.create_connection(("127.0.0.1", server.port), SECONDS)
    with plain, context.wrap_socket(plain) as encrypted:
        return encrypted.getpeercert(binary_form=True), encrypted.version()


def der(path):
    return ssl.PEM_cert_to_DER_cert(path.read_text())


def check_health(server, ca):
    credentials = grpc.ssl_channel_credentials(ca.read_bytes())
    with grpc.secure_channel(server.address, credentials, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS).status


def test_a_new_pair_is_taken_without_a_restart(start, pair, certificates, caplog):
    cert, key = pair
    server = start(cert, key)
    assert shown(server)[0] == der(certificates.server.cert)
    with caplog.at_level(logging.INFO):
        shutil.copy(certificates.other_server.key, key)  # half of the change: the old pair stays in use
        assert shown(server)[0] == der(certificates.server.cert)
        assert "the certificate of before stays in use" in caplog.text
        assert "certificate read again" not in caplog.text
        shutil.copy(certificates.other_server.cert, cert)
        assert shown(server)[0] == der(certificates.other_server.cert)
        assert "certificate read again" in caplog.text
    assert check_health(server, certificates.other_ca) == health_pb2.HealthCheckResponse.SERVING


def test_files_that_are_gone_or_torn_leave_the_pair_in_use(start, pair, certificates, caplog):
    cert, key = pair
    server = start(cert, key)
    for spoil in (lambda: key.write_text("torn"), cert.unlink, lambda: cert.write_text("")):
        caplog.clear()
        spoil()
        assert shown(server)[0] == der(certificates.server.cert)
        assert shown(server)[0] == der(certificates.server.cert)
        assert [record.message for record in caplog.records] == ["the certificate of before stays in use"]
    assert check_health(server, certificates.ca) == health_pb2.HealthCheckResponse.SERVING


def test_a_pair_that_could_not_be_read_at_first_is_taken_all_the_same(pair, certificates, monkeypatch):
    cert, key = pair
    now = [0.0]
    server_tls = ServerTls(cert, key, None, retry_clock=lambda: now[0])
    shutil.copy(certificates.expired_server.key, key)
    shutil.copy(certificates.expired_server.cert, cert)

    def fails(path, what):
        raise UsageError(f"{what} {path}: Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(tls, "read_file", fails)
        assert server_tls.changed() is None
    assert server_tls.changed() is None  # it is not time yet
    now[0] += 1.0
    assert server_tls.changed() is not None
    assert server_tls.changed() is None


def test_a_new_client_ca_counts_for_new_connections(start, tmp_path, certificates):
    client_ca = tmp_path / "client_ca.pem"
    shutil.copy(certificates.ca, client_ca)
    server = start(certificates.server.cert, certificates.server.key, client_ca)

    def health(files):
        credentials = grpc.ssl_channel_credentials(
            certificates.ca.read_bytes(), files.key.read_bytes(), files.cert.read_bytes()
        )
        with grpc.secure_channel(server.address, credentials, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            try:
                request = health_pb2.HealthCheckRequest()
                return health_pb2_grpc.HealthStub(channel).Check(request, timeout=SECONDS).status
            except grpc.RpcError as error:
                return error.code()

    serving = health_pb2.HealthCheckResponse.SERVING
    assert [health(files) for files in (certificates.alice, certificates.other_alice)] == [
        serving,
        grpc.StatusCode.UNAVAILABLE,
    ]
    shutil.copy(certificates.other_ca, client_ca)
    assert [health(files) for files in (certificates.alice, certificates.other_alice)] == [
        grpc.StatusCode.UNAVAILABLE,
        serving,
    ]


def test_a_look_at_a_server_that_asks_for_a_certificate_writes_no_key_anywhere(
    start, tmp_path, certificates, monkeypatch
):
    server = start(certificates.server.cert, certificates.server.key, certificates.ca)
    alice = {"tls_cert": certificates.alice.cert, "tls_key": certificates.alice.key}
    shown = read_credentials(ClientOptions(server=server.address, tls_ca=certificates.ca, **alice))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError):
        tempfile.mkstemp()
    assert look_at_tls("127.0.0.1", server.port, shown, SECONDS).version.startswith("TLSv1.")
    assert why_no_handshake("127.0.0.1", server.port, shown, SECONDS) is None


def test_status_says_what_a_server_asks_for(start, certificates, capsys):
    server = start(certificates.server.cert, certificates.server.key, certificates.ca)
    flags = ["status", "--server", server.address, "--tls-ca", str(certificates.ca)]
    assert main(flags) == AccessError.exit_code
    assert "asks for a client certificate: give --tls-cert FILE and --tls-key FILE" in capsys.readouterr().err
    assert main(["status", "--server", server.address]) == AccessError.exit_code
    assert "speaks TLS: name its CA with --tls-ca" in capsys.readouterr().err
    other = [f"--tls-cert={certificates.other_alice.cert}", f"--tls-key={certificates.other_alice.key}"]
    assert main([*flags, *other]) == AccessError.exit_code
    assert "does not accept the client certificate" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_tls_before_1_2_is_not_spoken(start, pair):
    server = start(*pair)
    assert shown(server, maximum_version=ssl.TLSVersion.TLSv1_2)[1] == "TLSv1.2"
    assert shown(server)[1] == "TLSv1.3"
    old = {"minimum_version": ssl.TLSVersion.TLSv1, "maximum_version": ssl.TLSVersion.TLSv1_1}
    with pytest.raises(OSError, match=r"(?i)eof|reset|protocol version"):
        shown(server, **old)


def test_plaintext_is_not_spoken_beside_tls(start, pair):
    server = start(*pair)
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def refused(cert, key, client_ca=None):
    with pytest.raises(UsageError) as caught:
        ServerTls(cert, key, client_ca, dashes="--")
    return str(caught.value)


def test_a_bad_pair_is_refused_at_the_start(certificates, tmp_path):
    server, empty = certificates.server, tmp_path / "empty.pem"
    empty.write_text("")
    assert "--tls-key" in refused(server.cert, certificates.alice.key)
    assert "is not the key of --tls-cert" in refused(server.cert, certificates.alice.key)
    assert "holds no certificate in PEM form" in refused(empty, server.key)
    assert "is no private key in PEM form" in refused(server.cert, empty)
    assert "is no private key in PEM form" in refused(server.cert, server.cert)
    assert "--tls-client-ca" in refused(server.cert, server.key, empty)
    assert "--tls-cert" in refused(tmp_path / "none.pem", server.key)
    assert "No such file" in refused(tmp_path / "none.pem", server.key)


def test_a_key_with_a_passphrase_is_refused(certificates, tmp_path):
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        PrivateFormat,
        load_pem_private_key,
    )

    key = load_pem_private_key(certificates.server.key.read_bytes(), None)
    locked = tmp_path / "locked.pem"
    locked.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")))
    assert "has a passphrase" in refused(certificates.server.cert, locked)


def test_a_certificate_that_has_expired_is_told(certificates, caplog):
    tls = ServerTls(certificates.expired_server.cert, certificates.expired_server.key, None)
    assert "the server's certificate has expired" in caplog.text
    caplog.clear()
    ServerTls(
        certificates.expired_server.cert,
        certificates.expired_server.key,
        None,
        clock=lambda: tls.expires_unix_seconds - 1,
    )
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "give --tls-cert and --tls-key (make them with `sft-cloud certs init`), and --tokens"),
        ({"tokens": "t"}, "give --tls-cert and --tls-key"),
        ({"tls": True}, "give --tokens (`sft-cloud token create`) or --tls-client-ca"),
    ],
    ids=str,
)
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.7"])
def test_an_address_that_others_reach_needs_tls_and_an_identity(options, says, host, pair, tmp_path):
    files = {"tls_cert": pair[0], "tls_key": pair[1]} if options.get("tls") else {}
    if "tokens" in options:
        files["tokens"] = tmp_path / "tokens.json"
    with pytest.raises(UsageError) as caught:
        make_access(ServerAccess(**files), host)
    assert says in str(caught.value)
    assert "or --insecure" in str(caught.value)


def test_with_both_or_when_told_otherwise_it_may_be_reached(pair, certificates):
    make_access(ServerAccess(insecure=True), "0.0.0.0")
    make_access(ServerAccess(*pair, tls_client_ca=certificates.ca), "0.0.0.0")
    make_access(ServerAccess(), "localhost")


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("", False)],
)
def test_who_reaches_a_server_there(host, expected):
    assert is_here_alone(host) is expected


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a" * 64 + ".example", "..."])
def test_a_host_that_cannot_be_looked_up_is_not_taken_for_loopback(host):
    with pytest.raises(UsageError, match=rf"^--host {re.escape(host)}: "):
        make_access(ServerAccess(), host)


@pytest.mark.parametrize(
    "options", [{"tls_cert": "a"}, {"tls_key": "a"}, {"tls_client_ca": "a"}], ids=lambda options: next(iter(options))
)
def test_files_that_need_others(options, tmp_path):
    with pytest.raises(UsageError, match=r"--tls-cert and --tls-key"):
        make_access(ServerAccess(**{name: tmp_path / text for name, text in options.items()}), "127.0.0.1")
