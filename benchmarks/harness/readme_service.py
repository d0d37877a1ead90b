"""Tables of what was measured of the service: HTTP, load, scaling, and what dies under it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.harness.markdown import circumstances, head, row, spread

NAMES_OF_BAD = {
    "lost": "samples lost",
    "duplicated": "samples delivered twice",
    "mixed_version": "samples whose spans do not cover every token once",
    "wrong_tokens": "samples with a token of other weights than they say",
    "hangs": "requests of over a minute while something served",
    "unaccounted": "samples that the server's books do not tell of",
    "replaced_though_alive": "slow engines that were replaced",
    "leftover_processes": "processes left",
    "leftover_files": "files left in shared memory and /tmp",
}
"""Of ``make chaos``."""


def http_table(document: dict[str, Any]) -> str:
    """Against the engine alone, and a row for each kind of group without a model."""
    result = document["result"]
    lines = head("groups of engines without a model", "per second", "latency p50, ms", "p99, ms")
    lines += [
        row(
            [
                point["group"],
                f"{point['requests_per_s']:.0f} ({spread(point['spread'], 0)})",
                f"{point['latency_ms_p50']:.1f}",
                f"{point['latency_ms_p99']:.1f}",
            ]
        )
        for point in result["fake_engine_points"]
    ]
    parts = ", ".join(
        f"{name.replace('_', ' ')} {value:.2f}"
        for name, value in result["cpu_ms_per_request"].items()
        if isinstance(value, float)
    )
    return "\n".join(
        [
            *lines,
            "",
            "A real engine of 160 million parameters through client, server, router and Ray makes "
            f"{result['throughput_ratio']:.3f} ({spread(result['throughput_ratio_spread'])}) of "
            "the tokens per second that it makes when it is handed the same prompts in its own "
            f"process; one request alone takes {result['added_latency_ms_p50']:.1f} ms longer "
            f"({spread(result['added_latency_ms_spread'], 1)}). CPU milliseconds of a group of "
            f"n=8 x 64 by part: {parts}. {_judged(result)} Medians of {result['repeats']} "
            f"repeats (spread). {circumstances(document)}",
        ]
    )


def overload_table(document: dict[str, Any]) -> str:
    """One paragraph."""
    result = document["result"]
    return (
        f"At {result['factor']} times the {result['peak_groups_per_s']:.0f} groups a second that "
        f"its engines can make, a server delivers {result['goodput_ratio']:.3f} "
        f"({spread(result['goodput_ratio_spread'])}) of that peak; {result['refused']:,} groups "
        f"were refused with 429, {result['refused_without_retry_after']} of them without "
        f"`Retry-After`, and its memory grew by {result['rss_growth_mb']:.1f} MB. "
        f"{_judged(result)} Medians of {result['repeats']} repeats (spread). "
        f"{circumstances(document)}"
    )


def scale_table(document: dict[str, Any]) -> str:
    """A row per change of the number of engines."""
    result = document["result"]
    elastic = result["elastic"]
    plain = ""
    if "plain_vllm_ratio" in result:  # older measurements have none
        bounds = spread(result["plain_vllm_ratio_spread"], 2)
        plain = f"; two of vLLM alone make {result['plain_vllm_ratio']:.2f} ({bounds}) here"
    lines = head("engines", "there after, s")
    lines += [row([str(step["count"]), f"{step['took_s']:.1f}"]) for step in elastic["steps"]]
    return "\n".join(
        [
            *lines,
            "",
            f"While that went on, {elastic['requests']} groups were asked for, "
            f"{result['failed_requests']} failed, and the longest took "
            f"{elastic['longest_latency_s']:.1f} s. Two engines of one core each make "
            f"{result['two_engine_ratio']:.2f} ({spread(result['two_engine_ratio_spread'], 2)}) "
            f"times the tokens of one{plain}. "
            f"With 64 engines without a model and 2,000 requests in flight a group is "
            f"with the router for {result['router_ms_p50']:.2f} ms (median). "
            f"{_judged(result)} Medians of {result['repeats']} repeats (spread). "
            f"{circumstances(document)}",
        ]
    )


def chaos_table(document: dict[str, Any]) -> str:
    """A row per victim, a row per thing that must not be, and how long it took."""
    result = document["result"]
    chaos = result["chaos"]
    lines = head("struck", "times")
    lines += [row([name, str(n)]) for name, n in result["kills_by_victim"].items()]
    lines += [row(["engines without a model", str(chaos["fake_kills"])])]
    lines += ["", *head("found", "")]
    lines += [row([text, str(chaos[name])]) for name, text in NAMES_OF_BAD.items()]
    moments = ", ".join(f"{n} while {name}" for name, n in result["kills_by_moment"].items())
    times = [
        f"{text} {chaos[f'{name}_p50']:.1f} and {chaos[f'{name}_p95']:.1f} s"
        for name, text in (
            ("detection_s", "a killed engine was found dead after"),
            ("frozen_detection_s", "a frozen one after"),
            ("recovery_s", "as many engines as before served after"),
            ("beyond_start_s", "of which the start of the new engine leaves"),
        )
        if f"{name}_p50" in chaos
    ]
    parts = {name: part["circumstances"] for name, part in document["raw"].items()}
    commits = ", ".join(f"{name} of {about['commit']}" for name, about in parts.items())
    return "\n".join(
        [
            *lines,
            "",
            f"Struck {moments}. {result['checked_samples']:,} samples of real engines and "
            f"{result['checked_samples_of_fake_engines']:,} of others were checked token by token, "
            f"{result['committed_pushes']} pushes committed, {result['connections_cut']} "
            f"connections cut in the middle of an answer. p50 and p95: {'; '.join(times)}. "
            f"Measured: {commits}. {circumstances(document)}",
        ]
    )


def chaos_training_table(document: dict[str, Any]) -> str:
    """A row per seed."""
    result, raw = document["result"], document["raw"]
    lines = head("seed", "undisturbed", "engines killed")
    accuracy = result["final_accuracy"]
    for seed, calm, hit in zip(result["seeds"], accuracy["calm"], accuracy["hit"], strict=True):
        lines.append(row([str(seed), f"{calm:.3f}", f"{hit:.3f}"]))
    verdict = "within" if result["within_seed_noise"] else "OUTSIDE"
    return "\n".join(
        [
            *lines,
            "",
            f"Held-out accuracy after {len(raw['calm'][0]['rewards'])} steps. The means differ by "
            f"{result['accuracy_difference']:+.3f}, standard error {result['standard_error']:.3f}: "
            f"{verdict} two standard errors. The mean reward of a step differs by "
            f"{result['reward_gap_calm_to_hit']:.3f} between a run and its disturbed twin, by "
            f"{result['reward_gap_between_seeds']:.3f} between undisturbed runs of two seeds. "
            f"{result['kills']} kills, in {result['share_of_steps_hit']:.0%} of the steps: useful "
            f"time {result['useful_time_ratio']:.0%}{_of_steps(result)}. {circumstances(document)}",
        ]
    )


def _of_steps(result: dict[str, Any]) -> str:
    if "step_s" not in result:
        return ""  # figures of before it was kept
    return f" of steps of {result['step_s']:.1f} s, each kill costs {result['lost_s_per_kill']:.1f}"


def fuzz_table(document: dict[str, Any]) -> str:
    """One paragraph."""
    result = document["result"]
    fuzz, aborts = result["fuzz"], result["aborts"]
    return (
        f"{fuzz['schema_cases']:,} cases of schemathesis ({result['schema_checks_failed']} runs "
        f"with a failed check), {fuzz['raw_bodies']:,} raw bodies and "
        f"{result['broken_requests']:,} broken requests: {fuzz['server_errors']} server errors, "
        f"{len(result['wrong_answers'])} wrong answers, {fuzz['deaths']} dead servers, memory "
        f"{fuzz['rss_growth_mb']:+.1f} MB. {aborts['aborted']:,} requests whose clients left: "
        f"KV usage back to {aborts['kv_cache_usage']:g} after {aborts['release_s']:.2f} s, "
        f"{aborts['left_pending']} samples left pending, memory {aborts['rss_mb_per_1000']:+.2f} "
        f"MB per 1,000. {circumstances(document)}"
    )


SERVICE_TABLES = {
    "http": http_table,
    "overload": overload_table,
    "scale": scale_table,
    "chaos": chaos_table,
    "chaos_training": chaos_training_table,
    "chaos_training_128_prompts": chaos_training_table,
    "fuzz": fuzz_table,
}


def _judged(result: Mapping[str, Any]) -> str:
    """What the figures were held to."""
    verdicts = []
    for name, bar in result["bars"].items():
        bound = (
            f"at least {bar['at_least']:g}" if "at_least" in bar else f"at most {bar['at_most']:g}"
        )
        verdicts.append(f"`{name}` {bound}: {'met' if bar['met'] else 'MISSED'}")
    return f"Bars: {', '.join(verdicts)}."
