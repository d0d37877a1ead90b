"""Writes the figures of ``benchmarks/results/`` into the README and the pages under ``docs/``.

Run ``python -m benchmarks.harness.readme`` after a benchmark. Each table stands between two
markers; ``tests/unit/test_readme_figures.py`` checks that it is what the result files say.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness.markdown import circumstances, row, spread
from benchmarks.harness.readme_scheduler import (
    robustness_table,
    scheduler_table,
    simulation_table,
)
from benchmarks.harness.readme_service import SERVICE_TABLES
from benchmarks.harness.results import RESULTS_DIRECTORY

ROOT = Path(__file__).parents[2]
PAGES = (
    ROOT / "README.md",
    *(
        ROOT / "docs" / name
        for name in ("drafter.md", "measured.md", "speculation.md", "weights.md")
    ),
)


def speculation_table(document: dict[str, Any]) -> str:
    """Rows are batch sizes and schemes; columns the drafter off and each draft length."""
    result = document["result"]
    points = {(p["batch"], p["scheme"], p["k"]): p for p in result["points"]}
    batches = sorted({batch for batch, _, _ in points})
    schemes = sorted({scheme for _, scheme, _ in points if scheme})
    lengths = sorted({k for _, scheme, k in points if scheme})
    header = ["batch", "no drafter, tokens/s", "scheme"]
    header += ["off" if k == 0 else f"K = {k}" for k in lengths]
    lines = [row(header), row(["---:", "---:", ":---", *["---:"] * len(lengths)])]
    for batch in batches:
        for scheme in schemes:
            plain = f"{points[batch, None, 0]['tokens_per_s']:.1f}"
            cells = [_ratio(points[batch, scheme, k]) for k in lengths]
            lines.append(row([str(batch), plain, scheme, *cells]))
    off = ", ".join(
        f"{ratio:.3f} ({spread(_range(result['off_ratio_of_sets'][batch]))}) at {batch}"
        for batch, ratio in result["off_ratio"].items()
    )
    acceptance = " and ".join(
        _acceptance(scheme, points[batches[0], scheme, lengths[-1]]) for scheme in schemes
    )
    repeats = len(document["raw"]["speculation"][str(batches[0])])
    off = f"{off}; of two engines without a drafter to each other: " + ", ".join(
        f"{spread(_range(ratios))} at {batch}"
        for batch, ratios in result["off_control_of_sets"].items()
    )
    num_sets = len(document["raw"]["off"])
    lines += [
        "",
        f"Ratios to the engine without a drafter, alternating in one run: median (spread) of "
        f"{repeats} repeats. Mean acceptance length at batch {batches[0]} and K = {lengths[-1]}: "
        f"{acceptance}. Switched off ({result['off_scheme']}), measured apart over {num_sets} sets "
        f"of fresh engines, median and range of the sets: {off}. "
        + circumstances(document)
        + f" Measured: {', '.join(f'{part} of {c}' for part, c in result['commits'].items())}.",
    ]
    return "\n".join(lines)


def _acceptance(scheme: str, point: dict[str, Any]) -> str:
    return f"{point['mean_acceptance_length']:.2f} of {point['k'] + 1} with {scheme}"


def _ratio(point: dict[str, Any]) -> str:
    return f"{point['ratio']:.2f}x ({spread([point['ratio_min'], point['ratio_max']], 2)})"


def _range(values: list[float]) -> list[float]:
    return [min(values), max(values)]


def requantize_table(document: dict[str, Any]) -> str:
    """A row per scheme; what a commit takes in a running engine below."""
    result = document["result"]
    lines = [
        row(["scheme", "seconds", "GB/s of bf16 read", "times a plain copy"]),
        row([":---", "---:", "---:", "---:"]),
    ]
    for name, side in result.items():
        if isinstance(side, dict) and "ratio_to_copy" in side:
            bounds = spread([side["ratio_min"], side["ratio_max"]], 2)
            cells = [name, f"{side['seconds']:.3f}", f"{side['bytes_per_s'] / 1e9:.1f}"]
            lines.append(row([*cells, f"{side['ratio_to_copy']:.2f} ({bounds})"]))
    engines = "; ".join(
        f"{scheme}: target loaded in {times['load_s']:.2f} s, drafter rebuilt in "
        f"{times['requantize_s']:.2f} s"
        for scheme, times in result["in_engine"].items()
    )
    return "\n".join(
        [
            *lines,
            "",
            f"The linear weights of 450 million parameters, alternating with the copy in one run: "
            f"median (spread). Commits in a running engine: {engines}. " + circumstances(document),
        ]
    )


def drafter_table(document: dict[str, Any]) -> str:
    """Columns are the measured cycles, rows the parts of a step."""
    points = document["result"]["points"]
    parts: dict[str, float] = {}
    for point in points:
        for part, milliseconds in point["parts_ms"].items():
            parts[part] = max(parts.get(part, 0.0), milliseconds)
    names = sorted(parts, key=lambda part: -parts[part])
    header = [f"{p['scheme']}, batch {p['batch']}, K = {p['k']}" for p in points]
    lines = [row(["ms per step", *header]), row([":---", *["---:"] * len(points)])]
    for name in names:
        lines.append(row([name, *(f"{p['parts_ms'].get(name, 0.0):.2f}" for p in points)]))
    lines.append(row(["all", *(f"{point['cycle_ms']:.2f}" for point in points)]))
    return "\n".join([*lines, "", "Medians. " + circumstances(document)])


WEIGHT_PHASES = (
    "publish",
    "verifying",
    "staging",
    "loading",
    "recording",
    "resume",
    "all",
    "requantize",
    "until_drafting",
)


WEIGHT_SIDES = {
    "phases_s": "one engine",
    "phases_of_ahead_s": "loaded ahead",
    "phases_of_delta_s": "1 % changed",
    "phases_of_two_s": "two engines",
}


def weights_table(document: dict[str, Any]) -> str:
    """A row per phase of a push to one engine, of what changed, and to two."""
    result = document["result"]
    sides = [result[name] for name in WEIGHT_SIDES]
    header = ["seconds", *WEIGHT_SIDES.values()]
    lines = [row(header), row([":---", *["---:"] * len(sides)])]
    for phase in WEIGHT_PHASES:
        if phase not in sides[0]:
            continue  # figures of before pushes were answered ahead of the drafter's rebuild
        lines.append(row([phase, *(f"{side[phase]:.3f}" for side in sides)]))
    return "\n".join(
        [
            *lines,
            "",
            f"A plain copy of the same {result['bytes'] / 1e9:.2f} GB in memory took "
            f"{result['copy_s']:.3f} s: a push takes {result['full_push_ratio']:.1f} times as long "
            f"({spread(result['full_push_spread'], 1)}) and stops generation for "
            f"{result['pause_ratio']:.1f} times as long; loaded ahead of the pause, "
            f"{result['ahead_push_ratio']:.1f} and {result['ahead_pause_ratio']:.1f} times. "
            "Verification is "
            f"{result['verify_share']:.0%} of it; a second engine on the host makes it "
            f"{result['two_engines_ratio']:.2f} times as long. Where one element in a hundred "
            f"of every tensor changed, a push takes {result['delta_time_ratio']:.2f} of the time "
            f"and {result['delta_bytes_ratio']:.1%} of the bytes. Medians of {result['repeats']} "
            "alternating repeats; every engine has one core and runs a sequence all the while. "
            + circumstances(document),
        ]
    )


def faults_table(document: dict[str, Any]) -> str:
    """A row per fault, with what came of it."""
    result = document["result"]
    faults = result["faults"]
    lines = [row(["fault", "times"]), row([":---", "---:"])]
    sent = result["bad_pushes_by_kind"]
    lines += [row([f"push: {kind}", str(count)]) for kind, count in sent.items()]
    kills = result["kills_by_victim"]
    # Runs before these were counted apart have all kills only.
    inside = result.get("kills_inside_the_window", {})
    lines += [
        row([f"kill -9: {victim}", _of_them_inside(count, inside.get(victim))])
        for victim, count in kills.items()
    ]
    totals = ("wrong_version_samples", "half_loaded", "hangs", "leftovers")
    return "\n".join(
        [
            *lines,
            "",
            f"{faults['refused']} of {faults['bad_pushes']} bad pushes refused, {faults['kills']} "
            "kills: "
            + ", ".join(f"{faults[name]} {name.replace('_', ' ')}" for name in totals)
            + f"; {result['checked_samples']} samples checked while processes died, "
            f"{result['pushes_committed_despite_a_kill']} pushes committed all the same. "
            + circumstances(document),
        ]
    )


def _of_them_inside(count: int, inside: int | None) -> str:
    return f"{count}" if inside is None else f"{count}, {inside} before the push had its answer"


def transports_table(document: dict[str, Any]) -> str:
    """A row per direction of the transport ``ray``, and the broadcast of ``nccl`` if measured."""
    result = document["result"]
    names = {"spread": "server to another node", "upload": "trainer to the server's node"}
    lines = [
        row(["", "GB/s", "of a plain copy through the store"]),
        row([":---", "---:", "---:"]),
        row(["plain copy", f"{result['raw_bytes_per_s'] / 1e9:.2f}", ""]),
    ]
    for side, name in names.items():
        share = f"{result[f'{side}_of_raw']:.2f} ({spread(result[f'{side}_of_raw_spread'], 2)})"
        lines.append(row([name, f"{result[f'{side}_bytes_per_s'] / 1e9:.2f}", share]))
    beside = ""
    if "broadcast_of_socket" in result:
        share = f"{result['broadcast_of_socket']:.2f} of the socket"
        bounds = spread(result["broadcast_of_socket_spread"], 2)
        lines += [
            row(["plain socket", f"{result['socket_bytes_per_s'] / 1e9:.2f}", ""]),
            row(
                [
                    "broadcast to both nodes",
                    f"{result['broadcast_bytes_per_s'] / 1e9:.2f}",
                    f"{share} ({bounds})",
                ]
            ),
        ]
        beside = (
            "The broadcast, over gloo, writes a file on each node; the plain socket carries the "
            "bytes once, and nobody writes them. "
        )
    return "\n".join(
        [
            *lines,
            "",
            f"{result['bytes'] / 1e9:.2f} GB from memory or a file to a file, against the same "
            f"bytes put as one object and fetched by the other node, which writes nothing. {beside}"
            f"Verifying the copy comes on top, at {result['verify_bytes_per_s'] / 1e9:.1f} GB/s. "
            "Two Ray nodes on one host, so the network is its loopback; buckets of "
            f"{result['bucket_mib']} MiB. "
            f"Medians of {result['repeats']} alternating repeats (spread). "
            + circumstances(document),
        ]
    )


TABLES = {
    "weight_faults": faults_table,
    "weight_transports": transports_table,
    "weights": weights_table,
    "speculation": speculation_table,
    "requantize": requantize_table,
    "drafter": drafter_table,
    "scheduler": scheduler_table,
    "scheduler_robustness": robustness_table,
    "scheduler_sim": simulation_table,
    **SERVICE_TABLES,
}


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


def main() -> int:
    for page in PAGES:
        page.write_text(with_figures(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
