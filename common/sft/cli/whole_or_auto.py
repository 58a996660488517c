"""A whole number, or `auto` where a program is to choose one."""

from __future__ import annotations

from typing import Tuple, Union


class WholeOrAuto(int):
    """The type of such an option. What is made of a number is an int; an object of this class is always `auto`."""

    def __new__(cls, value: Union[str, int]) -> int:  # type: ignore[misc]  # see above
        """`value`: `auto`, or a number as `int` takes it. Raises ValueError for other text."""
        return super().__new__(cls, 0) if value == "auto" else int(value)

    def __reduce__(self) -> Tuple[type, Tuple[str]]:
        """Copies, pickled ones too, are `auto`: what is kept of an int is its number."""
        return WholeOrAuto, (str(self),)

    def __str__(self) -> str:
        return "auto"

    __repr__ = __str__


AUTO = WholeOrAuto("auto")


def is_auto(value: object) -> bool:
    """Whether an option, of this type or one of words, was left to the program."""
    return value == "auto" or isinstance(value, WholeOrAuto)
