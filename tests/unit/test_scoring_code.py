"""``code_tests``: what is taken for code and for tests, what passes, and what code cannot do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from rollout_server.scoring.rewards.code_tests import (
    check_code_tests_params,
    code_tests,
    extract_code,
)
from rollout_server.scoring.signature import RewardParamError
from tests.fakes.processes import is_alive

ADD = "def add(a, b):\n    return a + b\n"
ADDS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]


def fenced(code: str, language: str = "python") -> str:
    return f"Here it is:\n```{language}\n{code}\n```\nDone."


def judge(code: str, tests: list[str], **params: Any) -> tuple[float, dict[str, Any]]:
    return code_tests("", fenced(code), None, {}, tests=tests, **params)


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("", ""),
        ("x = 1", "x = 1"),
        (fenced("x = 1"), "x = 1"),
        (fenced("x = 1", ""), "x = 1"),
        (fenced("x = 1", "Python"), "x = 1"),
        (fenced("x = 1") + fenced("y = 2"), "y = 2"),
        (fenced("x = 1") + fenced("ls", "bash"), "x = 1"),
        (fenced("ls", "bash"), ""),
        ("so:\n```python\nx = 1\ny =", "x = 1\ny ="),
        ("  ```py\nx = 1\n  ```", "x = 1"),
        ("```python\nx = '\u2028'\n```", "x = '\u2028'"),
        ("```python\n\nx = 1\n\n```", "\nx = 1\n"),
        ("```python\n```", ""),
        ("in `line` and ```so``` on", "in `line` and ```so``` on"),
    ],
)
def test_the_code_is_the_last_block_in_python(completion: str, code: str) -> None:
    assert extract_code(completion) == code


@pytest.mark.parametrize(
    ("code", "params", "reward", "num_passed"),
    [
        (ADD, {}, 1.0, 2),
        (ADD.replace("+", "*"), {}, 0.0, 0),
        (ADD.replace("a + b", "3"), {}, 0.0, 1),
        (ADD.replace("a + b", "3"), {"partial": True}, 0.5, 1),
        (ADD.replace("a + b", "3"), {"partial": True, "correct": 2.0, "wrong": -1.0}, 0.5, 1),
        (ADD, {"correct": 2.0}, 2.0, 2),
        ("", {"wrong": -1.0}, -1.0, 0),
        ("def add(", {}, 0.0, 0),
        (ADD + "print('x' * 10**6)\n", {}, 1.0, 2),
        (ADD + "if __name__ == '__main__':\n    raise SystemExit\n", {}, 1.0, 2),
        (ADD + "import sys\nsys.exit(0)\n", {}, 0.0, 0),
        (ADD + "import os\nos._exit(0)\n", {}, 0.0, 0),
        (ADD + "é = '五'\n", {}, 1.0, 2),
        (ADD + "\x00", {}, 0.0, 0),
        (ADD + "x = '\ud800'\n", {}, 0.0, 0),
    ],
)
def test_code_is_right_when_its_tests_pass(
    code: str, params: dict[str, Any], reward: float, num_passed: int
) -> None:
    found, detail = judge(code, ADDS, **params)
    assert found == reward
    assert (detail["num_passed"], detail["num_tests"]) == (num_passed, 2)
    assert len(detail["errors"]) == 2 - num_passed


@pytest.mark.parametrize(
    ("answer", "num_tests"),
    [
        (json.dumps(ADDS), 2),
        ("assert add(1, 2) == 3", 1),
        ("\n".join(ADDS), 1),
        ("def check(f):\n    assert f(1, 2) == 3\ncheck(add)", 1),
    ],
)
def test_tests_come_from_the_answer_when_they_are_no_parameter(answer: str, num_tests: int) -> None:
    reward, detail = code_tests("", fenced(ADD), answer, {})
    assert (reward, detail["num_tests"]) == (1.0, num_tests)
    reward, _ = code_tests("", fenced(ADD.replace("+", "-")), answer, {})
    assert reward == 0.0


@pytest.mark.parametrize("answer", [None, "", " \n", "[]"])
def test_without_tests_nothing_can_be_judged(answer: str | None) -> None:
    with pytest.raises(ValueError, match="needs tests"):
        code_tests("", fenced(ADD), answer, {})


def test_a_test_that_is_not_python_is_an_error_of_the_reward() -> None:
    with pytest.raises(ValueError, match="test 1 is not Python"):
        judge(ADD, [*ADDS[:1], "assert add("])


def test_errors_are_told_and_bounded() -> None:
    _, detail = judge("def f():\n    raise KeyError('k' * 10000)", ["f()"] * 5)
    assert len(detail["errors"]) == 3
    assert detail["errors"][0].startswith("KeyError: 'kkk")
    assert len(detail["errors"][0]) <= 300


def test_an_error_whose_text_is_a_trap_is_an_error_all_the_same() -> None:
    trap = "class Trap(Exception):\n    def __str__(self):\n        raise SystemExit\nraise Trap"
    assert judge(trap, ["pass"])[1]["errors"] == ["Trap"]


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("import socket\nsocket.socket()", "PermissionError"),
        ("x = bytearray(600 * 1024 * 1024)", "MemoryError"),
        ("import rollout_server.service", "ModuleNotFoundError"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "ended before"),
        ("import os\nos.closerange(3, 100)", "ended before"),
        ("def f():\n    f()\nf()", "RecursionError"),
    ],
)
def test_what_code_may_not_do_fails_its_test(code: str, text: str) -> None:
    reward, detail = judge(code, ["pass"])
    assert reward == 0.0
    assert text in detail["errors"][0]


def test_code_cannot_write_to_files(tmp_path: Path) -> None:
    path = tmp_path / "written"
    _, detail = judge(f"with open({str(path)!r}, 'w') as file:\n    file.write('x')", ["pass"])
    assert "File too large" in detail["errors"][0]
    assert path.read_text() == ""


def test_code_sees_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "f00d")
    assert judge("import os\nassert 'JUDGE_KEY' not in os.environ", ["pass"])[0] == 1.0


def test_a_test_that_hangs_costs_only_itself() -> None:
    code = "def f(n):\n    while n:\n        pass\n    return n"
    reward, detail = judge(code, ["f(1)", "assert f(0) == 0"], test_timeout_s=1.0, partial=True)
    assert reward == 0.5
    assert detail["errors"] == ["no result within 1 s"]


def test_tests_that_have_no_turn_in_time_have_failed() -> None:
    code = "import time\ntime.sleep(60)"
    _, detail = judge(code, ["pass"] * 3, test_timeout_s=60, timeout_s=1.0)
    assert detail["num_passed"] == 0
    assert detail["errors"][1:] == ["not run: timeout_s is used up"] * 2


def test_what_one_test_changes_no_other_sees() -> None:
    tests = ["seen.append(1)\nassert seen == [1]"] * 2
    assert judge("seen = []", tests)[0] == 1.0


def test_text_that_looks_like_a_verdict_is_none() -> None:
    """Written to every descriptor there is; the token is not known."""
    code = (
        "import os\n"
        "for fd in range(100):\n"
        "    try:\n"
        '        os.write(fd, b\'\\n{"token": "0", "error": null}\\n\')\n'
        "    except OSError:\n"
        "        pass\n"
        "os._exit(0)"
    )
    assert judge(code, ["pass"])[1]["errors"] == ["the process ended before the test did"]


def test_nothing_that_code_starts_is_left(tmp_path: Path) -> None:
    """Not even what leaves the session and loses its parent; the pid is told as a file's name."""
    code = f"""
import os, time
def leave():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            open({str(tmp_path)!r} + f"/{{os.getpid()}}", "w").close()
            time.sleep(600)
        os._exit(0)
    while not os.listdir({str(tmp_path)!r}):
        time.sleep(0.01)
"""
    assert judge(code, ["leave()"])[0] == 1.0
    (name,) = os.listdir(tmp_path)
    assert not is_alive(int(name))


def test_nothing_is_left_of_a_test_that_ends_its_runner(tmp_path: Path) -> None:
    code = f"""
import os, subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
child = subprocess.Popen(sleep, start_new_session=True)
open({str(tmp_path)!r} + f"/{{child.pid}}", "w").close()
os.kill(os.getppid(), 9)
time.sleep(60)
"""
    with pytest.raises(RuntimeError, match="ended with code -9"):
        judge(code, ["pass"])
    (name,) = os.listdir(tmp_path)
    assert not is_alive(int(name))


@pytest.mark.parametrize(
    ("params", "name", "text"),
    [
        ({"tests": "assert True"}, "tests", "not a list"),
        ({"tests": []}, "tests", "1 to 256"),
        ({"tests": ["a"] * 257}, "tests", "1 to 256"),
        ({"tests": ["a", " "]}, "tests", "texts"),
        ({"tests": [1]}, "tests", "texts"),
        ({"timeout_s": 0}, "timeout_s", "is 0"),
        ({"test_timeout_s": -1.0}, "test_timeout_s", "is -1"),
        ({"max_memory_mib": 64}, "max_memory_mib", "below 128"),
    ],
)
def test_parameters_that_make_no_sense_are_refused_by_name(
    params: dict[str, Any], name: str, text: str
) -> None:
    with pytest.raises(RewardParamError, match=text) as caught:
        check_code_tests_params(params)
    assert caught.value.name == name


def test_parameters_that_make_sense_pass() -> None:
    check_code_tests_params({})
    check_code_tests_params({"tests": ADDS, "timeout_s": 1, "max_memory_mib": 128})
