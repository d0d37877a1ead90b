"""``runs/<name>/``: one directory per run, never written over by the next one."""

from __future__ import annotations

import os
from pathlib import Path

from shared.config.loading import dump_run_config
from shared.config.run import RunConfig
from shared.errors import ConfigurationError

METRICS_FILE = "metrics.jsonl"
SERVER_FILE = "server.json"


def claim_run_directory(config: RunConfig, *, resume: bool) -> RunConfig:
    """Create the run's directory and return the configuration with the name it got.

    A name whose directory already holds a run gets ``-2``, ``-3`` ...; with ``resume`` the
    directory of the run is used again.

    Raises:
        ConfigurationError: ``resume`` without anything to resume, or an unusable ``output_dir``.
    """
    if resume:
        if not config.run_dir.is_dir():
            raise ConfigurationError(
                f"--resume: there is no run in {config.run_dir} (output_dir, name)", param="name"
            )
        claimed = config
    else:
        claimed = config.model_copy(
            update={"name": free_name(Path(config.output_dir), config.name)}
        )
    try:
        claimed.run_dir.mkdir(parents=True, exist_ok=True)
        _point_latest(claimed.run_dir)
    except OSError as exc:
        raise ConfigurationError(
            f"output_dir {config.output_dir}: cannot create {claimed.run_dir}: {exc.strerror}",
            param="output_dir",
        ) from exc
    # What an earlier server left says nothing about the one about to start.
    (claimed.run_dir / SERVER_FILE).unlink(missing_ok=True)
    return claimed


def free_name(output_dir: Path, name: str) -> str:
    """``name``, or the first of ``name-2``, ``name-3`` ... without a directory with files in it."""
    candidate, number = name, 1
    while (output_dir / candidate).exists() and any((output_dir / candidate).iterdir()):
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def write_config(config: RunConfig, path: Path) -> Path:
    """Write the resolved configuration so that a child process reads exactly this."""
    path.write_text(dump_run_config(config), encoding="utf-8")
    return path


def _point_latest(run_dir: Path) -> None:
    """``runs/latest`` points at the run; a plain directory of that name is left alone."""
    link = run_dir.parent / "latest"
    if link.exists() and not link.is_symlink():
        return
    temporary = run_dir.parent / f".latest-{os.getpid()}"
    temporary.symlink_to(run_dir.name)
    temporary.replace(link)
