"""Nothing that arrives over HTTP, in files of others or from a reward can be run as code.

Read from the syntax trees of all the code that handles what comes from outside; Ray and vLLM
pickle between their own processes, on a network of their own (see docs/security.md).
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollout_server.scoring.frames import decode_body

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("shared", "rollout_server", "trainer")
SERIALIZERS = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle"}
"""Modules whose load runs what the data says."""
UNSAFE_CALLS = {
    *("eval", "exec", "compile"),
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all"),
    *("torch.load", "np.load", "numpy.load", "os.system", "os.popen"),
}
ALLOWED: dict[str, set[str]] = {
    # The reward code_tests: off by default, and only ever in a confined child of this process.
    "rollout_server/scoring/code_runner.py": {"compile", "exec"},
}
"""Path to what may stand in it all the same, with a comment why."""


def dotted(node: ast.expr) -> str:
    """``a.b`` of a name or attribute; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return f"{head}.{node.attr}" if head else ""
    return ""


def findings(source: str) -> Iterator[str]:
    """Every way in the source to turn data into code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[-1] in SERIALIZERS)
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".") + [alias.name for alias in node.names]
            yield from (part for part in parts if part in SERIALIZERS)
        elif isinstance(node, ast.Attribute) and node.attr in SERIALIZERS:
            yield node.attr
        elif isinstance(node, ast.Call):
            if dotted(node.func) in UNSAFE_CALLS:
                yield dotted(node.func)
            for keyword in node.keywords:
                is_true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                if keyword.arg in ("shell", "allow_pickle") and is_true:
                    yield f"{keyword.arg}=True"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_has_a_way_to_run_data(package: str) -> None:
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        left = set(findings(path.read_text(encoding="utf-8"))) - ALLOWED.get(name, set())
        if left:
            found[name] = left
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from ray import cloudpickle",
        "import ray.cloudpickle as c",
        "import ray\nray.cloudpickle.loads(b'')",
        "def f():\n    from marshal import loads",
        "eval('1')",
        "yaml.load(text)",
        "torch.load(path)",
        "np.load(path, mmap_mode='r')",
        "read(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_each_way_would_be_found(source: str) -> None:
    assert len(set(findings(source))) == 1


def test_what_is_safe_is_not_reported() -> None:
    assert list(findings("import json\nyaml.safe_load(t)\nre.compile(p)\nmodel.eval()")) == []


def test_the_worker_of_rewards_and_the_reader_of_its_answers_do_not_load_pickle_for_it() -> None:
    code = "import sys, rollout_server.scoring.worker\nprint('pickle' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "False"


def test_a_pickle_in_a_frame_is_refused_as_data() -> None:
    # Protocol 0 of a call of os.system, as an attacker in a worker would answer.
    with pytest.raises(json.JSONDecodeError):
        decode_body(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
