"""A push is compared with the model before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rollout_server.weights.expectation import check_against_model, expected_tensors
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


def checkpoint(directory: Path, config: dict[str, object] | None) -> str:
    """A model directory that stores its head, tied or not."""
    shapes = {**EXPECTED, "lm_head.weight": (8, 4)}
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors")
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


@pytest.mark.parametrize(
    "config",
    [{"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}],
)
def test_a_tied_head_that_the_checkpoint_stores_all_the_same_may_be_sent_or_not(
    tmp_path: Path, config: dict[str, object]
) -> None:
    expected = expected_tensors(checkpoint(tmp_path, config))
    check_against_model(manifest(**FITTING), expected)
    check_against_model(manifest(**FITTING, lm_head__weight=(8, 4)), expected)


@pytest.mark.parametrize(
    "config", [{"tie_word_embeddings": False}, {"text_config": None}, {}, None]
)
def test_a_head_that_is_not_known_to_be_tied_must_be_sent(
    tmp_path: Path, config: dict[str, object] | None
) -> None:
    expected = expected_tensors(checkpoint(tmp_path, config))
    with pytest.raises(WeightVerificationError, match=r"1 tensors missing .*'lm_head\.weight'"):
        check_against_model(manifest(**FITTING), expected)


def test_integer_tensors_are_refused() -> None:
    entry = TensorEntry(name="a", dtype="I8", shape=[1], num_bytes=1, digest="")
    bad = WeightManifest(segment="slipstream-x.safetensors", tensors=[entry])
    with pytest.raises(WeightVerificationError, match="dtype I8"):
        check_against_model(bad, None)
