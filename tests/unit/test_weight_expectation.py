"""A push is compared with the model before anything is loaded."""

from __future__ import annotations

import pytest

from rollout_server.weights.expectation import check_against_model
from shared.errors import WeightVerificationError
from shared.schemas.weights import TensorEntry, WeightManifest

EXPECTED = {"model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,)}


def manifest(**shapes: tuple[int, ...]) -> WeightManifest:
    entries = [
        TensorEntry(
            name=name.replace("__", "."), dtype="F32", shape=list(shape), num_bytes=0, digest=""
        )
        for name, shape in shapes.items()
    ]
    return WeightManifest(segment="slipstream-x.safetensors", tensors=entries)


FITTING = {"model__embed_tokens__weight": (8, 4), "model__norm__weight": (4,)}


def test_a_fitting_push_passes() -> None:
    check_against_model(manifest(**FITTING), EXPECTED)


def test_a_tied_head_may_be_repeated() -> None:
    check_against_model(manifest(**FITTING, lm_head__weight=(8, 4)), EXPECTED)


def test_without_a_checkpoint_to_compare_with_only_dtypes_are_checked() -> None:
    check_against_model(manifest(anything=(1,)), None)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"model__norm__weight": (4,)}, "1 tensors missing .first 'model.embed_tokens.weight'"),
        ({**FITTING, "extra": (1,)}, "1 unknown .first 'extra'"),
        ({**FITTING, "model__norm__weight": (5,)}, r"'model.norm.weight' has shape \[5\]"),
    ],
)
def test_a_push_that_does_not_fit_is_refused_by_name(
    shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(WeightVerificationError, match=message):
        check_against_model(manifest(**shapes), EXPECTED)


def test_an_untied_model_needs_its_head() -> None:
    with pytest.raises(WeightVerificationError, match=r"lm_head\.weight"):
        check_against_model(manifest(**FITTING), {**EXPECTED, "lm_head.weight": (8, 4)})


def test_integer_tensors_are_refused() -> None:
    entry = TensorEntry(name="a", dtype="I8", shape=[1], num_bytes=1, digest="")
    bad = WeightManifest(segment="slipstream-x.safetensors", tensors=[entry])
    with pytest.raises(WeightVerificationError, match="dtype I8"):
        check_against_model(bad, None)
