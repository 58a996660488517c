"""`sft-cloud token`, in this process."""

import json
import re
from datetime import datetime, timezone

import pytest

from sft_cloud.access.tokens import TokenFile
from sft_cloud.cli import main


@pytest.fixture
def run(tmp_path, capsys):
    """`run("list", ...)` with the file of this test; gives (exit code, standard output, standard error)."""

    def command(name, *flags):
        code = main(["token", name, "--tokens", str(tmp_path / "tokens.json"), *flags])
        told = capsys.readouterr()
        return code, told.out, told.err

    return command


@pytest.fixture
def file(tmp_path):
    return TokenFile(tmp_path / "tokens.json")


def test_a_token_is_made_with_every_limit_and_printed_alone(run, file):
    flags = ["--max-sessions=2", "--max-split-rank=16", "--steps-per-second=0.5", "--max-bytes-per-day=1000000"]
    flags += ["--max-upload-bytes=0", "--max-memory=5000", "--models", "bert-*", "gpt2", "--sees-all"]
    flags += ["--expires=1d12h"]
    code, out, err = run("create", "--name", "alice", *flags)
    assert (code, len(out.splitlines())) == (0, 1)
    (token,) = file.read().values()
    assert re.fullmatch(rf"sft_{token.id}_[\w-]{{43}}\n", out)
    assert (token.name, token.sees_all, token.expires - token.created) == ("alice", True, 36 * 3600)
    limits = token.limits
    assert (limits.max_sessions, limits.max_split_rank, limits.steps_per_second) == (2, 16, 0.5)
    assert (limits.max_bytes_per_day, limits.max_upload_bytes, limits.models) == (10**6, 0, ("bert-*", "gpt2"))
    assert limits.max_memory == 5000
    assert err.startswith(f"token {token.id} of alice, good until ")
    assert out.strip() not in err


def test_a_token_lasts_ninety_days_unless_told_otherwise(run, file):
    run("create", "--name", "alice")
    run("create", "--name", "bob", "--expires", "0s")
    alice, bob = file.read().values()
    assert alice.expires - alice.created == 90 * 86400
    assert bob.expires is None
    assert alice.limits == bob.limits == type(alice.limits)()


def test_a_token_may_last_for_a_hundred_years(run, file):
    assert run("create", "--name", "alice", "--expires", "36525d", "--max-sessions", "4294967295")[0] == 0
    assert run("list")[0] == 0


def test_the_list_shows_everything_but_what_lets_in(run, file):
    _, secret, _ = run("create", "--name", "alice", "--max-sessions=2", "--models", "bert-*", "gpt2")
    run("create", "--name", "bob", "--expires=0s", "--sees-all")
    alice, bob = file.read().values()
    assert run("revoke", "--name", "bob") == (0, f"revoked {bob.id} of bob\n", "")
    code, out, err = run("list")
    until = datetime.fromtimestamp(alice.expires, timezone.utc).isoformat(timespec="seconds")
    assert (code, err) == (0, "")
    assert [line.split() for line in out.splitlines()] == [
        ["id", "name", "state", "expires", "limits"],
        [alice.id, "alice", "valid", until, "max-sessions=2", "models=bert-*,gpt2"],
        [bob.id, "bob", "revoked", "sees-all"],
    ]
    _, as_json, _ = run("list", "--json")
    first, second = json.loads(as_json)
    assert first["limits"] == {"max_sessions": 2, "models": ["bert-*", "gpt2"]}
    assert (second["state"], second["expires"], second["sees_all"]) == ("revoked", None, True)
    for text in (out, as_json):
        assert secret.strip() not in text
        assert alice.sha256 not in text


def test_one_token_of_a_name_is_revoked_by_its_id(run, file):
    run("create", "--name", "alice")
    run("create", "--name", "alice")
    old, new = file.read().values()
    assert run("revoke", "--id", old.id) == (0, f"revoked {old.id} of alice\n", "")
    assert [token.revoked is None for token in file.read().values()] == [False, True]
    assert run("revoke", "--name", "alice") == (0, f"revoked {new.id} of alice\n", "")
    assert run("revoke", "--name", "alice") == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["create", "--name", "../alice"], "--name: '../alice' cannot be a caller's name"),
        (["create"], "--name must be given"),
        (["create", "--name", "a", "--max-sessions", "-1"], "--max-sessions must be 0 or more"),
        (["create", "--name", "a", "--steps-per-second", "nan"], "--steps-per-second must be above 0"),
        (["create", "--name", "a", "--steps-per-second", "0"], "--steps-per-second must be above 0, not 0"),
        (["create", "--name", "a", "--expires", "90"], "--expires: '90' is not a duration"),
        (["create", "--name", "a", "--expires", "9999999d"], "--expires must be 36525d (a hundred years) or less"),
        (["create", "--name", "a", "--max-sessions", "4294967296"], "--max-sessions must be 4294967295 or less"),
        (["create", "--name", "a", "--max-upload-bytes", "1" + 30 * "0"], "--max-upload-bytes must be 9223"),
        (["create", "--name", "a", "--token", "x"], "unrecognized arguments: --token x"),  # secrets are no flags
        (["list"], "token file"),
        (["revoke"], "exactly one of --id and --name"),
        (["revoke", "--id", "a", "--name", "b"], "exactly one of --id and --name"),
        (["revoke", "--id", "a"], "No such file"),
    ],
    ids=str,
)
def test_bad_flags_are_one_line(run, arguments, says):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1


def test_a_token_that_there_is_not_is_said_with_where_to_look(run):
    run("create", "--name", "alice")
    code, _, err = run("revoke", "--name", "bob")
    assert code == 2
    assert "has no token of bob; `sft-cloud token list`" in err


def test_the_commands_are_listed(capsys):
    assert main(["token"]) == 2
    assert main(["token", "--help"]) == 0
    out = capsys.readouterr().out
    assert [name for name in ("create", "list", "revoke") if f"  {name}" in out] == ["create", "list", "revoke"]
    assert main(["token", "steal"]) == 2
    assert "sft-cloud token: error: there is no command 'steal'" in capsys.readouterr().err
