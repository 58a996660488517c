"""Command lines and configuration files from dataclasses."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Literal, Optional

import pytest

from sft.cli.options import above_zero, at_least, parse
from sft.cli.run import run
from sft.errors import CheckpointError, UsageError
from sft.version import __version__


@dataclass
class Engine:
    """The engine.

    Not part of the title.
    """

    fuel: str
    """what it burns, 100% of
    the time"""

    cylinders: int = 4
    """how many"""

    idle_speed: float = 0.5
    """turns a second"""

    starter: Literal["no", "electric", "crank"] = "electric"
    """how it starts"""

    turbo: bool = False
    """whether it has one"""

    manual: Optional[Path] = None
    """where the manual is"""

    gears: List[float] = field(default_factory=list)
    """ratios"""

    tuning: Dict[str, Any] = field(default_factory=dict)
    """further settings"""

    def __post_init__(self) -> None:
        at_least(self, 1, "cylinders")
        above_zero(self, "idle_speed")


@dataclass
class Seats:
    """The seats."""

    seat_count: Optional[int] = 4
    """how many"""


def parse_car(*argv):
    return parse([Engine, Seats], argv, "car build")


def write(path, text):
    path.write_text(text)
    return str(path)


def test_defaults_and_flags_fill_every_dataclass():
    engine, seats = parse_car("--fuel", "diesel", "--seat-count=2")
    assert engine == Engine(fuel="diesel")
    assert seats == Seats(seat_count=2)


def test_flags_have_the_types_of_their_fields():
    argv = "--fuel gas --cylinders 6 --idle-speed 5e-5 --starter crank --turbo --manual a/b --gears 1 2.5 --gears 3"
    engine, _ = parse_car(*argv.split(), "--tuning", '{"boost": 1.5}')
    assert engine == Engine("gas", 6, 5e-5, "crank", True, Path("a/b"), [1.0, 2.5, 3.0], {"boost": 1.5})


@pytest.mark.parametrize("word", ["--seat_count=3", "--seat-count=3"])
def test_underscores_and_hyphens_are_the_same(word):
    assert parse_car("--fuel", "a_b", word)[1] == Seats(3)


def test_underscores_in_values_stay():
    assert parse_car("--fuel=a_b", "--manual", "c_d")[0] == Engine("a_b", manual=Path("c_d"))


@pytest.mark.parametrize(("word", "value"), [("true", True), ("False", False), ("1", True), ("no", False)])
def test_a_flag_may_say_true_or_false(word, value):
    assert parse_car("--fuel", "gas", "--turbo", word)[0].turbo is value


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--fuel must be given"),
        (["--fuel"], "argument --fuel: expected one argument; see car build --help"),
        (["--fuel", "gas", "--wheels", "4"], "unrecognized arguments: --wheels 4; see car build --help"),
        (["--fuel", "gas", "--cyl", "4"], "unrecognized arguments: --cyl 4; see car build --help"),
        (["--fuel", "gas", "--cylinders", "4.5"], "--cylinders: '4.5' is not a whole number"),
        (["--fuel", "gas", "--cylinders", "0"], "--cylinders must be 1 or more, not 0"),
        (["--fuel", "gas", "--idle-speed", "fast"], "--idle-speed: 'fast' is not a number"),
        (["--fuel", "gas", "--idle-speed", "nan"], "--idle-speed must be above 0, not nan"),
        (["--fuel", "gas", "--idle-speed", "inf"], "--idle-speed must be above 0, not inf"),
        (["--fuel", "gas", "--starter", "kick"], "--starter: 'kick' is none of no, electric, crank"),
        (["--fuel", "gas", "--turbo", "maybe"], "--turbo: 'maybe' is neither true nor false"),
        (["--fuel", "gas", "--tuning", "[1]"], "--tuning: expected a JSON object or a mapping"),
        (["--fuel", "gas", "--tuning", "boost"], "--tuning: 'boost' is not a JSON object such as {\"name\": 1}"),
    ],
)
def test_wrong_flags_are_named(argv, message):
    with pytest.raises(UsageError) as raised:
        parse_car(*argv)
    assert str(raised.value) == message


YAML = """
# comments are fine
fuel: gas
cylinders: 6
idle-speed: 5e-5
starter: no
turbo: yes
manual: "a b"
gears: [1, 2.5]
tuning: {boost: 1e-1, mode: sport, safe: true}
seat_count: ~
"""
JSON = {
    "fuel": "gas",
    "cylinders": 6,
    "idle_speed": 5e-5,
    "starter": "no",
    "turbo": True,
    "manual": "a b",
    "gears": [1, 2.5],
    "tuning": {"boost": 0.1, "mode": "sport", "safe": True},
    "seat_count": None,
}


@pytest.mark.parametrize(("name", "text"), [("car.yaml", YAML), ("car.json", json.dumps(JSON, indent="\t"))])
def test_a_file_gives_values(tmp_path, name, text):
    tuning = {"boost": 0.1, "mode": "sport", "safe": True}
    assert parse_car("--config", write(tmp_path / name, text)) == (
        Engine("gas", 6, 5e-5, "no", True, Path("a b"), [1.0, 2.5], tuning),
        Seats(None),
    )


def test_flags_win_over_the_file_wherever_they_stand(tmp_path):
    path = write(tmp_path / "car.yaml", YAML)
    engine, seats = parse_car("--cylinders", "8", "--config", path, "--seat-count", "2")
    assert (engine.fuel, engine.cylinders, seats.seat_count) == ("gas", 8, 2)


def test_an_empty_file_gives_nothing(tmp_path):
    assert parse_car("--fuel", "gas", "--config", write(tmp_path / "a.yaml", "# nothing\n")) == (Engine("gas"), Seats())


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "wheels: 4", "{}: there is no option 'wheels'"),
        ("a.yaml", "cylinders: many", "{}: cylinders: 'many' is not a whole number"),
        ("a.yaml", "cylinders: 4.5", "{}: cylinders: '4.5' is not a whole number"),
        ("a.yaml", "cylinders: true", "{}: cylinders: 'true' is not a whole number"),
        ("a.yaml", "cylinders: [1, 2]", "{}: cylinders: expected one value, got a list"),
        ("a.yaml", "cylinders: {a: 1}", "{}: cylinders: expected one value, got a mapping"),
        ("a.json", '{"cylinders": null}', "{}: cylinders: expected one value, got nothing"),
        ("a.yaml", "starter: off", "{}: starter: 'off' is none of no, electric, crank"),
        ("a.yaml", "- fuel", "{}: expected lines of `option: value`"),
        ("a.yaml", "fuel: [", "{} is not YAML: "),
        ("a.json", "{'fuel': 1}", "{} is not JSON: "),
        ("a.yaml", "fuel: \udcff", "{} is not YAML: "),
    ],
)
def test_wrong_files_are_named_with_the_key(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError) as raised:
        parse_car("--fuel", "gas", "--config", str(path))
    assert str(raised.value).startswith("--config " + message.format(path))
    assert "\n" not in str(raised.value)


def test_a_missing_file_and_a_directory_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"--config .*gone\.yaml: No such file"):
        parse_car("--config", str(tmp_path / "gone.yaml"))
    with pytest.raises(UsageError, match=f"--config {tmp_path}: Is a directory"):
        parse_car("--config", str(tmp_path))


def test_help_has_the_docstrings_and_defaults_in_groups(capsys):
    with pytest.raises(SystemExit) as raised:
        parse([Engine, Seats], ["--help"], "car build", "Builds a car.")
    assert raised.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    expected = [
        "Builds a car.",
        "--config PATH YAML or JSON file of options",
        "The engine: --fuel TEXT what it burns, 100% of the time (required)",
        "--starter {no,electric,crank} how it starts (default: electric)",
        "--turbo [true|false] whether it has one (default: false)",
        "--manual PATH where the manual is --gears",
        "The seats: --seat-count N how many (default: 4)",
    ]
    places = [text.find(part) for part in expected]
    assert -1 not in places
    assert places == sorted(places)


COMMANDS = """
import os, signal, sys
from sft.cli.run import run
from sft.errors import CheckpointError

def torn(prog, argv):
    "Fails as a torn checkpoint does."
    raise CheckpointError("model.safetensors is torn;\\n  copy it again")

def hostile(prog, argv):
    "Repeats what a server said."
    raise CheckpointError("the server says \\x1b[2J")

def interrupted(prog, argv):
    "Is interrupted."
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()

def talk(prog, argv):
    "Says much."
    for _ in range(100_000):
        print("all work and no play")
    return 0

def broken(prog, argv):
    "Has a bug."
    return [][0]

def drive(prog, argv):
    "Says a little everywhere, and writes a file."
    with open(argv[0], "w") as file:
        print("on the road")
        print("at the wheel", file=sys.stderr, flush=True)
        os.write(2, b"of a library in C")
        sys.stdin.read()
        file.write("logbook")
    return 0

commands = (torn, hostile, interrupted, talk, broken, drive)
sys.exit(run("car", {command.__name__: command for command in commands}))
"""


def run_script(*argv, **kwargs):
    command = [sys.executable, "-c", COMMANDS, *argv]
    kwargs.setdefault("stdout", subprocess.PIPE)
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60, check=False, **kwargs)


def test_an_error_is_one_line_and_the_exit_code_of_its_class():
    done = run_script("torn")
    assert done.returncode == CheckpointError.exit_code
    assert done.stderr == "car torn: error: model.safetensors is torn; copy it again\n"


def test_an_error_cannot_draw_on_the_terminal():
    assert run_script("hostile").stderr == "car hostile: error: the server says ?[2J\n"


def test_an_interrupt_ends_without_a_traceback():
    done = run_script("interrupted")
    assert (done.returncode, done.stderr) == (130, "car interrupted: interrupted\n")


def test_a_bug_keeps_its_traceback():
    done = run_script("broken")
    assert done.returncode == 1
    assert "IndexError" in done.stderr


@pytest.mark.parametrize("closed", [1, 2])
def test_a_stream_that_is_closed_is_no_error(closed):
    """As services may be started: Python has None in its place."""
    done = run_script("talk" if closed == 1 else "torn", preexec_fn=lambda: os.close(closed))
    assert done.returncode == (0 if closed == 1 else 4)
    assert "Traceback" not in done.stderr


def test_a_reader_that_goes_away_ends_quietly():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as reader:
        done = run_script("talk", stdout=reader.stdin)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_behind_stdout_is_a_storage_error():
    with open("/dev/full", "w") as full:
        done = run_script("talk", stdout=full)
    assert done.returncode == 7
    assert done.stderr == (
        "car talk: error: cannot write the output: No space left on device; free some space and run again\n"
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_lead_nowhere(tmp_path, closed):
    logbook = tmp_path / "logbook"
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", COMMANDS, "drive", str(logbook)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0
    assert logbook.read_text() == "logbook"
    assert done.stdout == (b"" if ">&-" in closed.replace("2>", "2") else b"on the road\n")
    assert done.stderr == (b"" if "2>&-" in closed else b"at the wheel\nof a library in C")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_a_full_disk_is_told_whatever_was_asked(arguments):
    with open("/dev/full", "w") as full:
        done = run_script(*arguments, stdout=full)
    assert done.returncode == 7
    assert done.stderr.count("\n") == 1
    assert "cannot write the output" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize(("command", "code"), [("torn", 4), ("broken", 1), ("interrupted", 130)])
def test_where_nothing_can_be_told_the_exit_code_is_left(command, code):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", COMMANDS, command], stderr=full, timeout=60, check=False)
    assert done.returncode == code


def ride(prog, argv):
    """Rides, and returns how many arguments it got.

    More about it.
    """
    assert prog == "car ride"
    return len(argv)


def test_run_hands_the_arguments_to_the_command():
    assert run("car", {"ride": ride}, ["ride", "a", "--help"]) == 2


def test_run_lists_the_commands(capsys):
    assert run("car", {"ride": ride}, ["--help"]) == 0
    assert "\n  ride  Rides, and returns how many arguments it got.\n" in capsys.readouterr().out
    assert run("car", {"ride": ride}, []) == 2
    assert "\n  ride  Rides" in capsys.readouterr().err
    assert run("car", {"ride": ride}, ["fly"]) == 2
    assert capsys.readouterr().err == "car: error: there is no command 'fly'; the commands are ride\n"


def test_run_tells_the_version(capsys):
    assert run("car", {"ride": ride}, ["--version"]) == 0
    assert capsys.readouterr().out == f"car {__version__}\n"


def test_a_process_in_which_libraries_would_end_is_told_why(monkeypatch, capsys, tmp_path):
    rides = {"ride": lambda name, argv: 0}
    assert run("car", rides, ["ride"]) == 0
    monkeypatch.setattr(sys, "flags", SimpleNamespace(optimize=2))
    assert run("car", rides, []) == 2
    assert "error: Python's -OO, or PYTHONOPTIMIZE=2, leaves out" in capsys.readouterr().err
    monkeypatch.undo()
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run("car", rides, ["ride"]) == 2
    assert "error: the working folder is gone" in capsys.readouterr().err
