"""Checks of a configuration's security: each setting that lets somebody in, or code do harm."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from urllib.parse import urlsplit

from shared.api_keys import ApiKeys
from shared.cli.doctor_checks import CheckResult, CheckStatus
from shared.cli.run_access import trainer_credentials
from shared.config.run import RunConfig
from shared.config.server import ScoringConfig, ServerConfig
from shared.config.server_access import check_server_access, is_loopback
from shared.errors import ConfigurationError
from shared.types import NetworkAccess


def security_checks(config: RunConfig, environment: Mapping[str, str]) -> list[CheckResult]:
    """Every check of one resolved configuration."""
    return [
        *check_access(config.server, environment),
        check_tls(config.server),
        check_tls_key(config.server),
        check_trainer_key(config, environment),
        check_trainer_url(config.trainer.server_url),
        check_remote_code(config),
        check_rewards(config.scoring),
        check_code_execution(config.scoring),
        check_ray(config.ray.address, environment),
        check_weights_directory(config),
        check_user(os.geteuid()),
    ]


def check_access(server: ServerConfig, environment: Mapping[str, str]) -> list[CheckResult]:
    """Who can call the API: address, keys and certificate together."""
    try:
        keys = check_server_access(server, environment)
    except ConfigurationError as exc:
        return [_failed(exc.param or "server.host", exc.message)]
    return [check_host(server, keys)]


def check_host(server: ServerConfig, keys: ApiKeys) -> CheckResult:
    """The API carries weights: without keys it belongs on loopback."""
    if is_loopback(server.host):
        who = f"{len(keys)} API keys" if keys else "every user of this machine may call it"
        return _ok("server.host", f"{server.host}, {who}")
    if keys:
        return _ok("server.host", f"{server.host}, {len(keys)} API keys")
    detail = (
        f"{server.host} is reachable from other machines, and server.allow_unauthenticated is "
        "true: whoever reaches it can replace the weights"
    )
    return _warning("server.host", detail)


def check_tls(server: ServerConfig) -> CheckResult:
    """Keys, prompts and samples travel in the clear without it."""
    name = "server.tls_certificate_file"
    if server.tls_certificate_file is not None:
        return _ok(name, server.tls_certificate_file)
    if is_loopback(server.host):
        return _ok(name, "not needed on loopback")
    detail = f"not set: keys and samples pass {server.host} in the clear (also server.tls_key_file)"
    return _warning(name, detail)


def check_tls_key(server: ServerConfig) -> CheckResult:
    """A key that a group can read is usable, and worth knowing of."""
    name = "server.tls_key_file"
    if server.tls_key_file is None:
        return _ok(name, "none")
    try:
        mode = stat.S_IMODE(os.stat(server.tls_key_file).st_mode)
    except OSError as exc:
        return _failed(name, f"{server.tls_key_file}: {exc.strerror}")
    if mode & stat.S_IRWXG:
        return _warning(name, f"{server.tls_key_file} has permissions {mode:04o}: a group reads it")
    return _ok(name, server.tls_key_file)


def check_trainer_key(config: RunConfig, environment: Mapping[str, str]) -> CheckResult:
    """The trainer's key and certificates can be read, and the key by its owner only."""
    try:
        credentials = trainer_credentials(config.trainer, environment)
    except ConfigurationError as exc:
        return _failed("trainer.api_key_file", exc.message)
    return _ok("trainer.api_key_file", "none" if credentials.api_key is None else "a key is set")


def check_trainer_url(url: str | None) -> CheckResult:
    """Keys, and which weights to load, should not cross a network in the clear."""
    name = "trainer.server_url"
    if url is None:
        return _ok(name, "set by `slipstream run`")
    parts = urlsplit(url)
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        return _warning(name, f"{url} is not https: the API key and samples travel in the clear")
    return _ok(name, url)


def check_remote_code(config: RunConfig) -> CheckResult:
    """Code from a model directory runs with all rights of the engine."""
    if not config.model.trust_remote_code:
        return _ok("model.trust_remote_code", "false")
    detail = "true: python files of the model directory are executed"
    return _warning("model.trust_remote_code", detail)


def check_rewards(scoring: ScoringConfig) -> CheckResult:
    """Rewards of the user, and whatever completions they execute, run as the server's user."""
    name = "scoring.rewards"
    if not scoring.rewards:
        return _ok(name, "built-in ones only")
    open_knobs = [
        knob
        for knob, is_open in (
            ("scoring.network is allow", scoring.network is NetworkAccess.ALLOW),
            ("scoring.max_memory_mib is not set", scoring.max_memory_mib is None),
            ("scoring.max_cpu_s is not set", scoring.max_cpu_s is None),
        )
        if is_open
    ]
    names = ", ".join(sorted(scoring.rewards))
    if open_knobs:
        detail = f"{names} run as this user, and {', '.join(open_knobs)}: set them if they run code"
        return _warning(name, detail)
    return _ok(name, f"{names}, confined; files of this user are still theirs to read and write")


def check_code_execution(scoring: ScoringConfig) -> CheckResult:
    """With it, code is something that callers may send."""
    name = "scoring.allow_code_execution"
    if not scoring.allow_code_execution:
        return _ok(name, "false")
    detail = (
        "true: whoever may ask for rollouts can run Python as this user, without network and "
        "within limits; files of this user are its to read and delete"
    )
    return _warning(name, detail)


def check_ray(address: str | None, environment: Mapping[str, str]) -> CheckResult:
    """Whoever can submit to a Ray cluster runs code on it."""
    name = "ray.address"
    if address is None:
        return _ok(name, "a local cluster with a token of its own")
    if environment.get("RAY_AUTH_MODE") == "token":
        return _ok(name, f"{address}, with token authentication")
    detail = f"{address} without RAY_AUTH_MODE=token: whoever reaches it runs code on its machines"
    return _warning(name, detail)


def check_weights_directory(config: RunConfig) -> CheckResult:
    """Others must not be able to put their weights in the place of ours."""
    directory = config.weights.directory
    name = "weights directory"
    try:
        mode = os.stat(directory).st_mode
    except OSError as exc:
        return _failed(name, f"{directory}: {exc.strerror}")
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        detail = f"{directory} can be written by all users, without the sticky bit"
        return _warning(name, detail)
    return _ok(name, str(directory))


def check_user(user_id: int) -> CheckResult:
    """Whatever gets out of hand can do what the user can."""
    if user_id == 0:
        return _warning("user", "root: a reward, or a model's own code, may do anything")
    return _ok("user", f"{user_id}")


def _ok(name: str, detail: str) -> CheckResult:
    return CheckResult(name=name, status=CheckStatus.OK, detail=detail)


def _warning(name: str, detail: str) -> CheckResult:
    return CheckResult(name=name, status=CheckStatus.WARNING, detail=detail)


def _failed(name: str, detail: str) -> CheckResult:
    return CheckResult(name=name, status=CheckStatus.FAILED, detail=detail)
