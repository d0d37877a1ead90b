"""Which servers may start: address, keys and certificate, checked before anything else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shared.api_keys import KEYS_VARIABLE
from shared.cli.doctor_checks import CheckStatus
from shared.cli.doctor_security import check_ray, check_user, security_checks
from shared.cli.main import app
from shared.cli.run_access import prepare_run_access
from shared.config.loading import dump_run_config, load_run_config
from shared.config.run import RunConfig
from shared.config.server_access import check_server_access, is_loopback
from shared.credentials import KEY_VARIABLE
from shared.errors import ConfigurationError
from tests.support.certificates import make_certificate

KEY = "f00d-f00d-f00d-f00d"
KEYS = {KEYS_VARIABLE: f"trainer rollout,admin {KEY}"}


def config(*overrides: str) -> RunConfig:
    return load_run_config(None, ["model.path=absent/model", *overrides], {})


def access(*overrides: str, environment: dict[str, str] | None = None) -> int:
    """Number of keys of a server that may start."""
    return len(check_server_access(config(*overrides).server, environment or {}))


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("127.3.2.1", True),
     ("0.0.0.0", False), ("10.0.0.4", False), ("example.org", False), ("", False)],
)  # fmt: skip
def test_loopback_addresses_are_known(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_another_address_needs_keys_or_an_explicit_word() -> None:
    assert access() == 0
    with pytest.raises(ConfigurationError, match=r"0\.0\.0\.0.*server\.api_keys_file") as caught:
        access("server.host=0.0.0.0")
    assert "server.allow_unauthenticated" in caught.value.message
    assert caught.value.param == "server.host"
    assert access("server.host=0.0.0.0", environment=KEYS) == 1
    assert access("server.host=0.0.0.0", "server.allow_unauthenticated=true") == 0


@pytest.mark.parametrize("command", [["-m", "rollout_server"], ["-m", "shared.cli", "serve"]])
def test_an_open_server_does_not_start_and_exits_with_2(command: list[str]) -> None:
    arguments = [*command, "--set", "model.path=absent/model", "--set", "server.host=0.0.0.0"]
    result = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 2
    assert "server.allow_unauthenticated" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_certificate_is_checked_together_with_its_key(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    _, other_key = make_certificate(tmp_path, "other")
    _, locked_key = make_certificate(tmp_path, "locked", passphrase=b"secret")

    def tls(certificate_file: Path, key_file: Path) -> int:
        return access(f"server.tls_certificate_file={certificate_file}",
                      f"server.tls_key_file={key_file}")  # fmt: skip

    assert tls(certificate, key) == 0
    for wrong, said in (
        ((certificate, other_key), "not a certificate and its key"),
        ((certificate, certificate.with_name("absent")), r"server\.tls_key_file .*No such file"),
        ((key.with_name("absent"), key), r"server\.tls_certificate_file .*No such file"),
        ((certificate, locked_key), "passphrase"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            tls(*wrong)
    key.chmod(0o640)
    assert tls(certificate, key) == 0
    key.chmod(0o644)
    with pytest.raises(ConfigurationError, match="permissions 0644"):
        tls(certificate, key)


def test_a_certificate_without_a_key_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"server\.tls_key_file is not set"):
        config("server.tls_certificate_file=a.pem")
    with pytest.raises(ConfigurationError, match=r"server\.tls_certificate_file is not set"):
        config("server.tls_key_file=a.key")


def test_the_scheme_of_the_url_follows_the_certificate() -> None:
    assert config().server.url_scheme == "http"
    both = "server.tls_certificate_file=a", "server.tls_key_file=b"
    assert config(*both).server.url_scheme == "https"


def test_no_key_is_in_what_config_show_prints(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.touch(mode=0o600)
    path.write_text(f"trainer rollout {KEY}")
    environment = {KEYS_VARIABLE: f"b admin {KEY}2", KEY_VARIABLE: f"{KEY}3"}
    arguments = ["config", "show", "--set", "model.path=absent/model", "--set"]
    arguments.append(f"server.api_keys_file={path}")
    result = CliRunner().invoke(app, arguments, env=environment)
    assert result.exit_code == 0, result.output
    assert str(path) in result.output
    assert "f00d" not in result.output


def test_a_key_in_a_wrong_place_is_not_quoted() -> None:
    for overrides, environment in (
        ([f"server.api_keys={KEY}"], {}),
        ([], {"SLIPSTREAM_API_KEYZ": KEY}),
        ([], {"SLIPSTREAM_SERVER__API_KEY": KEY}),
    ):
        with pytest.raises(ConfigurationError, match="not permitted") as caught:
            load_run_config(None, ["model.path=m", *overrides], environment)
        assert KEY not in caught.value.message


def test_a_run_makes_up_a_key_for_its_trainer_and_writes_it_nowhere() -> None:
    made = prepare_run_access(config(), KEYS)
    key = made.credentials.api_key
    assert key is not None
    assert made.trainer_environment == {KEY_VARIABLE: key}
    keys = check_server_access(config().server, made.server_environment)
    assert len(keys) == 2
    assert keys.find(KEY.encode()) is not None
    found = keys.find(key.encode())
    assert found is not None
    assert sorted(found.scopes) == ["admin", "rollout"]
    assert key not in f"{made!r}{dump_run_config(config())}"


def test_a_run_without_keys_needs_none_and_a_given_key_is_taken() -> None:
    without = prepare_run_access(config(), {})
    assert without.credentials.api_key is None
    assert without.server_environment == without.trainer_environment == {}
    given = prepare_run_access(config(), {**KEYS, KEY_VARIABLE: KEY})
    assert given.credentials.api_key == KEY
    assert given.server_environment == {}


def findings(*overrides: str, environment: dict[str, str] | None = None) -> dict[str, str]:
    """Status of every check of a configuration that is not content."""
    checks = security_checks(config(*overrides), environment or {})
    return {c.name: c.status.value for c in checks if c.status is not CheckStatus.OK}


@pytest.mark.parametrize(
    ("overrides", "name", "status"),
    [
        (["server.host=0.0.0.0"], "server.host", "failed"),
        (["server.host=0.0.0.0", "server.allow_unauthenticated=true"], "server.host", "warning"),
        (["server.host=0.0.0.0", "server.allow_unauthenticated=true"],
         "server.tls_certificate_file", "warning"),
        (["server.api_keys_file=/absent"], "server.api_keys_file", "failed"),
        (["server.tls_certificate_file=/absent", "server.tls_key_file=/absent"],
         "server.tls_key_file", "failed"),
        (["trainer.api_key_file=/absent"], "trainer.api_key_file", "failed"),
        (["trainer.server_url=http://10.0.0.4:8000"], "trainer.server_url", "warning"),
        (["model.trust_remote_code=true"], "model.trust_remote_code", "warning"),
        (["scoring.rewards={mine: 'a:b'}"], "scoring.rewards", "warning"),
        (["scoring.rewards={mine: 'a:b'}", "scoring.network=deny"], "scoring.rewards", "warning"),
        (["scoring.allow_code_execution=true"], "scoring.allow_code_execution", "warning"),
        (["ray.address=10.0.0.4:6379"], "ray.address", "warning"),
        (["weights.shared_memory_dir=/absent"], "weights directory", "failed"),
    ],
)  # fmt: skip
def test_each_insecure_setting_is_pointed_out(overrides: list[str], name: str, status: str) -> None:
    assert name not in findings()
    assert findings(*overrides)[name] == status


def test_settings_that_are_safe_are_not_pointed_out(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    confined = "scoring.network=deny", "scoring.max_memory_mib=1024", "scoring.max_cpu_s=10"
    tls = f"server.tls_certificate_file={certificate}", f"server.tls_key_file={key}"
    safe = ["server.host=0.0.0.0", "scoring.rewards={mine: 'a:b'}", *confined, *tls]
    safe += ["trainer.server_url=https://10.0.0.4:8000", "ray.address=10.0.0.4:6379"]
    assert set(findings(*safe, environment={**KEYS, "RAY_AUTH_MODE": "token"})) <= {"user"}
    key.chmod(0o640)
    assert findings(*safe, environment=KEYS)["server.tls_key_file"] == "warning"


def test_a_directory_everybody_can_write_is_pointed_out(tmp_path: Path) -> None:
    name, setting = "weights directory", f"weights.shared_memory_dir={tmp_path}"
    for mode, is_found in ((0o777, True), (0o1777, False), (0o755, False)):
        tmp_path.chmod(mode)
        assert (name in findings(setting)) is is_found


def test_root_and_an_open_ray_cluster_are_pointed_out() -> None:
    assert check_user(0).status is CheckStatus.WARNING
    assert check_user(1000).status is CheckStatus.OK
    assert check_ray("auto", {}).status is CheckStatus.WARNING
    assert check_ray(None, {}).status is CheckStatus.OK


def test_doctor_lists_them() -> None:
    arguments = ["doctor", "--json", "--set", "model.path=absent/model", "--set"]
    arguments.append("server.host=0.0.0.0")
    result = CliRunner().invoke(app, arguments, env=dict(os.environ))
    assert result.exit_code == 1
    found = {check["name"]: check["status"] for check in json.loads(result.stdout)}
    assert found["server.host"] == "failed"
