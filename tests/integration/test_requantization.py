"""Rebuilding a real engine's drafter, as a whole and only where a push changed something.

How a drafter lags behind: ``test_weight_push_engine.py``. int4 packs as int8 does, row by row, and
runs with ``PROOF=1``. Where layers are split between ranks, and by a few kernels, a layer is
collected before it is packed: an engine that is made to believe so stands for them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file, save_file

from rollout_server.engine.actor import EngineActor
from tests.support import proof
from tests.support.engine import probe, running_engine
from tests.support.models import make_model

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

PROBE = "tests.support.requantization_probe.RequantizationProbe"
KINDS = [("int8", True), ("fp8", False), ("fp8", True), ("int4", True)]
"""Scheme, and whether it packs rows."""
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.1.mlp"
QUERY, GATE, DOWN = f"{ATTENTION}.q_proj.weight", f"{MLP}.gate_proj.weight", f"{MLP}.down_proj"
EMBEDDING = "model.embed_tokens.weight"
CHANGED = [QUERY, GATE, f"{DOWN}.weight", EMBEDDING, "model.norm.weight"]
REST_OF_FUSED = [
    f"{ATTENTION}.k_proj.weight",
    f"{ATTENTION}.v_proj.weight",
    f"{MLP}.up_proj.weight",
]
TOUCHED = {f"{ATTENTION}.qkv_proj", f"{MLP}.gate_up_proj", DOWN, "lm_head"}
HIDDEN, INTERMEDIATE, QUERY_ROWS, KEY_ROWS = 512, 3072, 512, 128
LARGEST_LAYER_BYTES = 2 * INTERMEDIATE * HIDDEN * 2
"""gate_up_proj in bfloat16; all layers together have three and a half times as much."""


@dataclass(kw_only=True, slots=True)
class Served:
    """An engine with a tied LM head, and two sets of weights for its drafter."""

    engine: EngineActor
    old: Path
    new: Path
    packs_rows: bool
    """Shards of a fused layer are packed one by one."""

    def mixed(self, path: Path, changed: list[str]) -> Path:
        """The old weights with some of the new ones."""
        old, new = load_file(self.old), load_file(self.new)
        save_file({name: (new if name in changed else old)[name] for name in old}, path)
        return path

    @property
    def changed(self) -> list[str]:
        """What a push must bring for ``TOUCHED`` to be repacked."""
        return CHANGED if self.packs_rows else [*CHANGED, *REST_OF_FUSED]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Model directories wide enough to see one layer in a process's memory."""
    root = tmp_path_factory.mktemp("models")
    return [
        make_model(
            root / f"v{seed}",
            seed=seed,
            dtype=torch.bfloat16,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_attention_heads=QUERY_ROWS // 128,
            num_key_value_heads=KEY_ROWS // 128,
            head_dim=128,
        )
        for seed in range(2)
    ]


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=KINDS if proof.IS_LONG else KINDS[:2]
)
async def served(request: pytest.FixtureRequest, checkpoints: list[Path]) -> AsyncIterator[Served]:
    scheme, packs_rows = request.param
    old, new = (path / "model.safetensors" for path in checkpoints)
    async with running_engine(
        checkpoints[0],
        drafter={"scheme": scheme},
        dtype="bfloat16",
        worker_extension=PROBE,
    ) as engine:
        if not packs_rows:
            await probe(engine, "probe_collect_layers")
        yield Served(engine=engine, old=old, new=new, packs_rows=packs_rows)


async def test_a_whole_push_repacks_every_layer_and_depends_on_nothing_but_the_weights(
    served: Served,
) -> None:
    old = await probe(served.engine, "probe_requantize", str(served.old))
    new = await probe(served.engine, "probe_requantize", str(served.new))
    assert len(old) == 2 * 4 + 1
    assert all(old[name] != new[name] for name in old)
    assert await probe(served.engine, "probe_requantize", str(served.old)) == old


async def test_changed_shards_give_what_a_whole_push_of_the_same_weights_gives(
    served: Served, tmp_path: Path
) -> None:
    mixed = served.mixed(tmp_path / "mixed.safetensors", served.changed)
    expected = await probe(served.engine, "probe_requantize", str(mixed))
    before = await probe(served.engine, "probe_requantize", str(served.old))
    done = await probe(served.engine, "probe_requantize_changed", str(served.new), served.changed)
    assert tuple(done) == (len(TOUCHED), "")
    after = await probe(served.engine, "probe_digests")
    assert after == expected
    assert {name for name in after if after[name] != before[name]} == TOUCHED


async def test_block_by_block_gives_what_a_whole_push_and_a_partial_one_give(
    served: Served, tmp_path: Path
) -> None:
    new = await probe(served.engine, "probe_requantize", str(served.new))
    await probe(served.engine, "probe_requantize", str(served.old))
    # Two decoder blocks and the LM head.
    assert await probe(served.engine, "probe_requantize_by_block", str(served.new), None) == 3
    assert await probe(served.engine, "probe_digests") == new

    mixed = served.mixed(tmp_path / "mixed.safetensors", served.changed)
    expected = await probe(served.engine, "probe_requantize", str(mixed))
    await probe(served.engine, "probe_requantize", str(served.old))
    await probe(served.engine, "probe_requantize_by_block", str(served.new), served.changed)
    assert await probe(served.engine, "probe_digests") == expected
    await probe(served.engine, "probe_requantize", str(served.old))


async def test_only_what_changed_is_written(served: Served) -> None:
    # By digests alone a layer that is packed again from the same weights looks untouched.
    await probe(served.engine, "probe_scribble")
    assert set((await probe(served.engine, "probe_rewritten")).values()) == {0.0}
    await probe(served.engine, "probe_requantize_changed", str(served.new), served.changed)
    shares = await probe(served.engine, "probe_rewritten")
    expected = dict.fromkeys(shares, 0.0) | dict.fromkeys(TOUCHED, 1.0)
    if served.packs_rows:
        expected[f"{ATTENTION}.qkv_proj"] = QUERY_ROWS / (QUERY_ROWS + 2 * KEY_ROWS)
        expected[f"{MLP}.gate_up_proj"] = 0.5
    assert shares == pytest.approx(expected)
    await probe(served.engine, "probe_requantize", str(served.old))


async def test_one_shard_of_a_layer_packed_as_a_whole_is_refused_before_anything_changes(
    served: Served,
) -> None:
    before = await probe(served.engine, "probe_digests")
    repacked, refusal = await probe(
        served.engine, "probe_requantize_changed", str(served.new), CHANGED
    )
    if served.packs_rows:
        assert (repacked, refusal) == (len(TOUCHED), "")
        return
    assert repacked == 0
    assert f"{ATTENTION}.qkv_proj" in refusal
    assert f"{ATTENTION}.k_proj.weight, {ATTENTION}.v_proj.weight" in refusal
    assert await probe(served.engine, "probe_digests") == before


async def test_the_memory_a_whole_push_takes_is_that_of_one_layer(served: Served) -> None:
    peak = await probe(served.engine, "probe_requantize_peak", str(served.new))
    print(f"{peak / LARGEST_LAYER_BYTES:.2f} of the largest layer, {peak} bytes")
    if served.packs_rows:
        assert peak < LARGEST_LAYER_BYTES
    else:
        # The collected layer, and what packing by rows takes as well (its share is large in a model
        # as small as this).
        assert peak > 0.9 * LARGEST_LAYER_BYTES, "what is collected must be seen"
        assert peak < 2 * LARGEST_LAYER_BYTES
