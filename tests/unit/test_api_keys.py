"""Keys of the server and of its clients: what is accepted, and that no message has one in it."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

import pytest

from shared import api_keys
from shared.api_keys import KEYS_VARIABLE, ApiKeys, load_api_keys, parse_api_keys
from shared.credentials import (
    CA_FILE_VARIABLE,
    KEY_FILE_VARIABLE,
    KEY_VARIABLE,
    ClientCredentials,
    load_credentials,
)
from shared.errors import ConfigurationError
from shared.types import ApiScope
from tests.support.certificates import make_certificate

KEY = "f00d-f00d-f00d-f00d"
OTHER = "beef-beef-beef-beef"


def private(path: Path, text: str) -> Path:
    path.touch(mode=0o600)
    path.write_text(text)
    return path


def refusal(text: str) -> str:
    """What is said of a wrong file; never anything of its keys."""
    with pytest.raises(ConfigurationError) as caught:
        parse_api_keys(text.splitlines(), "keys")
    return caught.value.message


def test_keys_are_read_with_their_names_and_scopes_from_file_and_environment(
    tmp_path: Path,
) -> None:
    digest = hashlib.sha256(OTHER.encode()).hexdigest()
    text = f"# who  what  key\n\ntrainer rollout,admin {KEY}\n  grafana metrics sha256:{digest} \n"
    path = private(tmp_path / "keys", text)
    third = "cafe-cafe-cafe-cafe"
    keys = load_api_keys(str(path), {KEYS_VARIABLE: f"a rollout {third};"})
    assert len(keys) == 3
    trainer, grafana, last = (keys.find(key.encode()) for key in (KEY, OTHER, third))
    assert trainer is not None
    assert (trainer.name, trainer.scopes) == ("trainer", {ApiScope.ROLLOUT, ApiScope.ADMIN})
    assert grafana is not None
    assert (grafana.name, grafana.scopes) == ("grafana", {ApiScope.METRICS})
    assert last is not None
    assert last.name == "a"
    assert keys.find(f"{KEY}x".encode()) is None
    assert keys.find(b"") is None


def test_without_file_and_variable_there_are_no_keys() -> None:
    assert not load_api_keys(None, {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"trainer rollout {KEY} extra", "line 1 has 4 fields"),
        (f"# first\n{KEY}", "line 2 has 1 fields"),
        (f"a/b rollout {KEY}", "a name has"),
        (f"a root {KEY}", "scopes are rollout, admin, metrics"),
        (f"a , {KEY}", "scopes are"),
        ("a rollout f00d", "at least 16 characters"),
        ("a rollout f00d-f00d-f00d-f00ü", "visible ASCII"),
        (f"a rollout sha256:{KEY}", "64 hexadecimal digits"),
        ("# nothing", "no key in it"),
    ],
)
def test_a_wrong_line_is_named_by_its_number_and_never_quoted(text: str, said: str) -> None:
    message = refusal(text)
    assert said in message
    assert "f00d" not in message


def test_a_name_or_a_key_that_stands_twice_is_refused() -> None:
    for second in (f"a admin {OTHER}", f"b admin {KEY}"):
        with pytest.raises(ConfigurationError, match=r"twice|same key"):
            ApiKeys(parse_api_keys([f"a rollout {KEY}", second], "keys"))


@pytest.mark.parametrize("environment", [{KEYS_VARIABLE: ""}, {KEYS_VARIABLE: " ; "}])
def test_an_empty_source_of_keys_does_not_open_the_server(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="no key in it"):
        load_api_keys(None, environment)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o602])
def test_a_key_file_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    path = private(tmp_path / "keys", f"a rollout {KEY}")
    path.chmod(mode)
    with pytest.raises(ConfigurationError, match=rf"permissions {mode:04o}.*chmod 600"):
        load_api_keys(str(path), {})
    with pytest.raises(ConfigurationError, match=r"--api-key-file .*permissions"):
        load_credentials(path, None, {})


def test_what_is_no_readable_file_is_refused_with_its_setting(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "absent", "No such file"), (tmp_path, "directory")):
        with pytest.raises(ConfigurationError, match=rf"server\.api_keys_file .*{said}"):
            load_api_keys(str(path), {})
    path = tmp_path / "binary"
    path.touch(mode=0o600)
    path.write_bytes(b"\xff\xfef00d")
    with pytest.raises(ConfigurationError, match="UTF-8") as caught:
        load_api_keys(str(path), {})
    assert caught.value.__suppress_context__  # a traceback would quote the bytes


def test_every_key_is_compared_whichever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    num_compared = 0

    def counting(a: bytes, b: bytes) -> bool:
        nonlocal num_compared
        num_compared += 1
        return hmac.compare_digest(a, b)

    class Counting:
        compare_digest = staticmethod(counting)

    names = [f"key-{index}" for index in range(5)]
    keys = ApiKeys(parse_api_keys([f"{n} rollout {n}-{KEY}" for n in names], "keys"))
    monkeypatch.setattr(api_keys, "hmac", Counting)
    for name in (*names, "unknown"):
        num_compared = 0
        found = keys.find(f"{name}-{KEY}".encode())
        assert (found.name if found else "unknown") == name
        assert num_compared == len(names)


def test_no_key_shows_where_objects_are_printed() -> None:
    keys = parse_api_keys([f"a rollout {KEY}"], "keys")
    credentials = ClientCredentials(api_key=KEY)
    text = f"{keys!r} {ApiKeys(keys)!r} {credentials!r} {credentials}"
    assert KEY not in text
    assert hashlib.sha256(KEY.encode()).hexdigest() not in text
    assert repr(hashlib.sha256(KEY.encode()).digest()) not in text


def test_a_client_takes_what_is_given_before_the_environment(tmp_path: Path) -> None:
    given = private(tmp_path / "given", f"{KEY}\n")
    other = private(tmp_path / "other", OTHER)
    environment = {KEY_VARIABLE: OTHER, KEY_FILE_VARIABLE: str(other)}
    assert load_credentials(given, None, environment).api_key == KEY
    assert load_credentials(None, None, environment).api_key == OTHER
    assert load_credentials(None, None, {KEY_FILE_VARIABLE: str(given)}).api_key == KEY
    assert load_credentials(None, None, {}).api_key is None
    assert ClientCredentials(api_key=KEY).headers() == {"Authorization": f"Bearer {KEY}"}
    assert ClientCredentials().headers() == {}


@pytest.mark.parametrize("text", ["", "f00d f00d", "f00d\nf00d", "f00dü"])
def test_what_is_not_one_key_is_refused_and_not_quoted(tmp_path: Path, text: str) -> None:
    path = private(tmp_path / "key", text)
    for attempt in (lambda: load_credentials(path, None, {}),
                    lambda: load_credentials(None, None, {KEY_VARIABLE: text})):  # fmt: skip
        with pytest.raises(ConfigurationError, match="not one key") as caught:
            attempt()
        assert "f00d" not in caught.value.message


def test_certificates_are_read_and_what_is_none_is_refused(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    credentials = load_credentials(None, None, {CA_FILE_VARIABLE: str(certificate)})
    assert credentials.ca_certificates == certificate.read_text()
    for path, said in ((key, "PEM|cert"), (tmp_path / "absent", "No such file")):
        with pytest.raises(ConfigurationError, match=rf"--ca-file .*({said})"):
            load_credentials(None, path, {})
