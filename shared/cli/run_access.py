"""How ``slipstream run`` lets its own trainer into a server that asks for API keys."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from shared.api_keys import KEYS_VARIABLE, load_api_keys
from shared.config.run import RunConfig
from shared.config.trainer import TrainerConfig
from shared.credentials import KEY_VARIABLE, ClientCredentials, load_credentials
from shared.types import ApiScope


@dataclass(frozen=True, kw_only=True, slots=True)
class RunAccess:
    """What the processes of one run are given. Through the environment, which only their user can
    read, and not through the files of the run."""

    credentials: ClientCredentials
    """Of the supervisor and the trainer."""
    server_environment: dict[str, str] = field(default_factory=dict, repr=False)
    trainer_environment: dict[str, str] = field(default_factory=dict, repr=False)


def trainer_credentials(config: TrainerConfig, environment: Mapping[str, str]) -> ClientCredentials:
    """Key and certificates of ``trainer.api_key_file`` and ``trainer.ca_file``, else of the
    environment.

    Raises:
        ConfigurationError: they cannot be used.
    """
    return load_credentials(
        config.api_key_file,
        config.ca_file,
        environment,
        key_file_setting="trainer.api_key_file",
        ca_file_setting="trainer.ca_file",
    )


def prepare_run_access(config: RunConfig, environment: Mapping[str, str]) -> RunAccess:
    """Take the trainer's key from where it is configured, or make one up that ends with the run.

    Raises:
        ConfigurationError: keys or certificates cannot be used.
    """
    credentials = trainer_credentials(config.trainer, environment)
    keys = load_api_keys(config.server.api_keys_file, environment)
    if not keys or credentials.api_key is not None:
        return RunAccess(credentials=credentials)
    key = secrets.token_urlsafe(32)
    scopes = f"{ApiScope.ROLLOUT},{ApiScope.ADMIN}"
    entry = f"slipstream-run-{secrets.token_hex(4)} {scopes} {key}"
    entries = [environment[KEYS_VARIABLE], entry] if KEYS_VARIABLE in environment else [entry]
    return RunAccess(
        credentials=ClientCredentials(api_key=key, ca_certificates=credentials.ca_certificates),
        server_environment={KEYS_VARIABLE: ";".join(entries)},
        trainer_environment={KEY_VARIABLE: key},
    )
