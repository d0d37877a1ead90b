"""Writes the figures of ``benchmarks/results/`` into the README.

Run ``python -m benchmarks.harness.readme`` after a benchmark. Each table stands between two
markers; ``tests/unit/test_readme_figures.py`` checks that it is what the result files say.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness.results import RESULTS_DIRECTORY

README = Path(__file__).parents[2] / "README.md"


def speculation_table(document: dict[str, Any]) -> str:
    """Rows are batch sizes; columns the engine with its drafter off and each draft length."""
    points = {(point["batch"], point["k"]): point for point in document["result"]["points"]}
    batches = sorted({batch for batch, _ in points})
    lengths = sorted({k for _, k in points if k is not None})
    circumstances = document["circumstances"]
    header = ["batch", "no drafter, tokens/s", *("off" if k == 0 else f"K = {k}" for k in lengths)]
    lines = [_row(header), _row(["---:"] * len(header))]
    for batch in batches:
        cells = [str(batch), f"{points[batch, None]['tokens_per_s']:.1f}"]
        for k in lengths:
            point = points[batch, k]
            spread = f"{point['ratio_min']:.2f} to {point['ratio_max']:.2f}"
            cells.append(f"{point['ratio']:.2f}x ({spread})")
        lines.append(_row(cells))
    acceptance = ", ".join(
        f"{points[batches[0], k]['mean_acceptance_length']:.2f} of {k + 1}" for k in lengths if k
    )
    lines += [
        "",
        f"Ratios to the engine without a drafter, alternating in one run: median (spread) of "
        f"{len(document['raw'][str(batches[0])])} repeats. Mean acceptance length {acceptance}. "
        f"{circumstances['num_cores']} cores of {circumstances['cpu']}, vLLM "
        f"{circumstances['vllm']}, commit {circumstances['commit']}.",
    ]
    return "\n".join(lines)


TABLES = {"speculation": speculation_table}


def with_figures(text: str, results: Path = RESULTS_DIRECTORY) -> str:
    """``text`` with every table whose result file exists brought up to date."""
    for name, make_table in TABLES.items():
        path = results / f"{name}.json"
        if not path.exists():
            continue
        table = make_table(json.loads(path.read_text(encoding="utf-8")))
        start, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
        before, found, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if found and closed:
            text = f"{before}{start}\n{table}\n{end}{after}"
    return text


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    README.write_text(with_figures(README.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
