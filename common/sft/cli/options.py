"""Command lines and configuration files from dataclasses.

A dataclass holds one concern. Each field is an option: its name with hyphens is the flag (underscores are accepted
too), its type says how text is read, the docstring under it is the help. `--config FILE` (YAML or JSON) gives values
that flags win over. A dataclass checks its own values in `__post_init__` and raises `UsageError` naming the flag.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import math
import os
import textwrap
from functools import lru_cache
from pathlib import Path
from typing import (
    Any,
    Dict,
    List,
    Literal,
    Mapping,
    NoReturn,
    Optional,
    Sequence,
    Tuple,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from sft.cli.durations import Duration
from sft.cli.sizes import Size
from sft.cli.whole_or_auto import WholeOrAuto
from sft.errors import UsageError

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_NULL = ("", "~", "null", "Null", "NULL")


def parse(
    dataclass_types: Sequence[type], argv: Sequence[str], prog: str, description: Optional[str] = None
) -> Tuple[Any, ...]:
    """One instance of every dataclass, in order, from the flags in `argv` and the file they may name with `--config`.

    Prints the options and exits with 0 for `--help`. Raises UsageError for anything that cannot be understood.
    """
    options = {option.name: option for cls in dataclass_types for option in options_of(cls)}
    arguments = vars(_parser(dataclass_types, prog, description).parse_args(_with_hyphens(argv)))
    config_file = arguments.pop("config", None)
    values = {} if config_file is None else _read_file(Path(at_home(config_file, "--config")), options)
    for name, raw in arguments.items():
        values[name] = _convert(options[name], raw, options[name].flag)
    missing = [option.flag for option in options.values() if option.required and option.name not in values]
    if missing:
        raise UsageError(f"{' and '.join(missing)} must be given")
    fields = [(cls, [field.name for field in dataclasses.fields(cls)]) for cls in dataclass_types]
    return tuple(cls(**{name: values[name] for name in names if name in values}) for cls, names in fields)


def parse_scalar(text: str) -> Union[bool, int, float, str]:
    """`true` and `false`, whole numbers, numbers; anything else stays text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def spelled(field: str, dashes: str = "--") -> str:
    """How the user knows an option: `--tls-ca` on a command line, `tls_ca` where there are no `dashes`, in a script."""
    return dashes + field.replace("_", "-") if dashes else field


def flag(name: str) -> str:
    """The flag of a field."""
    return spelled(name, "--")


def at_home(path: str, where: str) -> str:
    """A path whose `~` is a home directory, as shells have it where it stands alone. Raises UsageError."""
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path:
        raise UsageError(f"{where}: no home directory is known for {path!r}; a folder of that name is ./{path}")
    return expanded


def at_least(options: object, bound: float, *names: str) -> None:
    """Raises UsageError unless each of these fields is None or a finite number of `bound` or more."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not bound <= value < math.inf:
            raise UsageError(f"{flag(name)} must be {bound} or more, not {value}")


def above_zero(options: object, *names: str) -> None:
    """Raises UsageError unless each of these fields is None or a finite number above 0."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{flag(name)} must be above 0, not {value}")


class Option:
    """What the command line needs to know of a field."""

    def __init__(self, field: dataclasses.Field[Any], hint: Any, doc: str) -> None:
        self.name = field.name
        self.flag = flag(field.name)
        self.doc = doc
        self.default = _default_of(field)
        self.required = self.default is dataclasses.MISSING
        self.alone: Optional[str] = field.metadata.get("alone")
        """What the flag means without a value."""
        self.names_place: bool = field.metadata.get("names_place", False)
        """Whether its text may be a path, although it may be something else, too."""
        self.optional = type(None) in get_args(hint)
        if self.optional:
            (hint,) = [argument for argument in get_args(hint) if argument is not type(None)]
        self.many = get_origin(hint) is list
        self.type = get_args(hint)[0] if self.many else hint
        self.choices = get_args(hint) if get_origin(hint) is Literal else ()

    @property
    def metavar(self) -> str:
        if self.choices:
            return "{" + ",".join(self.choices) + "}"
        names = {bool: "true|false", int: "N", float: "X", Duration: "TIME", Size: "SIZE", Path: "PATH", str: "TEXT"}
        names[WholeOrAuto] = "N|auto"
        return names.get(self.type, "JSON")

    @property
    def help(self) -> str:
        default = self.default
        if self.required:
            note = "required"
        elif default is None or default == []:
            return self.doc.replace("%", "%%")
        else:
            note = f"default: {str(default).lower() if isinstance(default, bool) else default}"
        return f"{self.doc} ({note})".replace("%", "%%")


def _default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is dataclasses.MISSING:
        return field.default
    try:
        return field.default_factory()
    except UsageError:  # there is none here, which whoever does without the option is told
        return None


def options_of(cls: type) -> List[Option]:
    """The options that a dataclass stands for, in order."""
    hints, docs = get_type_hints(cls), _field_docs(cls)
    return [Option(field, hints[field.name], docs.get(field.name, "")) for field in dataclasses.fields(cls)]


@lru_cache(maxsize=None)  # reading and parsing the source anew takes longer than all the rest of a command line
def _field_docs(cls: type) -> Mapping[str, str]:
    """The docstrings under the fields; Python itself forgets them."""
    docs: Dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        try:
            source = inspect.getsource(base)
        except OSError:  # an installation without sources: options work, undescribed
            continue
        (definition,) = ast.parse(textwrap.dedent(source)).body
        body = definition.body if isinstance(definition, ast.ClassDef) else []
        for field, below in zip(body, body[1:]):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                docs[field.target.id] = " ".join(str(below.value.value).split())
    return docs


class _HelpFormatter(argparse.HelpFormatter):
    def _split_lines(self, text: str, width: int) -> List[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)  # so that flags stay whole


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def _parser(dataclass_types: Sequence[type], prog: str, description: Optional[str]) -> _Parser:
    parser = _Parser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        usage="%(prog)s [options]",
        formatter_class=_HelpFormatter,
    )
    parser.add_argument(
        "--config", metavar="PATH", default=argparse.SUPPRESS, help="YAML or JSON file of options; flags win over it"
    )
    for cls in dataclass_types:
        group = parser.add_argument_group(" ".join((cls.__doc__ or "").split("\n\n")[0].split()).rstrip("."))
        for option in options_of(cls):
            shape: Dict[str, Any] = {"nargs": "+", "action": "extend"} if option.many else {}
            if option.type is bool:
                shape = {"nargs": "?", "const": "true"}
            elif option.alone is not None:
                shape = {"nargs": "?", "const": option.alone}
            group.add_argument(
                option.flag, metavar=option.metavar, default=argparse.SUPPRESS, help=option.help, **shape
            )
    return parser


def _with_hyphens(argv: Sequence[str]) -> List[str]:
    """`--split_layer=5`, as transformers' scripts spell flags, becomes `--split-layer=5`."""
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        words.append(name.replace("_", "-") + equals + value if name.startswith("--") else word)
    return words


def _read_file(path: Path, options: Mapping[str, Option]) -> Dict[str, Any]:
    import yaml  # here, so that a command line without a file does not need the package

    try:
        text = path.read_text(encoding="utf-8")
        # Scalars stay text, to be read by the option's type as flags are: YAML's own rules take `no` for a boolean,
        # though it is a choice of --eval-strategy, and 5e-5 for text.
        if path.suffix == ".json":
            content = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
        else:
            content = yaml.load(text, Loader=yaml.BaseLoader)  # nosec B506 # makes nothing but text
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise UsageError(f"--config {path} is not {kind}: {' '.join(str(error).split())}") from error
    if content in (None, ""):
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"--config {path}: expected lines of `option: value`")
    values: Dict[str, Any] = {}
    for key, raw in content.items():
        name = str(key).replace("-", "_")
        if name not in options:
            raise UsageError(f"--config {path}: there is no option {key!r}")
        option = options[name]
        if option.optional and (raw is None or raw in _NULL):
            values[name] = None
        else:
            values[name] = _convert(option, raw, f"--config {path}: {key}")
    return values


def _convert(option: Option, raw: object, where: str) -> Any:
    """`raw` is text, or what a file may hold besides: bool and None (JSON), list, dict. Raises UsageError."""
    if option.many:
        return [_convert_one(option, item, where) for item in (raw if isinstance(raw, list) else [raw])]
    return _convert_one(option, raw, where)


def _convert_one(option: Option, raw: object, where: str) -> Any:
    if isinstance(raw, bool):
        raw = str(raw).lower()
    if get_origin(option.type) is dict:
        return _convert_mapping(raw, where)
    if not isinstance(raw, str):
        kind = "a mapping" if isinstance(raw, dict) else "a list" if isinstance(raw, list) else "nothing"
        raise UsageError(f"{where}: expected one value, got {kind}")
    if option.choices:
        if raw not in option.choices:
            raise UsageError(f"{where}: {raw!r} is none of {', '.join(option.choices)}")
        return raw
    if option.type is bool:
        if raw.lower() not in _TRUE + _FALSE:
            raise UsageError(f"{where}: {raw!r} is neither true nor false")
        return raw.lower() in _TRUE
    if option.type is Path or option.names_place:
        raw = at_home(raw, where)
    try:
        return option.type(raw)
    except ValueError:
        kinds = {int: "a whole number", float: "a number", Duration: "a duration such as 30s, 1m30s or 2h"}
        kinds.update({Size: "a size such as 500MB, 2GB or 1.5GiB", WholeOrAuto: "a whole number, nor auto"})
        raise UsageError(f"{where}: {raw!r} is not {kinds[option.type]}") from None


def _convert_mapping(raw: object, where: str) -> Dict[str, Any]:
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except json.JSONDecodeError:
            raise UsageError(f'{where}: {raw!r} is not a JSON object such as {{"name": 1}}') from None
    elif isinstance(raw, dict):
        raw = {key: parse_scalar(value) if isinstance(value, str) else value for key, value in raw.items()}
    if not isinstance(raw, dict):
        raise UsageError(f"{where}: expected a JSON object or a mapping")
    return raw
