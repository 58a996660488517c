"""What documents name is there: files, headings, functions, targets of make; and the index has every page."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {"sft": "common", "sft_edge": "edge_client", "sft_cloud": "cloud_server"}
INDEX = ROOT / "docs" / "README.md"
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md"), *ROOT.glob(".github/*.md")]
)
FOLDERS = [*SOURCES.values(), ".ci", "bench", "docker", "docs", "examples", "proto", "tests"]
PROGRAMS = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.is_file()
    and (path.suffix in (".py", ".sh", ".proto") or path.name.startswith("Dockerfile"))
    and "_pb2" not in path.name
    and path != Path(__file__)
)
CONFIGURATIONS = [ROOT / name for name in ("Makefile", "pyproject.toml", "docker-compose.yml")]
# The changelog names what is no more.
TEXTS = [*(path for path in DOCUMENTS if path.name != "CHANGELOG.md"), *PROGRAMS, *CONFIGURATIONS]
NO_FILES = {"docker/dockerfile"}  # an image
NO_MODULES = {"sft.json", "sft.roles", "sft.v1.SplitTraining", "sft.repeated", "sft.session"}
"""A file, a group of entry points, a service, and attributes of spans."""


def prose(document: Path) -> str:
    """Without the blocks of code."""
    return re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def links(document: Path) -> list[tuple[Path, str]]:
    """What a document links to in this project: the file and, where one is named, the heading."""
    found = re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)]*))?\)", prose(document))
    return [((document.parent / name).resolve() if name else document, heading) for name, heading in found]


def anchors(document: Path) -> set[str]:
    """The headings, as GitHub names them in addresses."""
    headings = re.findall(r"^#+ (.*)$", prose(document), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def names_in(source: Path) -> set[str]:
    """What a module defines: functions, classes, `Class.method`, and constants."""
    names: set[str] = set()
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        for target in node.targets if isinstance(node, ast.Assign) else []:
            names |= {target.id} if isinstance(target, ast.Name) else set()
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names


def missing_links(document: Path) -> list[str]:
    wrong = [str(path) for path, _ in links(document) if not path.exists()]
    return wrong + [
        f"{path.name}#{heading}"
        for path, heading in links(document)
        if heading and path.suffix == ".md" and path.exists() and heading not in anchors(path)
    ]


def missing_names(document: Path) -> list[str]:
    """Of `[file.py](path/file.py): `name`, `Class.method``."""
    wrong = []
    for path, listed in re.findall(r"\]\(([^)]+\.py)\):\s((?:`[\w.]+`(?:,\s)?)+)", prose(document)):
        known = names_in(document.parent / path)
        wrong += [f"{path}: {name}" for name in re.findall(r"`([\w.]+)`", listed) if name not in known]
    return wrong


def missing_paths(text: str) -> list[str]:
    """Files and folders of this project that a text names from the root."""
    named = re.findall(
        r"(?<![\w./-])((?:common|edge_client|cloud_server|bench|docker|docs|examples|proto|tests)/[\w/.-]*\w)", text
    )
    named += re.findall(r"\b(bench/\w+\.py)", text)
    return [name for name in named if name not in NO_FILES and not (ROOT / name).exists()]


def missing_modules(text: str) -> list[str]:
    """Modules, and names in them, as in `sft.models.cut` and `sft.models.cut.Cut`."""
    wrong = []
    for dotted in re.findall(r"`((?:sft|sft_edge|sft_cloud)(?:\.\w+)+)`", text):
        if dotted in NO_MODULES:
            continue
        package, *rest = dotted.split(".")
        path = ROOT / SOURCES[package] / package
        while rest and ((path / rest[0]).is_dir() or (path / f"{rest[0]}.py").is_file()):
            path = path / rest.pop(0)
        module = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if rest and not re.search(rf"\b{rest[0]}\b", module.read_text(encoding="utf-8")):
            wrong.append(dotted)
    return wrong


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(document: Path) -> None:
    assert missing_links(document) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_function_is_in_the_file_it_is_said_to_be_in(document: Path) -> None:
    assert missing_names(document) == []


@pytest.mark.parametrize("missing", [missing_paths, missing_modules])
def test_every_file_and_module_that_is_named_exists(missing) -> None:  # type: ignore[no-untyped-def]
    found = {str(path.relative_to(ROOT)): missing(path.read_text(encoding="utf-8")) for path in TEXTS}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_make_target_exists(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"(?:^ *|`)(?:sudo |\w+=\w+ )*make ([a-z0-9-]+)", text, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_index_has_every_page_once_in_four_groups() -> None:
    text = INDEX.read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == ["Start", "Use", "Operate", "Inside"]
    listed = sorted(path.name for path, _ in links(INDEX) if path.parent == INDEX.parent)
    assert listed == sorted(path.name for path in (ROOT / "docs").glob("*.md") if path != INDEX)


def test_every_line_of_algorithm_1_has_its_place() -> None:
    table = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = table.partition("## Algorithm 1, line by line\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \|.*\]\(\.\./[\w/]+\.py\): `", table, flags=re.MULTILINE)
    assert rows == [str(line) for line in range(1, 15)]


def test_what_is_missing_is_found(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(
        "LIMIT = 1\n\n\ndef here():\n    pass\n\n\nclass A:\n    def method(self):\n        pass\n"
    )
    document = tmp_path / "page.md"
    document.write_text(
        "# A page: of `what`?\n\n[a](no.md) [b](page.md#nowhere) [c](#a-page-of-what) [d](https://example.org/no.md)\n"
        "[code.py](code.py): `here`, `A.method`, `LIMIT`, `A`\n[code.py](code.py): `gone`, `here`,\n`A.gone`\n"
        "```\n[e](in_code.md)\n```\n"
    )
    assert missing_links(document) == [str(tmp_path / "no.md"), "page.md#nowhere"]
    assert missing_names(document) == ["code.py: gone", "code.py: A.gone"]
    assert missing_paths("see common/sft/batch.py, common/sft/gone.py and (tests/support)") == ["common/sft/gone.py"]
    assert missing_modules("`sft.batch.Batch` `sft.batch.Gone` `sft.models.cut` `sft.gone.cut` `sft.lora`") == [
        "sft.batch.Gone",
        "sft.gone.cut",
    ]
