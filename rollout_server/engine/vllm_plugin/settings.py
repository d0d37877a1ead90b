"""Settings for the plugin in vLLM's processes, carried by ``VllmConfig.additional_config``."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from shared.config.base import SettingsModel
from shared.config.engine import DrafterConfig
from shared.config.speculation import SpeculationConfig

ADDITIONAL_CONFIG_KEY = "slipstream"


class PluginSettings(SettingsModel):
    """Settings of one engine that vLLM has no place for."""

    engine_id: str = "engine"
    drafter: DrafterConfig = DrafterConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    initial_weight_version: int = Field(default=0, ge=0)


def to_additional_config(settings: PluginSettings) -> dict[str, Any]:
    """Value of ``AsyncEngineArgs.additional_config``."""
    return {ADDITIONAL_CONFIG_KEY: settings.model_dump(mode="json")}


def plugin_settings(vllm_config: Any) -> PluginSettings:
    """Read them back in a vLLM process.

    Raises:
        RuntimeError: the engine was not started by slipstream.
    """
    data = (vllm_config.additional_config or {}).get(ADDITIONAL_CONFIG_KEY)
    if data is None:
        raise RuntimeError(
            "vLLM was started without slipstream's additional_config: the slipstream plugin serves "
            "only engines that slipstream starts (unset VLLM_PLUGINS or exclude 'slipstream')"
        )
    return PluginSettings.model_validate(data)
