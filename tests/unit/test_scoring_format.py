"""The rewards that look at a completion's form: regex, format, length_penalty."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_server.scoring.rewards.length_penalty import (
    check_length_penalty_params,
    length_penalty,
)
from rollout_server.scoring.rewards.regex import (
    MAX_FOUND_CHARS,
    MAX_PATTERN_CHARS,
    check_regex_params,
    regex,
)
from rollout_server.scoring.rewards.tag_format import check_tag_format_params, tag_format
from rollout_server.scoring.signature import RewardParamError

GOOD = "<think>why</think>\n<answer>42</answer>"
HUGE = "x" * 5_000_000


@pytest.mark.parametrize(
    ("completion", "params", "reward"),
    [
        ("the answer is 42.", {"pattern": r"\b42\b"}, 1.0),
        ("", {"pattern": "a"}, 0.0),
        ("", {"pattern": "a*"}, 1.0),
        ("yes, sir", {"pattern": "yes", "whole": True}, 0.0),
        ("yes", {"pattern": "yes", "whole": True}, 1.0),
        ("YES", {"pattern": "yes"}, 0.0),
        ("YES", {"pattern": "yes", "ignore_case": True}, 1.0),
        ("a\nb", {"pattern": "^b$"}, 0.0),
        ("a\nb", {"pattern": "^b$", "multi_line": True}, 1.0),
        ("a\nb", {"pattern": "a.b"}, 0.0),
        ("a\nb", {"pattern": "a.b", "dot_all": True}, 1.0),
        ("答案是五", {"pattern": "答案是(五|5)"}, 1.0),
        ("\ud800", {"pattern": "."}, 1.0),
        ("7", {"pattern": "7", "correct": 2.0, "wrong": -1.0}, 2.0),
        ("8", {"pattern": "7", "correct": 2.0, "wrong": -1.0}, -1.0),
        (HUGE + "7", {"pattern": "7$"}, 1.0),
    ],
)
def test_regex_finds_its_pattern(completion: str, params: dict[str, Any], reward: float) -> None:
    assert regex("", completion, None, {}, **params)[0] == reward


def test_regex_tells_what_it_found_and_not_all_of_it() -> None:
    assert regex("", "so 42", None, {}, pattern="[0-9]+")[1] == {"found": "42", "start": 3}
    assert regex("", "so", None, {}, pattern="[0-9]+")[1] == {"found": None}
    assert len(regex("", HUGE, None, {}, pattern=".*")[1]["found"]) == MAX_FOUND_CHARS


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("", "empty"),
        ("(a", "unterminated"),
        ("a{99999999999999999999}", "too large"),
        ("a" * (MAX_PATTERN_CHARS + 1), "above the limit of 1000"),
        ("(" * 500 + ")" * 500, "regular expression|recursion"),
    ],
)
def test_what_is_no_pattern_is_refused_by_name(pattern: str, text: str) -> None:
    with pytest.raises(RewardParamError, match=text) as caught:
        check_regex_params({"pattern": pattern})
    assert caught.value.name == "pattern"


def test_a_pattern_is_only_parsed_before_it_is_used() -> None:
    """Compiling can take seconds; what only it finds is an error of the samples."""
    check_regex_params({"pattern": "(?<=a+)b"})
    with pytest.raises(re.error, match="look-behind"):
        regex("", "ab", None, {}, pattern="(?<=a+)b")


@pytest.mark.parametrize(
    ("completion", "bad_tags", "text_outside"),
    [
        (GOOD, [], False),
        (f"  {GOOD}\n\n", [], False),
        ("<think>\n二\n</think><answer>\u3000五</answer>", [], False),
        ("", ["think", "answer"], False),
        ("42", ["think", "answer"], True),
        ("<think>why</think>42", ["answer"], True),
        ("<think>why</think><answer>42", ["answer"], True),
        ("<think>why</think><answer>42</answer>!", [], True),
        ("so <think>why</think><answer>42</answer>", [], True),
        ("<think>why</think>so<answer>42</answer>", [], True),
        ("<answer>42</answer><think>why</think>", ["answer"], True),
        ("<think> </think><answer>42</answer>", ["think"], True),
        ("<think>why</think><answer>\n</answer>", ["answer"], True),
        ("<think>a <answer>1</answer> b</think><answer>2</answer>", ["answer"], True),
        ("<think>a <answer>1</answer> b</think>", ["answer"], False),
        ("<think>a <think>b</think> c</think><answer>2</answer>", ["think"], True),
        ("<think>a<answer>b</think>c</answer>", ["answer"], True),
        ("</think>why<think><answer>42</answer>", ["think"], True),
        ("<Think>why</Think><answer>42</answer>", ["think"], True),
        (f"{GOOD}{GOOD}", ["think", "answer"], True),
        (f"<think>{HUGE}</think><answer>{HUGE}</answer>", [], False),
        ("<think>" * 200_000, ["think", "answer"], True),
    ],
)
def test_format_wants_every_section_once_in_order_and_nothing_else(
    completion: str, bad_tags: list[str], text_outside: bool
) -> None:
    reward, detail = tag_format("", completion, None, {})
    assert detail == {"bad_tags": bad_tags, "text_outside": text_outside}
    assert reward == float(not bad_tags and not text_outside)


@pytest.mark.parametrize("prompt", ["Q\n<think>", "Q\n<think>\n"])
def test_a_section_that_the_prompt_opens_goes_on_in_the_completion(prompt: str) -> None:
    assert tag_format(prompt, "why</think><answer>42</answer>", None, {})[0] == 1.0
    assert tag_format(prompt, GOOD, None, {})[0] == 0.0
    assert tag_format("Use <think> and so on.", "why</think><answer>42</answer>", None, {})[0] == 0


@pytest.mark.parametrize(
    ("completion", "params", "reward"),
    [
        (GOOD + "!", {"strict": False}, 1.0),
        (GOOD + "!", {"partial": True}, 2 / 3),
        ("<think>a</think>42", {"partial": True}, 1 / 3),
        ("<think>a</think>42", {"partial": True, "strict": False}, 1 / 2),
        ("", {"partial": True}, 1 / 3),
        ("", {"partial": True, "strict": False, "wrong": -1.0}, -1.0),
        ("<think>a</think>", {"partial": True, "correct": 2.0, "wrong": -1.0}, 1.0),
        ("<a>1</a><b>2</b><c>3</c>", {"tags": ["a", "b", "c"]}, 1.0),
        ("<a>1</a>", {"tags": ["a"]}, 1.0),
        (GOOD, {"correct": 0.5}, 0.5),
    ],
)
def test_format_has_its_parameters(completion: str, params: dict[str, Any], reward: float) -> None:
    assert tag_format("", completion, None, {}, **params)[0] == pytest.approx(reward)


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "a", " "])).map(
        "".join
    )
)
def test_whatever_the_order_of_tags_only_the_one_form_is_right(completion: str) -> None:
    form = r" *<think>[a ]*a[a ]*</think> *<answer>[a ]*a[a ]*</answer> *"
    reward, _ = tag_format("", completion, None, {})
    assert reward == float(re.fullmatch(form, completion) is not None)


@given(st.text(" a", min_size=1), st.text(" a", min_size=1), st.text(" "))
def test_the_one_form_is_right(thought: str, final: str, gap: str) -> None:
    completion = f"{gap}<think>{thought}</think>{gap}<answer>{final}</answer>{gap}"
    reward, _ = tag_format("", completion, None, {})
    assert reward == float("a" in thought and "a" in final)


@pytest.mark.parametrize(
    ("length", "params", "reward"),
    [
        (0, {}, 0.0),
        (80, {}, 0.0),
        (81, {}, -0.05),
        (90, {}, -0.5),
        (100, {}, -1.0),
        (5_000_000, {}, -1.0),
        (90, {"penalty": 0.5}, -0.25),
        (60, {"buffer": 80}, -0.5),
        (1, {"buffer": 100}, -0.01),
        (100, {"buffer": 0}, 0.0),
        (101, {"buffer": 0}, -1.0),
    ],
)
def test_length_penalty_is_a_line_between_two_lengths(
    length: int, params: dict[str, Any], reward: float
) -> None:
    value, detail = length_penalty("", "五" * length, None, {}, max_length=100, **params)
    assert value == pytest.approx(reward)
    assert detail == {"length": length}


@pytest.mark.parametrize(
    ("completion", "length"), [("", 0), (" \n\t", 0), ("two words", 2), ("a\u3000b\nc  d", 4)]
)
def test_words_are_what_white_space_separates(completion: str, length: int) -> None:
    _, detail = length_penalty("", completion, None, {}, max_length=5, unit="words")
    assert detail == {"length": length}


@given(st.integers(1, 300), st.integers(0, 300), st.integers(0, 300))
def test_longer_is_never_better(max_length: int, one: int, other: int) -> None:
    rewards = [
        length_penalty("", "a" * length, None, {}, max_length=max_length)[0]
        for length in sorted((one, other))
    ]
    assert 0.0 >= rewards[0] >= rewards[1] >= -1.0


@pytest.mark.parametrize(
    ("check", "params", "name", "text"),
    [
        (check_tag_format_params, {"tags": "think"}, "tags", "not a list"),
        (check_tag_format_params, {"tags": []}, "tags", "1 to 16"),
        (check_tag_format_params, {"tags": [1]}, "tags", "has 1"),
        (check_tag_format_params, {"tags": ["<a>"]}, "tags", "'<a>'"),
        (check_tag_format_params, {"tags": ["a", "a"]}, "tags", "twice"),
        (check_tag_format_params, {"tags": ["a"] * 17}, "tags", "1 to 16"),
        (check_length_penalty_params, {"max_length": 0}, "max_length", "is 0"),
        (check_length_penalty_params, {"max_length": 5, "buffer": 6}, "buffer", "is 6"),
        (check_length_penalty_params, {"max_length": 5, "buffer": -1}, "buffer", "is -1"),
        (check_length_penalty_params, {"max_length": 5, "unit": "tokens"}, "unit", "'tokens'"),
        (check_length_penalty_params, {"max_length": 5, "penalty": -1}, "penalty", "is -1"),
    ],
)
def test_parameters_that_make_no_sense_are_refused_by_name(
    check: Callable[[Mapping[str, Any]], None], params: dict[str, Any], name: str, text: str
) -> None:
    with pytest.raises(RewardParamError, match=text) as caught:
        check(params)
    assert caught.value.name == name


def test_parameters_that_make_sense_pass() -> None:
    check_tag_format_params({"tags": ["think", "final-answer"]})
    check_tag_format_params({})
    check_length_penalty_params({"max_length": 5, "buffer": 5, "unit": "words", "penalty": 0})
    check_regex_params({"pattern": r"(?i)\d+(?=x)"})
