"""docs/security.md says what the code does."""

import json
import re
import shlex
from datetime import datetime
from pathlib import Path

import pytest

from sft.cli.options import options_of
from sft.v1 import split_training_pb2 as pb
from sft_cloud.access import interceptor as access
from sft_cloud.access.tokens import LIMIT_NAMES
from sft_cloud.commands.certs import InitOptions
from sft_cloud.commands.token import CreateOptions, ListOptions, RevokeOptions
from sft_cloud.observability.audit import MAX_TEXT, REFUSALS_PER_SECOND, AuditLog
from sft_cloud.observability.call_record import CallRecord
from sft_cloud.options import LimitOptions, MetricsOptions, ServeOptions, ServerAccess
from sft_cloud.server import GRACE_SECONDS, IDENTITIES_SECONDS
from sft_edge.options.train import TRAIN_OPTIONS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
COMMANDS = {
    "sft-cloud serve": (ServeOptions, ServerAccess, LimitOptions, MetricsOptions),
    "sft-cloud certs init": (InitOptions,),
    "sft-cloud token create": (CreateOptions,),
    "sft-cloud token list": (ListOptions,),
    "sft-cloud token revoke": (RevokeOptions,),
    "sft-edge train": TRAIN_OPTIONS,
}


def flags_of(command):
    return {option.flag for concern in COMMANDS[command] for option in options_of(concern)}


LINES = [
    line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines() if "sft-" in line
]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("sft-")])
def test_every_command_has_the_flags_it_is_shown_with(line):
    (command,) = (name for name in COMMANDS if line.startswith(name))
    shown = {word for word in shlex.split(line) if word.startswith("--")}
    assert shown
    assert shown <= flags_of(command)


def test_every_flag_that_is_named_exists():
    known = set().union(*map(flags_of, COMMANDS))
    assert set(re.findall(r"--[a-z][a-z-]+", TEXT)) - known == set()


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## )", TEXT, re.DOTALL | re.MULTILINE)[1]


def test_every_limit_of_a_token_is_in_the_table():
    table = re.findall(r"^\| `(--[a-z-]+)` \|", section("Tokens"), re.MULTILINE)
    assert table == ["--" + name.replace("_", "-") for name in (*LIMIT_NAMES, "sees_all")]


LIMITS = section("Limits of the server, and the audit log")


def test_every_limit_of_the_server_is_in_the_table_with_its_default():
    table = dict(re.findall(r"^\| `(--[a-z-]+)` \| (.*?) \|", LIMITS, re.MULTILINE))
    limits = {option.flag: option for option in options_of(LimitOptions)}
    assert set(limits) - set(table) == set()
    known = {**{option.flag: option for option in options_of(ServeOptions)}, **limits}
    for flag, default in table.items():
        value = known[flag].default
        assert not default.startswith("`") if value is None else default == f"`{str(value).lower()}`", flag


def test_no_option_of_serve_is_undocumented():
    written = [path for path in (ROOT / "docs").glob("*.md") if path.name != "commands.md"]  # that one is generated
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *written)]
    named = set(re.findall(r"--[a-z][a-z-]+", "".join(texts)))
    assert flags_of("sft-cloud serve") - named == set()


def test_the_lines_of_the_audit_log_are_as_they_are_shown(tmp_path):
    shown = [json.loads(line) for line in re.search(r"```json\n(.*?)```", LIMITS, re.DOTALL)[1].splitlines()]
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, lambda: datetime.fromisoformat(shown[0]["time"]).timestamp())
    record = CallRecord(log, "/sft.v1.SplitTraining/OpenSession", shown[0]["peer"], shown[0]["who"])
    record.requested(pb.OpenSessionRequest(model_name=shown[0]["model"], cut=pb.Cut(split_rank=8)))
    record.answered(pb.OpenSessionResponse(session_id=shown[0]["session"] + "x" * 20))
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert written == shown[:1]
    assert list(shown[1]) == ["time", "who", "peer", "what", "code", "reason"]


def test_what_is_said_of_the_audit_log():
    assert f"cut at {MAX_TEXT} characters" in " ".join(LIMITS.split())
    assert "at most ten lines a second" in LIMITS
    assert REFUSALS_PER_SECOND == access.REFUSALS_PER_SECOND == 10
    assert "calls then have three seconds more to end" in LIMITS
    assert GRACE_SECONDS == 3


def test_the_time_that_an_idle_stream_has():
    assert "an idle stream within ten seconds" in " ".join(TEXT.split())
    assert IDENTITIES_SECONDS == 10
