"""The GPU check's own machinery: parts, bars, figures, and a plugin that is not installed."""

from __future__ import annotations

import os
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import plugin_entry
from benchmarks.harness.engines import Measurement
from benchmarks.harness.gpu_bars import judge_bars
from benchmarks.harness.gpu_speculation import Round, describe, summarize
from benchmarks.harness.gpu_tests import read_report
from benchmarks.harness.parts import run_part, save_json
from benchmarks.harness.worker_probes import synthetic_tokens


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_part_that_ends_well_gives_its_result(tmp_path: Path) -> None:
    output = tmp_path / "part.json"
    result = run_part(python(f"open({str(output)!r}, 'w').write('{{\"a\": 1}}')"), output, 60)
    assert result["status"] == "ok"
    assert result["a"] == 1


def test_a_part_that_fails_keeps_what_it_had_measured(tmp_path: Path) -> None:
    output = tmp_path / "part.json"
    code = f"open({str(output)!r}, 'w').write('{{\"points\": [1]}}'); raise SystemExit(3)"
    result = run_part(python(code), output, 60)
    assert result["status"] == "failed"
    assert result["exit_code"] == 3
    assert result["points"] == [1]


def test_a_part_without_a_result_has_failed(tmp_path: Path) -> None:
    assert run_part(python("pass"), tmp_path / "part.json", 60)["status"] == "failed"


def test_a_part_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = (
        "import subprocess, sys, time;"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        f"open({str(pid_file)!r}, 'w').write(str(child.pid)); time.sleep(600)"
    )
    result = run_part(python(code), tmp_path / "part.json", 3)
    assert result["status"] == "timeout"
    while is_running(int(pid_file.read_text())):
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """Whether a process still executes (one that waits to be reaped does not)."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")


def test_a_document_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "result.json"
    save_json(path, {"a": 1})
    save_json(path, {"a": 2})
    assert path.read_text(encoding="utf-8") == '{\n "a": 2\n}\n'
    assert list(path.parent.iterdir()) == [path]


def point(batch: int, synthetic: float | None, ratio: float, c: float | None) -> dict[str, Any]:
    costs = {} if c is None else {"c": c}
    return {"batch": batch, "synthetic_acceptance": synthetic, "ratio": ratio, **costs}


def test_bars_look_at_batch_one_with_synthetic_acceptance() -> None:
    bars = judge_bars(
        {
            "points": [
                point(1, None, 9.0, None),
                point(1, 0.93, 1.3, 0.38),
                point(1, 0.93, 1.5, 0.41),
                point(4, 0.93, 2.0, 0.1),
            ],
            "requantization": {"ms": 51.0},
        }
    )
    assert bars["c_batch_1"] == {"value": 0.38, "at_most": 0.40, "met": True}
    assert bars["speedup_batch_1"] == {"value": 1.5, "at_least": 1.40, "met": True}
    assert bars["requantization_ms"] == {"value": 51.0, "at_most": 50.0, "met": False}


def test_a_bar_that_was_not_measured_is_not_met() -> None:
    assert [bar["met"] for bar in judge_bars({}).values()] == [False, False, False]


def test_cost_and_verification_ratios_add_up_to_the_cycle() -> None:
    # Plain: 10 ms a step. With 4 drafts: a cycle of 30 ms, 16 ms of it drafting, gives 4 tokens.
    measured: Round = {
        (None, False): (
            Measurement(tokens_per_s=100.0, step_s=0.010, mean_acceptance_length=0.0),
            0.0,
        ),
        (4, True): (
            Measurement(tokens_per_s=4 / 0.030, step_s=0.030, mean_acceptance_length=4.0),
            16.0,
        ),
    }
    plain, drafted = summarize(1, [measured])
    assert plain["k"] is None
    assert plain["ratio"] == 1.0
    assert drafted["c"] == pytest.approx(0.4)
    assert drafted["v"] == pytest.approx(1.4)
    assert drafted["ratio"] == pytest.approx(1.333)
    assert drafted["predicted_ratio"] == pytest.approx(drafted["ratio"])
    assert describe(drafted).startswith("batch 1, K = 4 at 0.93: 133 tokens/s, 1.33x")


def test_a_report_of_tests_is_counted_and_failures_keep_their_message(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="a" name="one"/>'
        '<testcase classname="a" name="two"><failure message="no"/></testcase>'
        '<testcase classname="a" name="three"><error message="worse"/></testcase>'
        '<testcase classname="a" name="four"><skipped/></testcase></testsuite></testsuites>',
        encoding="utf-8",
    )
    assert read_report(report) == {
        "passed": 1,
        "failed": 2,
        "skipped": 1,
        "failures": {"a.two": "no", "a.three": "worse"},
    }


def test_a_plugin_that_is_not_installed_is_found_by_its_entry_point(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plugin_entry, "entry_points", lambda group: ())  # nothing is installed
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "somewhere")
    plugin_entry.ensure_plugin_entry_point()
    points = [p for p in entry_points(group=plugin_entry.GROUP) if p.name == plugin_entry.NAME]
    assert any(p.dist is not None and p.dist.name == "slipstream-checkout" for p in points)
    first, root, inherited = os.environ["PYTHONPATH"].split(os.pathsep)
    assert (Path(first) / "slipstream_checkout-0.dist-info").is_dir()
    assert Path(root) == plugin_entry.ROOT
    assert inherited == "somewhere"


def test_synthetic_acceptance_keeps_a_prefix_of_the_drafts_and_one_more_token() -> None:
    torch.manual_seed(0)
    drafts = torch.arange(1, 5).repeat(4000, 1)
    verified = torch.full((4000, 5), -1, dtype=torch.int32)
    verified[:, 0] = 99
    tokens = synthetic_tokens(drafts, verified, 0.93)
    lengths = (tokens != -1).sum(dim=1)
    for length in range(1, 6):
        expected = [*range(1, length), 99, *[-1] * (5 - length)]
        assert tokens[lengths == length].unique(dim=0).tolist() == [expected]
    kept = lengths.float().mean() - 1
    # 0.93 + 0.93^2 + ...; within five standard deviations of the mean.
    assert abs(kept - sum(0.93**n for n in range(1, 5))) < 5 * 1.1 / 4000**0.5
