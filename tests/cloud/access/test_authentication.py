"""Who a caller is taken for: tokens, certificates, and both together, at a time that tests say."""

import pytest
from support.tls import make_token

from sft_cloud.access.authentication import Authentication
from sft_cloud.access.protection import make_access
from sft_cloud.access.tokens import LiveTokens, TokenFile
from sft_cloud.errors import UnauthenticatedError
from sft_cloud.identity import ANONYMOUS, Limits
from sft_cloud.options import ServerAccess

DAY = 86400


class Clock:
    def __init__(self, file):
        self.ahead = 0.0
        self._file = file

    def __call__(self):
        return next(iter(TokenFile(self._file).read().values())).created + self.ahead


class Call:
    """What Authentication asks of a grpc.ServicerContext."""

    def __init__(self, metadata=(), certificate=None):
        self._metadata, self._certificate = metadata, certificate

    def invocation_metadata(self):
        return self._metadata

    def auth_context(self):
        return {} if self._certificate is None else {"x509_pem_cert": [self._certificate]}


def bearer(token, scheme="Bearer"):
    return (("user-agent", "test"), ("authorization", f"{scheme} {token}"))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "tokens.json"


@pytest.fixture
def alice(file):
    return make_token(file, "alice", lifetime_seconds=30 * DAY, max_sessions=2)


@pytest.fixture
def clock(file, alice):
    return Clock(file)


@pytest.fixture
def by_token(file, clock):
    return Authentication(LiveTokens(file, clock), needs_certificate=False, clock=clock)


@pytest.fixture
def by_certificate(clock):
    return Authentication(None, needs_certificate=True, clock=clock)


@pytest.fixture
def by_both(file, clock):
    return Authentication(LiveTokens(file, clock), needs_certificate=True, clock=clock)


def refused(authentication, call):
    """What the caller is told, and what the log is."""
    with pytest.raises(UnauthenticatedError) as caught:
        authentication.identify(call)
    return str(caught.value), caught.value.reason


def test_a_token_says_who_it_is(by_token, alice, clock):
    for scheme in ("Bearer", "bearer", "BEARER"):
        identity = by_token.identify(Call(bearer(alice, scheme)))
        assert (identity.name, identity.limits) == ("alice", Limits(max_sessions=2))
        assert identity.expires_unix_seconds == clock() + 30 * DAY
        assert by_token.still_valid(identity)


def test_every_stranger_is_told_the_same(by_token, alice, file):
    bob = make_token(file, "bob")
    strangers = {
        (): "no token",
        bearer("x"): "a token that is none of those here",
        bearer(alice[:-1]): "a token that is none of those here",
        bearer(alice[:16] + bob[16:]): "a token that is none of those here",
        bearer(alice, "Basic"): "a token that is none of those here",
        (("authorization", alice),): "a token that is none of those here",
        bearer(alice) + bearer(alice): "several tokens",
        (("authorization", alice.encode()),): "several tokens",
        (("authorization-bin", alice.encode()),): "no token",
    }
    assert {metadata: refused(by_token, Call(metadata))[1] for metadata in strangers} == strangers
    (told,) = {refused(by_token, Call(metadata))[0] for metadata in strangers}
    assert told == "this server does not know the caller: it asks for a valid token"


def test_who_holds_the_secret_is_told_that_it_expired(by_token, alice, clock):
    identity = by_token.identify(Call(bearer(alice)))
    clock.ahead = 30 * DAY - 1
    assert by_token.still_valid(identity)
    clock.ahead = 30 * DAY
    assert not by_token.still_valid(identity)
    told, reason = refused(by_token, Call(bearer(alice)))
    assert told.startswith("the token expired on 20")
    assert reason == f"expired token {identity.token_id} of alice"
    told, _ = refused(by_token, Call(bearer(alice[:-2] + "zz")))
    assert "expired" not in told


def test_who_holds_the_secret_is_told_that_it_was_revoked(by_token, alice, file):
    identity = by_token.identify(Call(bearer(alice)))
    make_token(file, "alice")
    TokenFile(file).revoke(lambda token: token.id == identity.token_id)
    assert not by_token.still_valid(identity)  # though the name has another
    told, reason = refused(by_token, Call(bearer(alice)))
    assert told == "the token was revoked: ask whoever runs the server for a new one"
    assert reason == f"revoked token {identity.token_id} of alice"


def test_a_certificate_says_who_it_is(by_certificate, certificates, clock):
    identity = by_certificate.identify(Call(certificate=certificates.alice.cert.read_bytes()))
    assert (identity.name, identity.limits, identity.token_id) == ("alice", Limits(), None)
    assert by_certificate.still_valid(identity)
    clock.ahead = 11 * DAY
    assert not by_certificate.still_valid(identity)
    told, _ = refused(by_certificate, Call(certificate=certificates.alice.cert.read_bytes()))
    assert told == "the client certificate has expired: ask for a new one"


def test_a_call_without_a_certificate_is_a_stranger_s(by_certificate, certificates):
    told, reason = refused(by_certificate, Call())
    assert told == "this server does not know the caller: it asks for a client certificate"
    assert reason == "no client certificate"
    assert refused(by_certificate, Call(certificate=b"-----BEGIN"))[0] == told


def test_a_token_counts_only_beside_the_certificate_of_its_name(by_both, certificates, alice):
    with_alice, with_bob = (certificates.alice.cert.read_bytes(), certificates.bob.cert.read_bytes())
    assert by_both.identify(Call(bearer(alice), with_alice)).name == "alice"
    assert by_both.identify(Call(bearer(alice), with_alice)).limits == Limits(max_sessions=2)
    strangers = {
        Call(bearer(alice)): "no client certificate",
        Call((), with_alice): "no token",
        Call(bearer(alice), with_bob): "a token of alice with the certificate of bob",
    }
    assert [refused(by_both, call)[1] for call in strangers] == list(strangers.values())
    (told,) = {refused(by_both, call)[0] for call in strangers}
    assert "a valid token and a client certificate in the token's name" in told


def test_both_together_end_with_the_first_that_ends(by_both, certificates, alice, clock):
    identity = by_both.identify(Call(bearer(alice), certificates.alice.cert.read_bytes()))
    clock.ahead = 9 * DAY
    assert by_both.still_valid(identity)
    clock.ahead = 11 * DAY  # the token lasts thirty days, the certificate ten
    assert not by_both.still_valid(identity)


def test_a_server_can_ask_whether_somebody_would_still_be_let_in(file, alice):
    access = make_access(ServerAccess(tokens=file), "127.0.0.1")
    identity = access.identify(Call(bearer(alice)))
    assert access.still_valid(identity)
    TokenFile(file).revoke(lambda token: True)
    assert not access.still_valid(identity)


def test_without_tokens_and_certificates_everybody_is_the_same():
    assert Authentication(None, needs_certificate=False).identify(Call()) is ANONYMOUS
