from __future__ import annotations

import pytest

from sft.cli.sizes import Size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GB", 2_000_000_000),
        ("1.5 GiB", 3 << 29),
        ("500MB", 500_000_000),
        ("64KiB", 65_536),
        ("3kb", 3000),
        ("12B", 12),
        ("12", 12),
    ],
)
def test_a_size_is_read_with_its_unit(text, size):
    assert Size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "2GBit", "2g", "1e9", "nan", "2 i b", "ib", "2ib"])
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match="is not a size such as 500MB"):
        Size(text)


@pytest.mark.parametrize("text", ["9" * 400, "9" * 400 + "TB", "99999999 TB"])
def test_more_bytes_than_there_are_is_refused(text):
    with pytest.raises(ValueError, match="is more bytes than there are"):
        Size(text)


def test_it_is_shown_with_a_unit():
    assert f"{Size('2000MB')}" == str(Size("2GB")) == "2 GB"
