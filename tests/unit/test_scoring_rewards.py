"""The built-in rewards: what they accept as an answer, and that they never fall over."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_server.scoring.registry import import_reward
from rollout_server.scoring.rewards.exact_match import exact_match
from rollout_server.scoring.rewards.numbers import MAX_NUMBER_CHARS, find_numbers
from rollout_server.scoring.rewards.numeric_answer import (
    DEFAULT_MARKERS,
    final_number,
    numeric_answer,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("no digits", []),
        ("7", ["7"]),
        ("-7 and +3", ["-7", "3"]),
        ("\u22127", ["-7"]),
        ("1,234,567.50 dollars", ["2469135/2"]),
        ("1,2", ["1", "2"]),
        ("1,2345", ["1", "2345"]),
        ("12,345,67", ["12345", "67"]),
        ("0.1", ["1/10"]),
        ("worth .5 points", ["1/2"]),
        ("wait...5", ["5"]),
        ("the end is 7.", ["7"]),
        ("3/4 or -3/4 or 3 / 4", ["3/4", "-3/4", "3/4"]),
        ("1/0 then 2", ["2"]),
        ("7-5", ["7", "5"]),
        ("7 - 5", ["7", "5"]),
        ("(2)-5", ["2", "5"]),
        ("2.5e3 and 1E-2", ["2500", "1/100"]),
        ("x2 y_3 H2O", []),
        ("5km", ["5"]),
        ("version 1.2.3", ["1.2"]),
        ("$12 and 15%", ["12", "15"]),
        ("\\boxed{42}", ["42"]),
        ("\\frac{3}{4} and -\\dfrac{1}{2}", ["3/4", "-1/2"]),
        ("\u7b54\u6848\u662f5", ["5"]),
        ("9" * (MAX_NUMBER_CHARS + 1) + " 4", ["4"]),
        ("1e9999 2", ["1", "2"]),
    ],
)
def test_numbers_are_found_and_read_exactly(text: str, expected: list[str]) -> None:
    assert list(find_numbers(text)) == [Fraction(number) for number in expected]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("first 3, then 4", "4"),
        ("3 + 4 = 7", "7"),
        ("3 + 4 = 7 apples out of 10", "7"),
        ("Answer: 12 (of 20)", "12"),
        ("The answer is 12, not 20", "12"),
        ("x = 5\n#### 9\nignore 3", "9"),
        ("#### 9 because 4 + 5 = 10", "10"),
        ("the sum is 5 =", "5"),
        ("nothing here", None),
        ("\u0130\u0130 =5 of 6", "5"),
    ],
)
def test_the_final_number_is_behind_the_last_marker_or_the_last_one(
    completion: str, expected: str | None
) -> None:
    found = final_number(completion, DEFAULT_MARKERS)
    assert found == (None if expected is None else Fraction(expected))


@pytest.mark.parametrize(
    ("completion", "answer", "params", "reward"),
    [
        ("= 7", "7", {}, 1.0),
        ("= 7.0", "7", {}, 1.0),
        ("= 8", "7", {}, 0.0),
        ("", "7", {}, 0.0),
        ("= 1,000", "1000", {}, 1.0),
        ("= 0.75", "3/4", {}, 1.0),
        ("so 72", "He sold 48+24 = <<48+24=72>>72. #### 72", {}, 1.0),
        ("= 0.3", "0.3000000000000000001", {}, 0.0),
        ("= 7.3", "7", {"tolerance": 0.3}, 1.0),
        ("= 7.31", "7", {"tolerance": 0.3}, 0.0),
        ("= 7", "7", {"correct": 2.0, "wrong": -1.0}, 2.0),
        ("= 8", "7", {"correct": 2.0, "wrong": -1.0}, -1.0),
        ("RESULT 7 of 9 = 3", "7", {"marker": "result"}, 1.0),
    ],
)
def test_numeric_answer_compares_exactly(
    completion: str, answer: str, params: dict[str, float], reward: float
) -> None:
    value, detail = numeric_answer("", completion, answer, {}, **params)  # type: ignore[arg-type]
    assert value == reward
    assert set(detail) == {"found", "expected"}


@pytest.mark.parametrize("answer", [None, "no number"])
def test_numeric_answer_refuses_a_prompt_it_cannot_judge(answer: str | None) -> None:
    with pytest.raises(ValueError, match="numeric_answer"):
        numeric_answer("", "7", answer, {})


@pytest.mark.parametrize(
    ("completion", "answer", "params", "reward"),
    [
        ("yes", "yes", {}, 1.0),
        (" yes\n", "yes", {}, 1.0),
        (" yes\n", "yes", {"strip": False}, 0.0),
        ("Yes", "yes", {}, 0.0),
        ("STRASSE", "straße", {"ignore_case": True}, 1.0),
        ("yes, sir", "yes", {}, 0.0),
    ],
)
def test_exact_match_compares_text(
    completion: str, answer: str, params: dict[str, bool], reward: float
) -> None:
    assert exact_match("", completion, answer, {}, **params) == reward


def test_exact_match_needs_an_answer() -> None:
    with pytest.raises(ValueError, match="answer"):
        exact_match("", "yes", None, {})


@given(st.fractions(max_denominator=10**6))
def test_every_fraction_is_read_back(value: Fraction) -> None:
    assert numeric_answer("", f"so = {value}", str(value), {})[0] == 1.0


@given(st.integers(-(10**18), 10**18), st.integers(0, 10**6))
def test_every_grouped_decimal_is_read_back(whole: int, cents: int) -> None:
    text = f"{whole:,}.{cents:06d}"
    expected = Fraction(text.replace(",", ""))
    assert list(find_numbers(f"it is {text} now")) == [expected]


@given(st.text(alphabet=st.characters() | st.sampled_from("0123456789.,/-+e=#\\{}frac ")))
def test_no_completion_makes_numeric_answer_fail(completion: str) -> None:
    reward, _ = numeric_answer("", completion, "7", {})
    assert reward in (0.0, 1.0)


@given(st.integers(-999, 999), st.integers(-999, 999))
def test_different_integers_are_never_equal(left: int, right: int) -> None:
    assert numeric_answer("", f"= {left}", str(right), {})[0] == float(left == right)


@pytest.mark.parametrize(
    "target", ["math", ":sqrt", "math:", "no_such_module_1:f", "math:no_such_name", "math:pi"]
)
def test_a_reward_that_cannot_be_imported_is_an_error(target: str) -> None:
    with pytest.raises((ValueError, ImportError, AttributeError, TypeError)):
        import_reward(target)
