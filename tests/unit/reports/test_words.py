"""Numbers and foreign text as a person reads them."""

from __future__ import annotations

import math

import pytest

from luthier.reports.words import clip, count_of, list_words, show_number, show_share, show_signed, visible


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.0025537, "0.00255"),
        (1.00256, "1"),
        (0.165, "0.165"),
        (2e-5, "2e-5"),
        (1.5e-7, "1.5e-7"),
        (0.0001, "0.0001"),
        (12.34, "12.3"),
        (1234.5, "1,234"),
        (123456.0, "123,456"),
        (-4.707, "-4.71"),
        (3e20, "3e20"),
        (None, "-"),
        (math.nan, "not finite"),
        (math.inf, "not finite"),
    ],
)
def test_numbers_have_the_digits_that_count(value: float | None, shown: str) -> None:
    assert show_number(value) == shown


def test_differences_carry_their_sign() -> None:
    assert [show_signed(value) for value in (0.5, -0.5, 0.0, None)] == ["+0.5", "-0.5", "0", "-"]


@pytest.mark.parametrize(
    ("part", "whole", "shown"),
    [
        (1, 2, "50.0 %"),
        (0, 5, "0 %"),
        (5, 5, "100 %"),
        (1, 5000, "< 0.1 %"),
        (0, 0, "0 %"),
        (999, 1000, "99.9 %"),
        (math.nan, 1, "-"),
    ],
)
def test_more_than_nothing_is_never_zero_per_cent(part: float, whole: float, shown: str) -> None:
    assert show_share(part, whole) == shown


def test_words_are_counted_and_listed() -> None:
    assert (count_of(1, "row"), count_of(2000, "row")) == ("1 row", "2,000 rows")
    assert [list_words(list(text)) for text in ("", "a", "ab", "abc")] == ["", "a", "a and b", "a, b and c"]


def test_what_is_cut_says_how_much_more_there_is() -> None:
    assert clip("abcdef", 6) == "abcdef"
    assert clip("abcdefgh", 6) == "abcdef ... (2 more characters)"


def test_unseen_characters_are_spelled_out() -> None:
    assert visible("a\u202eb\x1b[31m\u200bc\ud83d") == "a\\u202eb\\u001b[31m\\u200bc\\ud83d"
    assert visible("a\r\nb\tc") == "a\nb\tc"
    family = "\U0001f468\u200d\U0001f469"
    assert visible(family) == family
