"""Whether the packages of ``trainer.metric_sinks`` are there, before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from shared.config.trainer import TrainerConfig
from shared.errors import ConfigurationError
from shared.types import MetricSinkKind

PACKAGES: dict[MetricSinkKind, str] = {
    MetricSinkKind.TENSORBOARD: "tensorboard",
    MetricSinkKind.WANDB: "wandb",
    MetricSinkKind.TRACKIO: "trackio",
}
"""Module and package index call each by the same name."""


def is_installed(package: str) -> bool:
    """Whether it could be imported; it is not, which takes seconds."""
    return find_spec(package) is not None


def check_metric_sinks(
    config: TrainerConfig, is_installed: Callable[[str], bool] = is_installed
) -> None:
    """
    Raises:
        ConfigurationError: naming what has to be installed.
    """
    missing = [PACKAGES[kind] for kind in config.metric_sinks if not is_installed(PACKAGES[kind])]
    if missing:
        raise ConfigurationError(
            f"trainer.metric_sinks asks for {', '.join(missing)}, which is not installed: "
            f"pip install {' '.join(missing)}, or leave it out of trainer.metric_sinks",
            param="trainer.metric_sinks",
        )
