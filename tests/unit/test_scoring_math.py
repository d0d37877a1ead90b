"""``math_verify``: which expressions count as the answer. Needs the extra ``math``."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from rollout_server.scoring.registry import BuiltinReward, OptionalPackage
from rollout_server.scoring.rewards.math_answer import MAX_SHOWN_CHARS, math_verify

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None,
    reason="math-verify is not installed (deploy/constraints/math.txt)",
)


@needs_package
@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("so $\\frac{1}{2}$", "1/2", 1.0),
        ("so \\boxed{0.5}", "\\frac{1}{2}", 1.0),
        ("so \\boxed{0.5}", "the half, \\boxed{\\frac{1}{2}}", 1.0),
        ("it is 72", "72", 1.0),
        ("it is 71", "72", 0.0),
        ("so $x^2 + 2x + 1$", "$(x+1)^2$", 1.0),
        ("so $x^2 + 2x$", "$(x+1)^2$", 0.0),
        ("so \\boxed{\\{1, 2\\}}", "\\{2, 1\\}", 1.0),
        ("", "72", 0.0),
        ("nothing to see", "72", 0.0),
        ("答案是 $\\boxed{72}$", "72", 1.0),
        ("\ud800 $72$", "72", 1.0),
        ("\\boxed{\\boxed{72}", "71", 0.0),
    ],
)
def test_the_final_expression_is_compared_by_what_it_means(
    completion: str, answer: str, reward: float
) -> None:
    found, detail = math_verify("", completion, answer, {})
    assert found == reward
    assert detail["expected"]


@needs_package
def test_the_parameters_are_those_of_the_other_answers() -> None:
    params: dict[str, Any] = {"correct": 2.0, "wrong": -1.0}
    assert math_verify("", "$7$", "7", {}, **params)[0] == 2.0
    assert math_verify("", "$8$", "7", {}, **params)[0] == -1.0


@needs_package
def test_the_detail_is_bounded() -> None:
    _, detail = math_verify("", "$" + "1 + " * 200 + "1$", "7", {})
    assert len(detail["found"]) <= MAX_SHOWN_CHARS
    assert detail["expected"] == "7"


@needs_package
@pytest.mark.parametrize("answer", [None, "", "  "])
def test_a_prompt_without_an_expression_cannot_be_judged(answer: str | None) -> None:
    with pytest.raises(ValueError, match="math_verify"):
        math_verify("", "$7$", answer, {})


def test_a_package_that_is_missing_is_named_with_its_extra() -> None:
    package = OptionalPackage(name="no-such", module="no_such_module_of_math", extra="math")
    reward = BuiltinReward(function=math_verify, package=package)
    reason = reward.why_unavailable(allows_code=False)
    assert reason is not None
    assert "no-such, which is not installed" in reason
    assert "slipstream-rollout[math]" in reason
