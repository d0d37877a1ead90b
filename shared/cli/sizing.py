"""``slipstream sizing``: what a configuration's engines take of a GPU, before there is one."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from shared.cli.options import ConfigOption, JsonOption, SetOption, resolve_config
from shared.cli.output import print_json, print_table
from shared.config.model_support import read_model_config
from shared.errors import ConfigurationError
from shared.sizing.engine_memory import GIB, plan_engine_memory
from shared.sizing.model_shape import ModelShape, model_shape
from shared.sizing.tables import MODELS

ROWS = {
    "target_bytes": "target",
    "drafter_bytes": "drafter",
    "work_bytes": "activations and logits",
    "context_bytes": "CUDA context and graphs",
    "kv_bytes": "KV cache",
    "budget_bytes": "all that vLLM may take",
}


def sizing(
    gpu_memory_gib: Annotated[
        float,
        typer.Option("--gpu-memory-gib", min=1.0, help="Memory of one GPU, as nvidia-smi has it."),
    ],
    config: ConfigOption = None,
    set_: SetOption = None,
    num_tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="Length of a sequence, prompt included.")
    ] = 4096,
    as_json: JsonOption = False,
) -> None:
    """Estimate how a GPU divides into target, drafter and KV cache, and how many sequences fit."""
    resolved = resolve_config(config, set_)
    shape = find_shape(resolved.model.path)
    memory = plan_engine_memory(shape, resolved, int(gpu_memory_gib * GIB))
    num_sequences = memory.num_sequences(num_tokens)
    if as_json:
        counts = {"num_kv_tokens": memory.num_kv_tokens, "num_sequences": num_sequences}
        print_json({**asdict(memory), **counts})
        return
    engine = resolved.engine
    print_table(
        f"each of {engine.tensor_parallel_size} GPUs of an engine",
        ["part", "GiB"],
        [[name, getattr(memory, field) / GIB] for field, name in ROWS.items()],
        caption=f"{memory.num_kv_tokens:,} tokens in the KV cache: {num_sequences:,} sequences of "
        f"{num_tokens:,} tokens (engine.max_num_seqs {engine.max_num_seqs}). An estimate: the "
        "server's log has what vLLM found.",
    )


def find_shape(path: str) -> ModelShape:
    """Of a model directory, or of one of the models in ``docs/sizing.md`` by its name.

    Raises:
        ConfigurationError: neither, or a model that is not counted.
    """
    model = read_model_config(path)
    if model is not None:
        return model_shape(model)
    if path in MODELS:
        return MODELS[path]
    raise ConfigurationError(
        f"model.path {path!r} has no config.json here, and is none of {', '.join(MODELS)}: give "
        "its directory with --set model.path=DIRECTORY",
        param="model.path",
    )
