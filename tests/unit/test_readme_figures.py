"""The README's figures are those of the result files, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.harness.readme import PAGES, with_figures


def document(ratio: float) -> dict[str, object]:
    common = {"batch": 1, "tokens_per_s": 10.0, "ratio_min": 1.0, "ratio_max": 2.0}
    costs = {"c": 0.5, "v": 1.1, "mean_acceptance_length": 2.9}
    points = [
        {"scheme": None, "k": 0, "ratio": 1.0, **common},
        {"scheme": "int8", "k": 0, "ratio": 0.99, **common},
        {"scheme": "int8", "k": 2, "ratio": ratio, **costs, **common},
    ]
    circumstances = {"num_cores": 2, "cpu": "CPU", "vllm": "0", "commit": "abc"}
    result = {
        "points": points,
        "off_ratio": {"1": 0.991},
        "off_ratio_of_sets": {"1": [0.991, 0.98, 1.0]},
        "off_control_of_sets": {"1": [0.99, 1.02, 1.01]},
        "off_scheme": "int8",
        "commits": {"points": "abc", "off": "def"},
    }
    raw = {"speculation": {"1": [{}, {}]}, "off": [{}, {}, {}]}
    return {"result": result, "circumstances": circumstances, "raw": raw}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_hold_what_the_result_files_say(page: Path) -> None:
    text = page.read_text()
    assert "<!-- bench:" in text
    assert with_figures(text) == text, "run: python -m benchmarks.harness.readme"


def test_a_changed_result_changes_the_table(tmp_path: Path) -> None:
    text = "a\n<!-- bench:speculation -->\nold\n<!-- /bench:speculation -->\nb"
    (tmp_path / "speculation.json").write_text(json.dumps(document(1.25)))
    changed = with_figures(text, tmp_path)
    assert "| 1 | 10.0 | int8 | 0.99x (1.00 to 2.00) | 1.25x (1.00 to 2.00) |" in changed
    assert (
        "3 sets of fresh engines, median and range of the sets: 0.991 (0.980 to 1.000)" in changed
    )
    assert "without a drafter to each other: 0.990 to 1.020 at 1" in changed
    assert "old" not in changed
    assert changed.startswith("a\n")
    assert changed.endswith("\nb")
    (tmp_path / "speculation.json").write_text(json.dumps(document(1.5)))
    assert with_figures(changed, tmp_path) != changed
