"""A room is entered by its door: others import what its `__init__.py` lists, from there and no file behind it.

In `commands/` every file is a door, and so it is in `sft`, which is what both sides share: their `__init__.py` lists
nothing, so that `--help` does not wait for what one of the files imports.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Iterator, List, Optional

import pytest

ROOT = Path(__file__).parents[2]
SIDES = [ROOT / "edge_client" / "sft_edge", ROOT / "cloud_server" / "sft_cloud"]


def face(room: Path) -> Optional[List[str]]:
    """What `__all__` of a room lists; None where it has none, or there is no such room."""
    if not (room / "__init__.py").is_file():
        return None
    for node in ast.parse((room / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return list(ast.literal_eval(node.value))
    return None


def past_a_door(side: Path, file: Path) -> Iterator[str]:
    """The imports of a file that reach into a room of its side otherwise than by its door."""
    own = file.relative_to(side).parts[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        imported = [(node.module or "", alias.name) for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        imported += [(alias.name, "") for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level:
            yield f"{file.name}:{node.lineno}: {node.module or ''} by a relative way"
        for module, name in imported:
            package, _, rest = module.partition(".")
            room, _, behind = rest.partition(".")
            listed = face(side / room) if package == side.name and room else None
            if module == side.name and face(side / name) is not None:
                yield f"{file.name}:{node.lineno}: {name}, the room itself"
            if listed is None:
                continue
            if room == own and not behind and not (side / room / f"{name}.py").is_file():
                yield f"{file.name}:{node.lineno}: {name} through the door of its own room"
            elif room != own and (behind or name not in listed):
                yield f"{file.name}:{node.lineno}: {module}.{name}"


@pytest.mark.parametrize("side", SIDES, ids=lambda side: side.name)
def test_rooms_are_entered_by_their_doors(side: Path) -> None:
    found = {str(file.relative_to(ROOT)): list(past_a_door(side, file)) for file in side.rglob("*.py")}
    assert len(found) > 50
    assert {file: imports for file, imports in found.items() if imports} == {}


@pytest.mark.parametrize("side", SIDES, ids=lambda side: side.name)
def test_every_room_says_what_lives_there(side: Path) -> None:
    rooms = [path.parent for path in side.glob("*/__init__.py")]
    assert rooms
    for room in rooms:
        assert ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8"))), room
        assert room.name == "commands" or face(room) is not None, room


def test_who_reaches_past_a_door_is_found(tmp_path: Path) -> None:
    room = tmp_path / "side" / "room"
    room.mkdir(parents=True)
    (room / "__init__.py").write_text('"""A room."""\nfrom side.room.inner import listed\n__all__ = ["listed"]\n')
    (room / "inner.py").write_text("from side.room import listed\n")
    other = tmp_path / "side" / "other.py"
    other.write_text(
        "from side.room import listed\nfrom side.room import hidden\nfrom side.room.inner import listed\n"
        "import side.room.inner\nfrom side import room\nfrom .room.inner import listed\n"
    )
    side = tmp_path / "side"
    assert list(past_a_door(side, other)) == [
        "other.py:2: side.room.hidden",
        "other.py:3: side.room.inner.listed",
        "other.py:4: side.room.inner.",
        "other.py:5: room, the room itself",
        "other.py:6: room.inner by a relative way",
    ]
    assert list(past_a_door(side, room / "inner.py")) == ["inner.py:1: listed through the door of its own room"]
