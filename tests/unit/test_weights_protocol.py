"""The rules of a push as tables, and as properties over random histories."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_server.weights.protocol_state import (
    LoadOutcome,
    LoadReport,
    PushAdmission,
    StageOutcome,
    StageReport,
    admit_push,
    judge_load,
    judge_stage,
    num_engines_needed,
    same_tensors,
    takes_part,
)
from shared.errors import (
    ConflictError,
    InvalidRequestError,
    RequestError,
    SlipstreamError,
    UnavailableError,
    WeightTransferError,
    WeightVerificationError,
)
from shared.schemas.weights import PublishRequest, TensorEntry, WeightManifest
from shared.types import PUSH_TRANSITIONS, CommitPolicy, EngineState, PushPhase


def make_manifest(digest: str = "d", names: str = "ab") -> WeightManifest:
    return WeightManifest(
        segment="slipstream-x.safetensors",
        tensors=[
            TensorEntry(name=name, dtype="F32", shape=[1], num_bytes=4, digest=digest)
            for name in names
        ],
    )


def make_request(version: int, base_version: int, digest: str = "d") -> PublishRequest:
    return PublishRequest(
        version=version, base_version=base_version, manifest=make_manifest(digest)
    )


@pytest.mark.parametrize(
    ("committed", "version", "base", "expected"),
    [
        (0, 1, 0, PushAdmission.PROCEED),
        (0, 7, 0, PushAdmission.PROCEED),
        (5, 6, 5, PushAdmission.PROCEED),
        (5, 9, 5, PushAdmission.PROCEED),
        (5, 5, 4, PushAdmission.REPLAY),
        (5, 5, 0, PushAdmission.REPLAY),
        (5, 4, 3, ConflictError),
        (5, 6, 4, ConflictError),
        (5, 8, 6, ConflictError),
        (0, 6, 5, ConflictError),
        (5, 6, 6, InvalidRequestError),
        (5, 5, 5, InvalidRequestError),
        (5, 2, 5, InvalidRequestError),
    ],
)
def test_a_push_is_admitted_only_on_top_of_what_is_committed(
    committed: int,
    version: int,
    base: int,
    expected: PushAdmission | type[RequestError],
) -> None:
    manifest = make_manifest() if committed else None
    request = make_request(version, base)
    if isinstance(expected, PushAdmission):
        assert admit_push(committed, manifest, request) is expected
    else:
        with pytest.raises(expected, match=rf"\b{version}\b|\b{base}\b"):
            admit_push(committed, manifest, request)


def test_other_tensors_under_the_committed_version_are_a_conflict() -> None:
    with pytest.raises(ConflictError, match="version 5 is committed already"):
        admit_push(5, make_manifest("d"), make_request(5, 4, digest="e"))


def test_a_wrong_base_is_told_with_both_numbers() -> None:
    with pytest.raises(ConflictError, match=r"base_version 3 .* committed version 5"):
        admit_push(5, make_manifest(), make_request(6, 3))


def test_the_order_of_a_manifest_and_the_name_of_its_file_do_not_count() -> None:
    other = make_manifest(names="ba").model_copy(update={"segment": "slipstream-y.safetensors"})
    assert same_tensors(make_manifest(), other)
    assert not same_tensors(make_manifest(), make_manifest(names="a"))


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6), st.sampled_from("de"))))
def test_versions_only_grow_and_a_version_has_one_content(
    pushes: list[tuple[int, int, str]],
) -> None:
    committed, manifest = 0, None
    contents: dict[int, str] = {}
    for version, base, digest in pushes:
        request = make_request(version, base, digest)
        try:
            admission = admit_push(committed, manifest, request)
        except RequestError:
            continue
        if admission is PushAdmission.REPLAY:
            assert contents[version] == digest
        else:
            assert base == committed < version
            assert version not in contents
            committed, manifest = version, request.manifest
            contents[version] = digest


def staged(outcomes: str) -> list[StageReport]:
    names = {
        "s": StageOutcome.STAGED,
        "r": StageOutcome.REJECTED,
        "d": StageOutcome.DEAD,
        "f": StageOutcome.FAILED,
    }
    return [
        StageReport(engine_id=f"e{index}", outcome=names[letter], stage_s=0.5, detail=letter)
        for index, letter in enumerate(outcomes)
    ]


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ("s", ["e0"]),
        ("ss", ["e0", "e1"]),
        ("ds", ["e1"]),
        ("", UnavailableError),
        ("dd", UnavailableError),
        ("sr", WeightVerificationError),
        ("fr", WeightVerificationError),
        ("dr", WeightVerificationError),
        ("sf", WeightTransferError),
        ("df", WeightTransferError),
    ],
)
def test_staging_is_judged_over_all_engines(
    outcomes: str, expected: list[str] | type[SlipstreamError]
) -> None:
    if isinstance(expected, list):
        assert judge_stage(2, staged(outcomes)) == dict.fromkeys(expected, 0.5)
    else:
        with pytest.raises(expected):
            judge_stage(2, staged(outcomes))


@given(st.text(alphabet="srdf", max_size=6))
def test_no_engine_that_still_serves_is_left_behind(outcomes: str) -> None:
    try:
        engines = judge_stage(2, staged(outcomes))
    except SlipstreamError:
        assert set(outcomes) & set("rf") or "s" not in outcomes
    else:
        assert len(engines) == outcomes.count("s") > 0
        assert not set(outcomes) & set("rf")


def loaded(outcomes: str) -> list[LoadReport]:
    names = {"l": LoadOutcome.LOADED, "p": LoadOutcome.POISONED}
    return [
        LoadReport(engine_id=f"e{index}", outcome=names[letter], detail="broke")
        for index, letter in enumerate(outcomes)
    ]


@pytest.mark.parametrize(
    ("outcomes", "policy", "quorum", "is_committed"),
    [
        ("l", CommitPolicy.ALL, 0.5, True),
        ("llll", CommitPolicy.ALL, 0.1, True),
        ("lllp", CommitPolicy.ALL, 0.1, False),
        ("p", CommitPolicy.ALL, 0.5, False),
        ("lp", CommitPolicy.QUORUM, 0.5, True),
        ("lpp", CommitPolicy.QUORUM, 0.5, False),
        ("llp", CommitPolicy.QUORUM, 0.5, True),
        ("llp", CommitPolicy.QUORUM, 1.0, False),
        ("lppppppppp", CommitPolicy.QUORUM, 0.1, True),
        ("pp", CommitPolicy.QUORUM, 0.01, False),
    ],
)
def test_a_push_is_committed_when_enough_engines_loaded_it(
    outcomes: str, policy: CommitPolicy, quorum: float, is_committed: bool
) -> None:
    verdict = judge_load(2, loaded(outcomes), policy, quorum)
    assert verdict.is_committed is is_committed
    assert verdict.failed == [f"e{i}" for i, letter in enumerate(outcomes) if letter == "p"]
    assert ("e0: broke" in verdict.detail) is (outcomes[0] == "p")


def test_without_an_engine_left_a_push_has_to_wait() -> None:
    with pytest.raises(UnavailableError, match="version 2"):
        judge_load(2, [], CommitPolicy.ALL, 0.5)


@given(st.integers(1, 200), st.floats(0.001, 1.0))
def test_a_quorum_is_at_least_one_engine_and_at_least_its_share(num: int, quorum: float) -> None:
    needed = num_engines_needed(num, CommitPolicy.QUORUM, quorum)
    assert needed in range(1, num + 1)
    assert needed >= quorum * num - 1e-6
    assert needed - 1 < quorum * num or needed == 1
    assert num_engines_needed(num, CommitPolicy.ALL, quorum) == num


def test_versions_used_before_weights_were_lost_are_never_taken_again() -> None:
    for version in (3, 5):
        with pytest.raises(ConflictError, match="above 5"):
            admit_push(0, None, make_request(version, 0), last_version_used=5)
    request = make_request(6, 0)
    assert admit_push(0, None, request, last_version_used=5) is PushAdmission.PROCEED


def test_a_push_ends_once() -> None:
    ends = {phase for phase, following in PUSH_TRANSITIONS.items() if not following}
    assert ends == {PushPhase.COMMITTED, PushPhase.REFUSED}
    assert set(PUSH_TRANSITIONS) == set(PushPhase)


@pytest.mark.parametrize("state", list(EngineState))
@pytest.mark.parametrize("brought_up_to_date", [True, False])
def test_an_engine_takes_part_when_it_serves_or_is_about_to(
    state: EngineState, brought_up_to_date: bool
) -> None:
    expected = state in (EngineState.SERVING, EngineState.PAUSED) or (
        state is EngineState.STARTING and brought_up_to_date
    )
    assert takes_part(state, brought_up_to_date) is expected
