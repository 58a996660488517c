"""`sft-cloud certs init`: what is in the certificates, and that nothing is overwritten unasked."""

import ipaddress
import stat
from datetime import datetime, timedelta, timezone

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from sft_cloud.cli import main

LOOPBACK = ["localhost", "127.0.0.1", "::1"]


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "certs"


@pytest.fixture
def init(directory, capsys):
    """Runs the command; gives (exit code, names of the files made, standard error)."""

    def run(*flags):
        code = main(["certs", "init", "--dir", str(directory), *flags])
        told = capsys.readouterr()
        return code, [line.rpartition("/")[2] for line in told.out.splitlines()], told.err

    return run


def read(directory, name):
    return x509.load_pem_x509_certificate((directory / f"{name}.pem").read_bytes())


def hosts(directory):
    names = read(directory, "server").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_ca_a_server_and_its_clients(init, directory):
    code, made, err = init("--host", "cloud.example", "192.0.2.7", "--client", "alice", "bob@device-7")
    names = ["ca", "server", "alice", "bob@device-7"]
    assert (code, made) == (0, [f"{name}{kind}.pem" for name in names for kind in ("", "-key")])
    assert "ca-key.pem offline" in err
    for name in names:
        certificate = read(directory, name)
        key = load_pem_private_key((directory / f"{name}-key.pem").read_bytes(), None)
        assert key.public_key() == certificate.public_key()
        assert stat.S_IMODE((directory / f"{name}-key.pem").stat().st_mode) == 0o600
    assert hosts(directory) == ["cloud.example", "192.0.2.7", *LOOPBACK]
    assert read(directory, "bob@device-7").subject.rfc4514_string() == "CN=bob@device-7"
    assert sorted(contents(directory)) == sorted(made)  # and no temporary file


def test_each_certificate_is_good_for_one_purpose_and_some_days(init, directory):
    init("--client", "alice", "--days", "30")
    now = datetime.now(timezone.utc)
    for name, purpose in (("server", ExtendedKeyUsageOID.SERVER_AUTH), ("alice", ExtendedKeyUsageOID.CLIENT_AUTH)):
        certificate = read(directory, name)
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert list(usage) == [purpose]
        assert timedelta(days=29.9) < certificate.not_valid_after_utc - now < timedelta(days=30.1)
        assert certificate.not_valid_before_utc < now - timedelta(minutes=50)  # for clocks that are behind
    assert read(directory, "ca").not_valid_after_utc - now > timedelta(days=3649)


def test_others_than_grpc_trust_the_chain(init, directory):
    init("--client", "alice")
    policy = PolicyBuilder().store(Store([read(directory, "ca")]))
    server, alice = read(directory, "server"), read(directory, "alice")
    verifier = policy.build_server_verifier(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    assert verifier.verify(server, [])[0] == server
    with pytest.raises(VerificationError):
        verifier.verify(alice, [])


def test_a_second_init_adds_what_is_not_there_and_leaves_the_rest(init, directory):
    init("--host", "cloud.example")
    before = contents(directory)
    code, made, err = init("--client", "alice")
    assert (code, made, err) == (0, ["alice.pem", "alice-key.pem"], "")
    assert before.items() < contents(directory).items()
    assert init() == (0, [], "")
    read(directory, "alice").verify_directly_issued_by(read(directory, "ca"))


def test_an_address_within_a_link_is_in_the_certificate_without_its_interface(init, directory):
    init("--host", "fe80::1%eth0", "[2001:db8::7]", "1password.example")
    assert hosts(directory) == ["fe80::1", "2001:db8::7", "1password.example", *LOOPBACK]


@pytest.mark.parametrize("flags", [["--host", "other.example"], ["--client", "alice"], ["--client", "bob", "alice"]])
def test_what_exists_is_not_overwritten(init, directory, flags):
    init("--client", "alice")
    before = contents(directory)
    code, made, err = init(*flags)
    assert (code, made) == (2, [])
    assert "exists; --renew makes it anew" in err
    assert contents(directory) == before


def test_renew_replaces_all_but_the_ca_and_keeps_the_server_s_names(init, directory):
    init("--host", "cloud.example", "--client", "alice", "bob")
    before = contents(directory)
    assert init("--renew", "--client", "alice")[:2] == (
        0,
        ["server.pem", "server-key.pem", "alice.pem", "alice-key.pem"],
    )
    changed = {name for name, content in contents(directory).items() if content != before[name]}
    assert changed == {"server.pem", "server-key.pem", "alice.pem", "alice-key.pem"}
    assert hosts(directory) == ["cloud.example", *LOOPBACK]
    init("--renew", "--host", "other.example")
    assert hosts(directory) == ["other.example", *LOOPBACK]


def test_a_certificate_never_outlives_its_ca(init, directory):
    init("--days", "30")
    ca = read(directory, "ca")
    assert init("--client", "alice", "--days", "36500")[0] == 0
    assert read(directory, "alice").not_valid_after_utc == ca.not_valid_after_utc


def test_the_ca_lasts_as_long_as_what_it_was_made_for(init, directory):
    init("--days", "7300")
    assert read(directory, "ca").not_valid_after_utc == read(directory, "server").not_valid_after_utc
    assert read(directory, "ca").not_valid_after_utc - datetime.now(timezone.utc) > timedelta(days=7299)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--days", "0"], "--days must be 1 or more"),
        (["--days", "36501"], "--days must be at most 36500"),
        (["--host", "a b"], "--host 'a b' is neither a name nor an IP address"),
        (["--host", "https://cloud"], "is neither a name nor an IP address"),
        (["--host", "10.0.0.256"], "--host '10.0.0.256' is neither a name nor an IP address"),
        (["--host", "10.0.1"], "is neither a name nor an IP address"),
        (["--host", "cloud.1"], "is neither a name nor an IP address"),
        (["--host", "fe80::1::2"], "is neither a name nor an IP address"),
        (["--host", "10.0.0.1%eth0"], "is neither a name nor an IP address"),
        (["--client", "../alice"], "--client: '../alice' cannot be a caller's name"),
        (["--client", "anonymous"], "cannot be a caller's name"),
        (["--client", "server"], "--client server: that is the name of another file here"),
        (["--client", "alice-key"], "that is the name of another file here"),
    ],
    ids=str,
)
def test_bad_flags_are_one_line_and_make_nothing(init, directory, flags, says):
    code, made, err = init(*flags)
    assert (code, made) == (2, [])
    assert says in err
    assert len(err.splitlines()) == 1
    assert not directory.exists()


def test_a_ca_that_is_none(init, directory):
    init()
    (directory / "ca-key.pem").write_text("")
    code, _, err = init("--client", "alice")
    assert code == 2
    assert "are no CA of `sft-cloud certs init`" in err
    (directory / "ca-key.pem").write_bytes((directory / "server-key.pem").read_bytes())
    assert "is not the key of" in init("--client", "alice")[2]
    (directory / "ca-key.pem").unlink()
    assert "No such file" in init("--client", "alice")[2]
    assert not (directory / "alice.pem").exists()
