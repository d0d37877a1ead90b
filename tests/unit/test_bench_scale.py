"""``make bench-scale``: what counts as a failed request, and how its figures are made."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

import pytest

from benchmarks.harness.bars import judged
from benchmarks.harness.checked_load import (
    GroupShape,
    Outcome,
    checked_loop,
    fault_of,
    group_request,
)
from benchmarks.harness.modelled_engine import VOCAB_SIZE, EngineTimes
from benchmarks.harness.modelled_server import ModelledServer
from benchmarks.harness.router_load import RouterPlan, measure_router, percentile, waits
from benchmarks.harness.scale_steps import (
    ElasticPlan,
    ElasticRun,
    EngineControl,
    elastic_figures,
    run_elastic,
    timeline,
)
from benchmarks.scale import (
    BARS,
    ThroughputPlan,
    plain_figures,
    throughput,
    throughput_figures,
)

SHAPE = GroupShape(n=2, num_tokens=5)
PACED = EngineTimes(step_s=0.002, max_num_seqs=4)


def answer(**changes: Any) -> dict[str, Any]:
    """A whole one, but for ``changes`` of its second sample."""
    samples = [
        {"sample_index": index, "token_ids": [7] * 5, "finish_reason": "length"}
        for index in range(2)
    ]
    samples[1] |= changes
    return {"groups": [{"samples": samples}]}


def outcome(ended_s: float, engine_id: str = "a", fault: str | None = None) -> Outcome:
    return Outcome(ended_s=ended_s, latency_s=0.5, engine_ids=(engine_id,), fault=fault)


def test_plain_engines_are_compared_within_a_repeat() -> None:
    rounds = [{"alone": 10.0, "both": 10.0 * ratio, "ratio": ratio} for ratio in (1.7, 1.9, 1.8)]
    assert plain_figures(rounds) == {
        "plain_vllm_ratio": 1.8,
        "plain_vllm_ratio_spread": [1.7, 1.9],
    }


def test_only_one_group_with_all_samples_in_full_is_no_failure() -> None:
    assert fault_of(200, answer(), SHAPE) is None
    assert fault_of(503, None, SHAPE) == "status 503"
    assert fault_of(200, {"groups": []}, SHAPE) == "0 groups instead of 1"
    assert fault_of(200, answer(sample_index=0), SHAPE) == "samples [0, 0] instead of 2"
    short = fault_of(200, answer(token_ids=[7] * 4), SHAPE)
    assert short == "4 tokens instead of 5, finish_reason 'length'"
    assert fault_of(200, answer(finish_reason="abort"), SHAPE) is not None


def test_every_request_has_a_prompt_of_its_own_and_the_same_number_is_the_same_work() -> None:
    requests = [group_request(number, SHAPE, 16_000) for number in range(500)]
    prompts = {
        tuple(json.loads(r.partition(b"\r\n\r\n")[2])["prompts"][0]["prompt_token_ids"])
        for r in requests
    }
    assert len(prompts) == len(requests)
    assert group_request(3, SHAPE, 16_000) == requests[3]


async def test_clients_report_whole_answers_refusals_and_a_server_that_is_gone() -> None:
    requests = [group_request(number, SHAPE, VOCAB_SIZE) for number in range(12)]
    limits = {"server": {"limits": {"max_n": 2}}}
    with ModelledServer(settings=limits, times=PACED, num_engines=2) as server:
        whole = await checked_loop(server.port, iter(requests), SHAPE, concurrency=4)
        too_many = GroupShape(n=3, num_tokens=5)
        refused = await checked_loop(
            server.port, iter([group_request(0, too_many, VOCAB_SIZE)]), too_many, concurrency=1
        )
        port = server.port
    gone = await checked_loop(port, iter(requests[:1]), SHAPE, concurrency=1)
    assert [one.fault for one in whole] == [None] * 12
    assert {engine for one in whole for engine in one.engine_ids} == {"engine-0", "engine-1"}
    assert [one.fault for one in refused] == ["status 400"]
    assert "no answer" in str(gone[0].fault)


async def test_engines_that_join_find_work_and_nothing_fails() -> None:
    plan = ElasticPlan(
        counts=(1, 2, 4), hold_s=1.5, concurrency=8, shape=SHAPE, vocab_size=VOCAB_SIZE
    )
    with ModelledServer(times=PACED, num_engines=1) as server:
        run = await run_elastic(server.port, plan)
    figures = elastic_figures(run, SHAPE)
    assert figures["failed_requests"] == 0
    assert figures["requests"] > 8
    assert figures["engines_that_answered"] == 4
    assert [step["count"] for step in figures["steps"]] == [2, 4]
    assert figures["samples_of_whole_answers"] == figures["samples_delivered"]
    assert figures["samples_unaccounted"] == 0
    assert dict(run.states[-1][1]) == {"serving": 4}


def test_the_timeline_has_a_row_per_interval_with_what_failed_in_it() -> None:
    run = ElasticRun(
        outcomes=[outcome(0.5), outcome(1.2, "b"), outcome(1.3, "a"), outcome(3.1, fault="bad")],
        states=[(0.1, Counter(serving=1)), (1.5, Counter(serving=1, starting=1))],
        steps=[{"count": 2, "asked_s": 1.4, "took_s": 1.0}],
        books={"samples_accepted_total": 8, "samples_delivered_total": 6, "samples_unaccounted": 0},
    )
    rows = timeline(run, 1.0)
    assert [row["t_s"] for row in rows] == [1.0, 2.0, 3.0, 4.0]
    assert [row["groups"] for row in rows] == [1, 2, 0, 0]
    assert [row["failed"] for row in rows] == [0, 0, 0, 1]
    assert [row["engines"] for row in rows[:2]] == [{"serving": 1}, {"serving": 1, "starting": 1}]
    assert [row["asked_for"] for row in rows] == [[], [2], [], []]
    assert rows[1]["engines_that_answered"] == 2
    figures = elastic_figures(run, SHAPE)
    assert (figures["failed_requests"], figures["faults"]) == (1, {"bad": 1})


async def test_a_side_whose_second_engine_does_nothing_is_no_measurement() -> None:
    plan = ThroughputPlan(shape=SHAPE, groups_per_client=2, vocab_size=VOCAB_SIZE)
    with ModelledServer(times=PACED, num_engines=1) as server:
        assert await throughput(server.port, 1, plan, 0) > 0
        with pytest.raises(RuntimeError, match="1 of 2 engines answered"):
            await throughput(server.port, 2, plan, 0)
        await EngineControl(server.port).scale(2)
        assert await throughput(server.port, 2, plan, 0) > 0


def test_ratios_are_taken_within_a_repeat() -> None:
    rounds = [
        {"1_tokens_per_s": 10.0 * speed, "2_tokens_per_s": 19.0 * speed, "ratio": 1.9}
        for speed in (1.0, 2.0, 9.0)
    ]
    figures = throughput_figures(rounds)
    assert (figures["two_engine_ratio"], figures["one_engine_tokens_per_s"]) == (1.9, 20.0)


def test_what_was_not_measured_is_not_met() -> None:
    met = judged({"two_engine_ratio": 1.8, "failed_requests": 0}, BARS)
    missed = judged({"two_engine_ratio": 1.79, "failed_requests": 1}, BARS)
    unknown = judged({"two_engine_ratio": None, "failed_requests": None}, BARS)
    assert [verdict["met"] for verdict in met.values()] == [True, True]
    assert [verdict["met"] for verdict in missed.values()] == [False, False]
    assert [verdict["met"] for verdict in unknown.values()] == [False, False]


async def test_the_router_is_timed_from_a_groups_arrival_to_its_engine() -> None:
    plan = RouterPlan(
        num_engines=8, num_in_flight=64, n=2, warm_up_s=0.2, duration_s=0.5, mean_hold_s=0.05
    )
    found = await measure_router(plan, seed=0)
    assert 0 < found["ms_p50"] <= found["ms_p99"] <= found["ms_max"]
    assert found["groups_per_s"] > 0
    assert 0 < found["choice_cpu_us"] < found["cpu_us"]


def test_waits_are_of_the_groups_that_arrived_in_the_stretch() -> None:
    arrivals = {"early": 0.5, "a": 1.0, "b": 1.5, "late": 2.0}
    dispatches = {"early": 0.6, "a": 1.002, "b": 1.504, "late": 2.1}
    assert waits(arrivals, dispatches, 1.0, 2.0) == pytest.approx([2.0, 4.0])
    del dispatches["b"]
    with pytest.raises(AssertionError, match="1 of 2 groups went nowhere"):
        waits(arrivals, dispatches, 1.0, 2.0)


@pytest.mark.parametrize(("share", "value"), [(0.0, 0), (0.5, 50), (0.99, 99), (1.0, 99)])
def test_a_percentile_is_one_of_the_values(share: float, value: int) -> None:
    assert percentile(list(itertools.chain(range(50, 100), range(50))), share) == value
