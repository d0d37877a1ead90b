"""Tables of the scheduler's benchmarks; ``readme.py`` puts them into the pages."""

from __future__ import annotations

import statistics
from typing import Any


def scheduler_table(document: dict[str, Any]) -> str:
    """A row per steady load, then what came of the mixed one."""
    result, facts = document["result"], document["circumstances"]
    lines = []
    if result["points"]:
        lines = [
            "| sequences x prompt | rounds | best fixed K | it over off | adaptive over off "
            "| adaptive over best fixed (quartiles) |",
            "|:---|---:|---:|---:|---:|---:|",
        ]
    lines += [
        f"| {p['load']} | {p['rounds']} | {p['best_fixed_k']} | "
        f"{p['fixed_ratios_to_off'][str(p['best_fixed_k'])]:.2f} | "
        f"{p['adaptive_ratio_to_off']:.2f} | {p['ratio_to_best_fixed']:.3f} "
        f"({p['ratio_quartiles'][0]:.2f} to {p['ratio_quartiles'][1]:.2f}) |"
        for p in result["points"]
    ]
    if prediction := result.get("prediction"):
        lines += [
            "",
            f"Whether to speculate was right at {prediction['sign_right_share']:.0%} of the loads; "
            f"the median error of {prediction['num_predicted_steps']} predicted step times was "
            f"{prediction['median_step_time_error']:.1%}. Cost model: {prediction['cost_model']}.",
        ]
    for part, name in MIXED_LOADS.items():
        if mixed := result.get(part):
            lines += ["", _mixed(name, mixed)]
    commits = result.get("commits") or {"all": facts["commit"]}
    of = ", ".join(f"{part} of commit {commit}" for part, commit in commits.items())
    return "\n".join([*lines, "", f"{_circumstances(facts)} Measured: {of}."])


MIXED_LOADS = {
    "mixed": "Mixed load, eight batches of 16 prompts",
    "streaming": "The same prompts all at once, 16 of them running",
}


def _mixed(name: str, mixed: dict[str, Any]) -> str:
    sides = ", ".join(
        f"{side} {mixed[side]:.2f} ({mixed['spread'][side][0]:.2f} to "
        f"{mixed['spread'][side][1]:.2f})"
        for side in mixed["spread"]
        if side != "off"
    )
    over = ", ".join(f"{side} {r:.3f}" for side, r in mixed["adaptive_over"].items())
    return (
        f"{name} ({mixed['num_prompts']} in all, {mixed['num_tokens']} tokens, longest "
        f"{mixed['longest']}, {len(mixed['seconds'])} repeats), over off: {sides}. Adaptive over "
        f"the others, round by round: {over}."
    )


def robustness_table(document: dict[str, Any]) -> str:
    """A row per scenario."""
    result, facts = document["result"], document["circumstances"]
    lines = [
        "| scenario | adaptive over off | worst 30 s | recovery, s | bad choices, s "
        "| last change, s |",
        "|:---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {s['name']} | {s['ratio_to_off']:.2f} | {s['worst_window_ratio']:.2f} | "
        f"{s['recovery_s']:.1f} | {_median_of(s, 'bad_s'):.1f} | "
        f"{_median_of(s, 'last_change_s'):.1f} |"
        for s in result["scenarios"]
    ]
    return "\n".join([*lines, "", "Medians over the repeats. " + _circumstances(facts)])


def _median_of(scenario: dict[str, Any], name: str) -> float:
    return statistics.median(recovery[name] for recovery in scenario["recoveries"])


SIMULATED_POLICIES = {
    "always": "always on",
    "kv_gate": "KV gate",
    "adaptive": "adaptive",
    "adaptive_wrong_calibration": "adaptive, wrong calibration",
    "adaptive_conservative_start": "adaptive, none",
}


def simulation_table(document: dict[str, Any]) -> str:
    """A row per model, device and lengths; speedups over plain decoding."""
    result = document["result"]
    speedups: dict[tuple[str, str, str], dict[str, float]] = {}
    for point in result["points"]:
        row = speedups.setdefault((point["model"], point["device"], point["lengths"]), {})
        row[point["policy"]] = point["speedup_over_off"]
    lines = [
        f"| model, device | lengths | {' | '.join(SIMULATED_POLICIES.values())} |",
        f"|:---|:---|{'---:|' * len(SIMULATED_POLICIES)}",
    ]
    for (model, device, lengths), row in speedups.items():
        cells = [f"{row[policy]:.2f}" if policy in row else "" for policy in SIMULATED_POLICIES]
        lines.append(f"| {model}, {device} | {lengths} | {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            "Simulated, over plain decoding: the real controller over a true cost model, 128 "
            "sequences per engine. *Wrong calibration* is off by a systematic factor, *none* "
            "starts from the conservative rule. A decision took "
            f"{result['decide_us']:.0f} microseconds.",
        ]
    )


def _circumstances(facts: dict[str, Any]) -> str:
    return (
        f"Sides alternate in one run: medians (spread). {facts['num_cores']} cores of "
        f"{facts['cpu']}, vLLM {facts['vllm']}, commit {facts['commit']}."
    )
