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
    """Rows are batch sizes and schemes; columns the drafter off and each draft length."""
    result = document["result"]
    points = {(p["batch"], p["scheme"], p["k"]): p for p in result["points"]}
    batches = sorted({batch for batch, _, _ in points})
    schemes = sorted({scheme for _, scheme, _ in points if scheme})
    lengths = sorted({k for _, scheme, k in points if scheme})
    header = ["batch", "no drafter, tokens/s", "scheme"]
    header += ["off" if k == 0 else f"K = {k}" for k in lengths]
    lines = [_row(header), _row(["---:", "---:", ":---", *["---:"] * len(lengths)])]
    for batch in batches:
        for scheme in schemes:
            plain = f"{points[batch, None, 0]['tokens_per_s']:.1f}"
            cells = [_ratio(points[batch, scheme, k]) for k in lengths]
            lines.append(_row([str(batch), plain, scheme, *cells]))
    off = ", ".join(
        f"{ratio:.3f} ({_spread(result['off_ratio_quartiles'][batch])}) at {batch}"
        for batch, ratio in result["off_ratio"].items()
    )
    costs = "; ".join(_costs(scheme, points[batches[0], scheme, lengths[-1]]) for scheme in schemes)
    repeats = len(document["raw"]["speculation"][str(batches[0])])
    off_repeats = len(next(iter(document["raw"]["off"].values())))
    lines += [
        "",
        f"Ratios to the engine without a drafter, alternating in one run: median (spread) of "
        f"{repeats} repeats. At batch {batches[0]}: {costs} (times of a draft pass and of a "
        f"verification against a plain step). Switched off, measured apart with {off_repeats} "
        f"alternations of two sides ({result['off_scheme']}), median and quartiles: {off}. "
        + _circumstances(document["circumstances"]),
    ]
    return "\n".join(lines)


def _costs(scheme: str, point: dict[str, Any]) -> str:
    return (
        f"{scheme} accepts {point['mean_acceptance_length']:.2f} of {point['k'] + 1} at "
        f"K = {point['k']}, c = {point['c']:.2f}, v = {point['v']:.2f}"
    )


def _ratio(point: dict[str, Any]) -> str:
    return f"{point['ratio']:.2f}x ({_spread([point['ratio_min'], point['ratio_max']], 2)})"


def _spread(bounds: list[float], digits: int = 3) -> str:
    return f"{bounds[0]:.{digits}f} to {bounds[1]:.{digits}f}"


def _circumstances(facts: dict[str, Any]) -> str:
    return (
        f"{facts['num_cores']} cores of {facts['cpu']}, vLLM {facts['vllm']}, "
        f"commit {facts['commit']}."
    )


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
