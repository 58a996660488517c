"""Numbers of bytes as people write them: `2GB`, `500MB`, `1.5GiB`."""

from __future__ import annotations

import re
from typing import Union

from sft.printable import format_bytes

_UNITS = {"": 1, "b": 1, **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)}}
_UNITS.update({f"{prefix}ib": 1 << 10 * power for power, prefix in enumerate("kmgt", 1)})
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kmgt]?i?b|)", re.IGNORECASE)

_MOST = 1 << 62


class Size(int):
    """A number of bytes that is read with its unit: kB, MB, GB and TB are decimal, KiB and so on powers of 1024."""

    def __new__(cls, value: Union[str, int]) -> Size:
        """`value`: text such as `2GB`; a number alone is bytes. Raises ValueError for other text."""
        if isinstance(value, str):
            found = _SIZE.fullmatch(value)
            if found is None or found[2].lower() not in _UNITS:
                raise ValueError(f"{value!r} is not a size such as 500MB, 2GB or 1.5GiB")
            number = float(found[1]) * _UNITS[found[2].lower()]
            if number > _MOST:
                raise ValueError(f"{value[:20]!r}... is more bytes than there are")
            value = round(number)
        return super().__new__(cls, value)

    def __str__(self) -> str:
        """With three digits and a decimal unit: `2 GB`."""
        return format_bytes(int(self))
