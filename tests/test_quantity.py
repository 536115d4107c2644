from __future__ import annotations

import pytest

from kvstore.errors import InputError
from kvstore.quantity import format_nbytes, parse_age_seconds, parse_nbytes


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        (0, 0),
        (12345, 12345),
        ("12345", 12345),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("1K", 1024),
        ("1k", 1024),
        ("500MB", 500_000_000),
        ("2 GiB", 2 << 30),
        (" 2GiB ", 2 << 30),
        ("2g", 2 << 30),
        ("1.5 MiB", 3 << 19),
        ("1TB", 10**12),
        ("7B", 7),
    ],
)
def test_a_size_is_read_as_people_write_it(size, nbytes):
    assert parse_nbytes(size) == nbytes


@pytest.mark.parametrize(
    "size", [-1, "", "GiB", "-5MB", "5 XB", "1e9", "5 5", True, 1.5, None, b"5", "9" * 400 + "TB"]
)
def test_what_is_not_a_size_is_refused(size):
    with pytest.raises(InputError, match="expected a size"):
        parse_nbytes(size)


@pytest.mark.parametrize(
    ("age", "seconds"),
    [("30s", 30), ("30m", 1800), ("12h", 43200), ("7d", 604800), ("2w", 1209600), ("1.5h", 5400)],
)
def test_an_age_is_read_as_people_write_it(age, seconds):
    assert parse_age_seconds(age) == seconds


@pytest.mark.parametrize("age", ["", "7", "d", "-7d", "7y", "7 days", "9" * 400 + "w"])
def test_what_is_not_an_age_is_refused(age):
    with pytest.raises(InputError, match="expected an age"):
        parse_age_seconds(age)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1024, "1 KiB"),
        (9280000, "8.85 MiB"),
        (2 << 30, "2 GiB"),
        (3 << 40, "3 TiB"),
    ],
)
def test_a_size_is_written_with_three_digits(nbytes, text):
    assert format_nbytes(nbytes) == text
