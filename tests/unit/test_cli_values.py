"""Values of flags: what is accepted, what is refused, and the escapes of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpillama.cli import values
from mpillama.cli.values import BadValueError


@given(st.integers(-(2**31), 2**31 - 1))
def test_integers_round_trip(n: int) -> None:
    assert values.integer()(str(n)) == n


@pytest.mark.parametrize("text", ["", " 1", "1 ", "1.0", "1e3", "1_000", "0x10", "٣", "--1", "2147483648", "abc"])
def test_not_an_integer(text: str) -> None:
    with pytest.raises(BadValueError, match="expected an integer"):
        values.integer()(text)


def test_integer_bounds_are_inclusive_and_named() -> None:
    parse = values.integer(-2)
    assert parse("-2") == -2
    with pytest.raises(BadValueError, match="an integer of at least -2, got '-3'"):
        parse("-3")
    with pytest.raises(BadValueError, match="an integer from 0 to 2, got '3'"):
        values.integer(0, 2)("3")


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_round_trip(x: float) -> None:
    assert values.number(repr(x)) == x


@pytest.mark.parametrize("text", ["", "nan", "inf", "-inf", "1e999", "1_0", "0,8", ".", "1.2.3", "two"])
def test_not_a_number(text: str) -> None:
    with pytest.raises(BadValueError, match="expected a number"):
        values.number(text)


@pytest.mark.parametrize(("text", "expected"), [("-1", -1), ("4294967295", -1), ("0", 0), ("4294967294", 4294967294)])
def test_seed(text: str, expected: int) -> None:
    assert values.seed(text) == expected


@pytest.mark.parametrize("text", ["-2", "4294967296", "x"])
def test_bad_seed(text: str) -> None:
    with pytest.raises(BadValueError, match=r"from -1 \(random\) to 4294967295"):
        values.seed(text)


def test_rope_scale_is_the_reciprocal() -> None:
    assert values.reciprocal("4") == 0.25
    for text in ("0", "-1"):
        with pytest.raises(BadValueError, match="greater than 0"):
            values.reciprocal(text)


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=8).filter(lambda shares: sum(shares) > 0), st.sampled_from(",/")
)
def test_proportions_round_trip(shares: list[float], separator: str) -> None:
    assert values.proportions(separator.join(map(repr, shares))) == tuple(shares)


@pytest.mark.parametrize("text", ["", "0", "0,0", "3,-1", "3,,x", "a", "1,", "1;2", "inf,1"])
def test_bad_proportions(text: str) -> None:
    with pytest.raises(BadValueError, match="one non-negative number per rank"):
        values.proportions(text)


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1), st.sampled_from([",", " ", ", ", "\n"]))
def test_token_ids_round_trip(ids: list[int], separator: str) -> None:
    assert values.token_ids(separator.join(map(str, ids)) + "\n") == tuple(ids)


@pytest.mark.parametrize("text", ["", ",", "1,-2", "1.5", "a", "2147483648"])
def test_bad_token_ids(text: str) -> None:
    with pytest.raises(BadValueError, match="expected token ids"):
        values.token_ids(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b=int:-7", (("a.b", -7),)),
        ("a=float:2.5e3,b=bool:true,c=bool:false", (("a", 2500.0), ("b", True), ("c", False))),
        ("name=str:x=y:z", (("name", "x=y:z"),)),
        ('"t=str:one, two",u=int:1', (("t", "one, two"), ("u", 1))),
        ("t=str:", (("t", ""),)),
    ],
)
def test_kv_overrides(text: str, expected: Any) -> None:
    parsed = values.kv_overrides(text)
    assert parsed == expected
    assert [type(value) for _, value in parsed] == [type(value) for _, value in expected]


@pytest.mark.parametrize(
    "text", ["", "a", "a=", "a=int", "a=int:x", "=int:1", "a=u8:1", "a=bool:yes", "a=int:1,", "a=float:nan"]
)
def test_bad_kv_overrides(text: str) -> None:
    with pytest.raises(BadValueError):
        values.kv_overrides(text)


def test_choice_tells_unsupported_from_unknown() -> None:
    parse = values.choice("none", "tensor", later=("layer",))
    assert parse("tensor") == "tensor"
    with pytest.raises(BadValueError, match="'layer' is not supported yet; use none or tensor"):
        parse("layer")
    with pytest.raises(BadValueError, match="expected none or tensor, got 'Tensor'"):
        parse("Tensor")


def test_path() -> None:
    assert values.path("a b.gguf") == Path("a b.gguf")
    with pytest.raises(BadValueError):
        values.path("")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"a\nb\tc\r", "a\nb\tc\r"),
        (r"\'\"", "'\""),
        (r"\\n", r"\n"),
        (r"\x41\x5a", "AZ"),
        (r"\xe2\x82\xac", "€"),
        (r"\x4", r"\x4"),
        (r"\xzz \q \0 \u00e9", r"\xzz \q \0 \u00e9"),
        ("ends with \\", "ends with \\"),
        ("", ""),
    ],
)
def test_escapes_are_llama_cpps(text: str, expected: str) -> None:
    assert values.unescape(text) == expected


@given(st.text(st.characters(exclude_characters="\\", exclude_categories=["Cs"])))
def test_text_without_backslashes_is_untouched(text: str) -> None:
    assert values.unescape(text) == text


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_escaping_is_undone(text: str) -> None:
    escaped = text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
    assert values.unescape(escaped) == text


def test_random_bytes_as_escapes(rng: np.random.Generator) -> None:
    text = "".join(chr(c) for c in rng.integers(0x20, 0xD7FF, 50))
    assert values.unescape("".join(f"\\x{byte:02X}" for byte in text.encode())) == text


def test_escapes_that_are_no_text() -> None:
    with pytest.raises(BadValueError, match="not valid UTF-8"):
        values.unescape(r"\xff")
