"""`make docs`: writes docs/api.md and docs/commands.md, from docstrings and from the dataclasses of options, and the
rooms in docs/architecture.md, from the contracts that import-linter keeps and from what each room says of itself."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sft_cloud.cli
import sft_edge.cli
from sft import SFTOptimizer, errors, lora
from sft.cli.options import Option, options_of
from sft.optimizer import SplitOptions
from sft_cloud.commands import certs, env, status, token
from sft_cloud.options import LimitOptions, MetricsOptions, ServeOptions, ServerAccess
from sft_edge import options as edge

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # import-linter brings it

DOCS = Path(__file__).parent

EDGE: Mapping[str, Sequence[type]] = {
    "train": edge.TRAIN_OPTIONS,
    "attach": [edge.AttachOptions],
    "evaluate": [edge.EvaluateOptions],
    "predict": [edge.PredictOptions],
    "compare": [edge.CompareOptions],
    "export": [edge.ExportOptions],
    "verify": [edge.VerifyOptions, edge.OptimizerOptions, edge.LinkOptions],
    "doctor": [edge.DoctorOptions, edge.LinkOptions],
    "env": [edge.EnvOptions],
    "demo": [edge.DemoOptions],
    "plan": list(edge.PLAN_OPTIONS),
    "reproduce": [edge.ReproduceOptions, edge.LinkOptions],
}
CLOUD: Mapping[str, Sequence[type]] = {
    "serve": [ServeOptions, ServerAccess, LimitOptions, MetricsOptions],
    "status": [status.StatusOptions],
    "token create": [token.CreateOptions],
    "token list": [token.ListOptions],
    "token revoke": [token.RevokeOptions],
    "certs init": [certs.InitOptions],
    "env": [env.EnvOptions],
}
_INNER = {"token create": token.create, "token list": token.list_tokens, "token revoke": token.revoke} | {
    "certs init": certs.init
}
PACKAGES = {"sft_edge": "edge_client", "sft_cloud": "cloud_server", "sft": "common"}
_ROOMS_BEGIN = "<!-- The rooms, written by `make docs` from pyproject.toml and the docstrings of the rooms. -->"
_ROOMS_END = "<!-- The end of the rooms. -->"
_NOTE = "<!-- Written by `make docs`. Do not edit: change the docstrings. -->"

_COMMANDS_HEAD = f"""\
# Commands and their options

{_NOTE}

All options of a command are also keys of a YAML or JSON file (`--config FILE`, as in [examples](../examples/configs));
flags win. Names that transformers' `TrainingArguments` has mean what they mean there.
`sft-edge COMMAND --help` and `sft-cloud COMMAND --help` say the same. A time is `30s`, `1m30s` or `2h`, a size `500MB`
or `2GiB`.

Exit codes: 0 done, 1 what nobody foresaw (with a traceback, for a report), 2 options, 3 data, 4 checkpoint or
model, 5 the cloud or the way to it, 6 training, 7 disk, 8 `verify` or `export` found a difference, 9 a run that
`--data-cap` ended early and whole, 130 interrupted. What went wrong is one line on standard error, the last. Whatever
it is, `train` saves the model as of its last whole step first, and the line says where."""

_API_HEAD = f"""\
# What a script may import

{_NOTE}

These names stay; where other things are may change from one version to the next. [optimizer.md](optimizer.md) and
[own_models.md](own_models.md) explain how they are used, [commands.md](commands.md) has the commands.

```python
from sft import SFTOptimizer, __version__
from sft.errors import SFTError  # and the classes below it
from sft.lora import resolve_lora
```"""

_VERSION = (
    "The version of the package, a `str`. [CHANGELOG.md](../CHANGELOG.md) says which versions understand each other."
)


def commands_page() -> str:
    """Every option of every command."""
    lines = [_COMMANDS_HEAD]
    for side, commands, functions in (
        ("sft-edge", EDGE, sft_edge.cli.COMMANDS),
        ("sft-cloud", CLOUD, sft_cloud.cli.COMMANDS | _INNER),
    ):
        for name, concerns in commands.items():
            about = inspect.getdoc(functions[name]) or ""
            lines += ["", f"## `{side} {name}`", "", f"{about[0].upper()}{about[1:].rstrip('.')}.", ""]
            lines += options_table(concerns)
    return "\n".join(lines) + "\n"


def options_table(concerns: Sequence[type]) -> list[str]:
    """A row an option, under a row for each concern."""
    lines = ["| option | default | what it is |", "|---|---|---|"]
    for concern in concerns:
        lines.append(f"| **{' '.join((concern.__doc__ or '').split()).rstrip('.')}** | | |")
        for option in options_of(concern):
            choices = f" {' '.join(f'`{choice}`' for choice in option.choices)}:" if option.choices else ""
            lines.append(f"| `{option.flag}` | {default_of(option)} |{choices} {option.doc} |")
    return lines


def default_of(option: Option) -> str:
    """As one would type it; empty where there is none."""
    if option.required:
        return "required"
    if option.default in (None, {}, []):
        return ""
    if isinstance(option.default, Path):  # on anybody's machine
        return f"`{str(option.default).replace(str(Path.home()), '~')}`"
    return f"`{str(option.default).lower() if option.type is bool else option.default}`"


def api_page() -> str:
    """The public names: what scripts may import and count on."""
    lines = [
        _API_HEAD,
        "",
        "## `sft.SFTOptimizer`",
        "",
        *_documented(SFTOptimizer),
        "",
        *_code(SFTOptimizer.__init__, "SFTOptimizer"),
        "",
        *_documented(SFTOptimizer.__init__),
        "",
        "| argument | default | what it is |",
        "|---|---|---|",
    ]
    lines += [f"| `{option.name}` | `{option.default!r}` | {option.doc} |" for option in options_of(SplitOptions)]
    for name, member in _public(SFTOptimizer):
        is_property = isinstance(member, property)
        lines += ["", f"### `{name}`" + (" (property)" if is_property else ""), ""]
        lines += [] if is_property else [*_code(member, name), ""]
        lines += _documented(member)
    lines += ["", "## `sft.errors`", "", "A command that ends with an error has the exit code of its class.", ""]
    lines += ["| class | exit code | what it says |", "|---|---|---|", *_error_rows(errors.SFTError)]
    lines += ["", "## `sft.lora.resolve_lora`", "", *_code(lora.resolve_lora, "resolve_lora"), ""]
    lines += [*_documented(lora.resolve_lora), "", "[lora.md](lora.md) has an example."]
    lines += ["", "## `sft.__version__`", "", _VERSION]
    return "\n".join(lines) + "\n"


def _documented(thing: object) -> list[str]:
    text = inspect.getdoc(thing)
    assert text, f"{thing} has no docstring"
    return text.splitlines()


def _public(cls: type) -> Iterator[tuple[str, Any]]:
    for name, member in vars(cls).items():
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
            yield name, member


def _code(function: Callable[..., Any], name: str) -> list[str]:
    """The signature with annotations as they are in the source, which are text: other Pythons print types otherwise."""
    words = []
    parameters = [one for one in inspect.signature(function).parameters.values() if one.name != "self"]
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        words.append(f"{parameter.name}: {parameter.annotation}{default}")
    returns = inspect.signature(function).return_annotation
    end = ")" if function.__name__ == "__init__" else f") -> {returns}"
    line = f"{name}({', '.join(words)}{end}"
    body = [line] if len(line) <= 100 else [f"{name}(", *(f"    {word}," for word in words), end]
    return ["```python", *body, "```"]


def _error_rows(cls: type[errors.SFTError], depth: int = 0) -> Iterator[str]:
    yield f"| {'&emsp;' * depth}`{cls.__name__}` | {cls.exit_code} | {' '.join(_documented(cls))} |"
    for below in cls.__subclasses__():
        if below.__module__ == errors.__name__:
            yield from _error_rows(below, depth + 1)


def architecture_page() -> str:
    """The page as it is, with the rooms of today."""
    before, begin, rest = (DOCS / "architecture.md").read_text(encoding="utf-8").partition(_ROOMS_BEGIN)
    _, end, after = rest.partition(_ROOMS_END)
    assert begin, "docs/architecture.md has lost the mark of where the rooms begin"
    assert end, "docs/architecture.md has lost the mark of where the rooms end"
    return "\n".join([before + begin, "", *drawing(), *_tables(), "", end + after])


def drawing() -> list[str]:
    """The three packages, the two sides standing on what they share."""
    columns = [[package, "", *floors_of(package)] for package in ("sft_edge", "sft_cloud")]
    height, width = max(map(len, columns)), max(len(floor) for column in columns for floor in column) + 4
    rows = zip(*([*column[:2], *[""] * (height - len(column)), *column[2:]] for column in columns), strict=True)
    side, whole = "-" * width, 2 * width + 3
    return [
        "```text",
        f"+{side}+ +{side}+",
        *(f"|{left:^{width}}| |{right:^{width}}|" for left, right in rows),
        f"+{side}+-+{side}+",
        *(f"|{floor:^{whole}}|" for floor in ["sft", "", *floors_of("sft")]),
        f"+{'-' * whole}+",
        "```",
    ]


def floors_of(package: str) -> list[str]:
    """Of the contract on its rooms, the highest first; rooms beside each other are `a | b`."""
    project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = (one for one in project["tool"]["importlinter"]["contracts"] if one.get("containers") == [package])
    return list(contract["layers"])


def _tables() -> Iterator[str]:
    for package, root in PACKAGES.items():
        yield from ["", f"### `{package}`", "", "| floor | room | what lives there |", "|---|---|---|"]
        floors = floors_of(package)
        for height, floor in zip(range(len(floors), 0, -1), floors, strict=True):
            for room in floor.split(" | "):
                path = DOCS.parent / root / package / room
                source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
                sentence = (ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
                name = f"{room}/" if path.is_dir() else f"{room}.py"
                yield f"| {height} | [`{name}`](../{root}/{package}/{name}) | {' '.join(sentence.split())} |"


PAGES = {"api.md": api_page, "commands.md": commands_page, "architecture.md": architecture_page}


if __name__ == "__main__":
    for page, write in PAGES.items():
        (DOCS / page).write_text(write(), encoding="utf-8")
        sys.stdout.write(f"{DOCS / page}\n")
