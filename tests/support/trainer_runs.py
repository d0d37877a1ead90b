"""A short training run against ``tests.fakes.policy_server``, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shared.config.loading import validate_run_config
from shared.config.run import RunConfig
from tests.fakes.policy_server import PolicyServer

NUM_STEPS = 4


def run_config(server: PolicyServer, model_path: Path, root: Path, **trainer: Any) -> RunConfig:
    return validate_run_config(
        {
            "name": "test",
            "output_dir": str(root / "runs"),
            "model": {"path": str(model_path)},
            "weights": {"shared_memory_dir": str(server.segment_directory)},
            "trainer": {
                "server_url": server.url,
                "api_timeout_s": 30,
                "num_threads": 1,
                "num_steps": NUM_STEPS,
                "prompts_per_step": 4,
                "group_size": 4,
                "eval_every": 2,
                "eval_prompts": 4,
                "checkpoint_every": 2,
                "sampling": {"max_tokens": 8},
                "optimizer": {"learning_rate": 5e-3},
                "task": {"kind": "arithmetic", "num_terms": [2, 2], "max_operand": 9},
                **trainer,
            },
        }
    )


def records(config: RunConfig, name: str) -> list[dict[str, Any]]:
    """Lines of one of the run's files."""
    return [json.loads(line) for line in (config.run_dir / name).read_text().splitlines()]


def checkpoints(config: RunConfig) -> dict[str, int]:
    """Weight version by name of every complete checkpoint."""
    found = {}
    for path in (config.run_dir / "checkpoints").iterdir():
        state = json.loads((path / "trainer_state.json").read_text())
        found[path.name] = state["weight_version"]
    return found
