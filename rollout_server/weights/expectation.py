"""What tensors a push must contain to fit the served model, and which of them are new. Pure, over
checkpoint headers and manifests."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path

from shared.errors import WeightVerificationError
from shared.schemas.weights import WeightManifest
from shared.weights import read_header

FLOAT_DTYPES = frozenset({"F32", "BF16", "F16"})
OPTIONAL_WHEN_TIED = "lm_head.weight"


@functools.lru_cache(maxsize=4)
def expected_tensors(model_path: str) -> Mapping[str, tuple[int, ...]] | None:
    """Names and shapes of the checkpoint the engines started from; None if it has no files here
    (dummy weights, or a hub cache elsewhere): then vLLM's own loader is the only judge.

    Without the head of a tied model, which some checkpoints store a second time: engines pass over
    it, and trainers send a tied tensor once."""
    files = sorted(Path(model_path).glob("*.safetensors"))
    if not files:
        return None
    expected = {
        name: tuple(span.shape) for file in files for name, span in read_header(file).items()
    }
    if _is_tied(Path(model_path)):
        expected.pop(OPTIONAL_WHEN_TIED, None)
    return expected


def check_against_model(
    manifest: WeightManifest, expected: Mapping[str, tuple[int, ...]] | None
) -> None:
    """Compare a manifest with the model.

    Raises:
        WeightVerificationError: naming the first tensor that is missing, unknown or misshapen.
    """
    for entry in manifest.tensors:
        if entry.dtype not in FLOAT_DTYPES:
            raise WeightVerificationError(
                f"tensor {entry.name!r} has dtype {entry.dtype}; "
                f"expected one of {', '.join(sorted(FLOAT_DTYPES))}",
                param="manifest.tensors",
            )
    if expected is None:
        return
    given = {entry.name: tuple(entry.shape) for entry in manifest.tensors}
    missing = sorted(expected.keys() - given.keys() - {OPTIONAL_WHEN_TIED})
    extra = sorted(given.keys() - expected.keys() - {OPTIONAL_WHEN_TIED})
    if OPTIONAL_WHEN_TIED in expected and OPTIONAL_WHEN_TIED not in given:
        missing.append(OPTIONAL_WHEN_TIED)
    if missing or extra:
        raise WeightVerificationError(
            f"push does not fit the model: {len(missing)} tensors missing"
            f"{_first(missing)}, {len(extra)} unknown{_first(extra)}",
            param="manifest.tensors",
        )
    for name, shape in given.items():
        if name in expected and expected[name] != shape:
            raise WeightVerificationError(
                f"tensor {name!r} has shape {list(shape)}; the model needs {list(expected[name])}",
                param="manifest.tensors",
            )


def changed_tensors(old: WeightManifest | None, new: WeightManifest | None) -> list[str] | None:
    """Names of the tensors whose bits differ; None (all of them) where one side is not known, or
    the names are others."""
    if old is None or new is None:
        return None
    before = {entry.name: entry for entry in old.tensors}
    after = {entry.name: entry for entry in new.tensors}
    if before.keys() != after.keys():
        return None
    return [name for name, entry in after.items() if entry != before[name]]


def _is_tied(model_path: Path) -> bool:
    try:
        config = json.loads((model_path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # then what the files have is all there is to go by
    # Models of several modalities have the language model's settings one level down.
    parts = (config, config.get("text_config") or {})
    return any(part.get("tie_word_embeddings") is True for part in parts)


def _first(names: list[str]) -> str:
    return f" (first {names[0]!r})" if names else ""
