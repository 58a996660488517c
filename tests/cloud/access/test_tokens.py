"""The token file: what commands make of it, and what a running server sees."""

import json
import logging
import multiprocessing
import os
import re
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.errors import StorageError, UsageError
from sft_cloud.access import tokens
from sft_cloud.access import watched_files as reread
from sft_cloud.access.tokens import LiveTokens, TokenFile
from sft_cloud.commands.token import token_command
from sft_cloud.identity import Identity, Limits

LIMITS = Limits(2, 16, ("bert-*", "*/minilm"), 1.5, 10**9, 10**8)


class Clock:
    """Says what it is told."""

    def __init__(self, now=1_800_000_000.0):
        self.now = now

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def file(tmp_path, clock):
    return TokenFile(tmp_path / "new" / "tokens.json", clock)


def create(file, name="alice", limits=LIMITS, lifetime=3600.0, sees_all=False):
    return file.create(name, limits, lifetime, sees_all)


def test_a_token_comes_back_from_the_file_as_it_was_made(file, clock):
    token, text = create(file, sees_all=True)
    assert file.read() == {token.id: token}
    assert LiveTokens(file.path).find(text) == token
    assert token.identity == Identity("alice", LIMITS, clock.now + 3600, True, token.id)
    assert text.startswith(f"sft_{token.id}_")
    assert len(text) == 4 + 12 + 1 + 43


def test_the_file_has_no_secret_in_it_and_nobody_else_may_read_it(file):
    _, text = create(file)
    secret = text.split("_", 2)[2]
    for path in file.path.parent.iterdir():
        assert secret not in path.read_text()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.path.parent.stat().st_mode) == 0o700


def test_what_is_nearly_a_token_is_none(file):
    token, text = create(file)
    live = LiveTokens(file.path)
    _, other = create(file, "bob")
    secret, others = text.split("_", 2)[2], other.split("_", 2)[2]
    nearly = [text[:-1], text + "A", text[4:], text.upper(), "", "sft_", f"sft_{token.id}_", f"sft_{token.id}_{others}"]
    nearly += [f"sft_{'0' * 12}_{secret}", f"sft_{token.id}_{token.sha256[:43]}", text + "\n", f"é{text}"]
    assert [text for text in nearly if live.find(text) is not None] == []
    assert live.find(text) == token
    assert live.find(other).name == "bob"


def test_a_token_expires_and_is_revoked(file, clock):
    token, text = create(file)
    lasting, _ = create(file, "bob", lifetime=None)
    assert token.state(clock.now + 3599) == "valid"
    assert token.state(clock.now + 3600) == "expired"
    assert lasting.state(clock.now + 10**9) == "valid"
    clock.now += 10
    assert [revoked.id for revoked in file.revoke(lambda one: one.name == "alice")] == [token.id]
    assert file.revoke(lambda one: True) == [file.read()[lasting.id]]
    found = LiveTokens(file.path).find(text)
    assert (found.revoked, found.state(clock.now)) == (clock.now, "revoked")


@pytest.mark.parametrize("name", ["", "a" * 65, "../x", "a/b", ".x", "-x", "anonymous", "a b", "a\n", "ä"])
def test_a_name_that_would_be_trouble_is_refused(file, name):
    with pytest.raises(ValueError, match="cannot be a caller's name"):
        create(file, name)
    assert not file.path.exists()


def test_a_running_server_sees_what_changes(file, caplog):
    token, text = create(file)
    live = LiveTokens(file.path)
    _, later = create(file, "bob")
    with caplog.at_level(logging.INFO):
        assert live.find(later).name == "bob"
    assert "tokens read again" in caplog.text
    file.revoke(lambda one: one.id == token.id)
    assert live.find(text).revoked is not None
    assert live.get(token.id).revoked is not None
    assert later not in caplog.text


BAD = {
    "torn": lambda good: good[: len(good) // 2],
    "empty": lambda good: "",
    "a list": lambda good: "[]",
    "another version": lambda good: good.replace('"version": 1', '"version": 2'),
    "a limit that there is not": lambda good: good.replace("max_sessions", "max_cats"),
    "no steps at all": lambda good: good.replace('"steps_per_second": 1.5', '"steps_per_second": 0'),
    "steps without end": lambda good: good.replace('"steps_per_second": 1.5', '"steps_per_second": Infinity'),
    "a limit that is text": lambda good: good.replace('"max_sessions": 2', '"max_sessions": "2"'),
    "a negative limit": lambda good: good.replace('"max_sessions": 2', '"max_sessions": -2'),
    "models that are text": lambda good: good.replace('"bert-*"', "7"),
    "a hash that is none": lambda good: good.replace('"sha256": "', '"sha256": "x'),
    "a time that is none": lambda good: good.replace('"created": "', '"created": "x'),
    "a time without a zone": lambda good: good.replace("+00:00", ""),
    "a name that is none": lambda good: good.replace('"alice"', '"../alice"'),
    "sees_all as text": lambda good: good.replace('"sees_all": false', '"sees_all": "false"'),
    "limits that are a list": lambda good: re.sub(r'"limits": \{.*?\}', '"limits": []', good, flags=re.DOTALL),
    "limits that are nothing": lambda good: re.sub(r'"limits": \{.*?\}', '"limits": null', good, flags=re.DOTALL),
    "a limit beyond the wire": lambda good: good.replace('"max_sessions": 2', '"max_sessions": 1' + 30 * "0"),
    "a limit without end": lambda good: good.replace('"steps_per_second": 1.5', '"steps_per_second": Infinity'),
    "half a session": lambda good: good.replace('"max_sessions": 2', '"max_sessions": 1.5'),
    "a time before time": lambda good: re.sub(r'"created": "[^"]*"', '"created": "0001-01-01T00:00:00+14:00"', good),
    "an id that is none": lambda good: re.sub(r'"id": "[^"]*"', '"id": ["a"]', good),
    "an id that is a number": lambda good: re.sub(r'"id": "[^"]*"', '"id": 7', good),
    "brackets without end": lambda good: 100_000 * "[",
    "a field that there is not": lambda good: good.replace('"sees_all"', '"sees_nothing"'),
    "a token twice": lambda good: json.dumps({**json.loads(good), "tokens": json.loads(good)["tokens"] * 2}),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_bad_file_is_an_error_at_the_start_and_leaves_a_running_server_its_tokens(file, caplog, bad):
    token, text = create(file)
    live = LiveTokens(file.path)
    good = file.path.read_text()
    file.path.write_text(bad(good))
    with pytest.raises(UsageError, match=r"tokens\.json makes no sense") as caught:
        LiveTokens(file.path)
    assert "\n" not in str(caught.value)
    for change in (lambda: create(file), lambda: file.revoke(lambda one: True)):
        with pytest.raises(UsageError, match="makes no sense"):
            change()
    assert file.path.read_text() == bad(good)
    for _ in range(3):
        assert live.find(text) == token
    assert [record.message for record in caplog.records] == ["the tokens of before go on counting"]  # once
    file.path.write_text(good.replace("alice", "carol"))
    assert live.find(text).name == "carol"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["1e999", "0001-01-01"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ENTRY = {"id": "0" * 12, "name": "alice", "sha256": "0" * 64, "created": "2026-01-01T00:00:00+00:00", "expires": None}
ENTRY = {**ENTRY, "revoked": None, "sees_all": False, "limits": {}}
ODD_LIMITS = st.dictionaries(st.sampled_from(tokens.LIMIT_NAMES), JSON, max_size=3)
ODD_ENTRIES = st.dictionaries(st.sampled_from(sorted(ENTRY)), JSON | ODD_LIMITS, max_size=2).map(
    lambda odd: {"version": 1, "tokens": [{**ENTRY, **odd}]}
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(JSON | ODD_ENTRIES | JSON.map(lambda entries: {"version": 1, "tokens": entries}))
def test_whatever_json_is_in_the_file_it_is_tokens_or_one_error(tmp_path_factory, document):
    path = tmp_path_factory.getbasetemp() / "odd.json"
    path.write_text(json.dumps(document))
    code = 0
    try:
        TokenFile(path).read()
    except UsageError:
        code = UsageError.exit_code
    assert token_command("token", ["list", "--tokens", str(path)]) == code


def test_a_revocation_that_could_not_be_read_at_first_is_seen_all_the_same(file, clock, caplog, monkeypatch):
    token, text = create(file)
    live = LiveTokens(file.path, clock)
    tries = []

    def fails(path, what):
        tries.append(clock.now)
        raise UsageError(f"{what} {path}: Too many open files")

    file.revoke(lambda one: True)
    with monkeypatch.context() as patched:
        patched.setattr(tokens, "read_file", fails)
        for _ in range(3):
            assert live.find(text) == token  # as before
        clock.now += reread.RETRY_SECONDS
        assert live.find(text) == token
    assert len(tries) == 2  # not at every message
    assert [record.message for record in caplog.records] == ["the tokens of before go on counting"]  # once
    assert live.find(text).revoked is None  # it is not time yet
    clock.now += reread.RETRY_SECONDS
    assert live.find(text).revoked is not None


def test_a_file_that_is_gone(file, caplog):
    with pytest.raises(UsageError, match=r"token file .*tokens\.json: No such file"):
        LiveTokens(file.path)
    with pytest.raises(UsageError, match="No such file"):
        file.revoke(lambda one: True)
    token, text = create(file)
    live = LiveTokens(file.path)
    file.path.unlink()
    assert live.find(text) == token
    assert "the tokens of before go on counting" in caplog.text


def test_a_file_that_others_may_write_is_told(file, caplog):
    create(file)
    LiveTokens(file.path)
    assert caplog.text == ""
    file.path.chmod(0o620)
    LiveTokens(file.path)
    assert "others may write the token file" in caplog.text


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        create(TokenFile(tmp_path / "file" / "tokens.json"))


def _create_some(path, name, count):
    for _ in range(count):
        TokenFile(path).create(name, Limits(), None, False)


def test_commands_at_the_same_time_lose_nothing(tmp_path):
    path = tmp_path / "tokens.json"
    processes = [
        multiprocessing.get_context("fork").Process(target=_create_some, args=(path, name, 20)) for name in "abc"
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    names = [token.name for token in TokenFile(path).read().values()]
    assert {name: names.count(name) for name in "abc"} == {"a": 20, "b": 20, "c": 20}
    assert sorted(os.listdir(tmp_path)) == ["tokens.json", "tokens.json.lock"]
