"""The API keys a server accepts: read from a file or the environment, kept as digests only.

One key per line, ``NAME SCOPES KEY``, with ``#`` starting a comment line::

    trainer   rollout,admin   f0d1...             the key itself
    grafana   metrics         sha256:9b3c...      or its SHA-256, in hexadecimal

The variable ``SLIPSTREAM_API_KEYS`` holds the same, with ``;`` or line breaks between keys.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from shared.errors import ConfigurationError
from shared.private_files import read_private_text
from shared.types import ApiScope

KEYS_VARIABLE = "SLIPSTREAM_API_KEYS"
KEYS_FILE_SETTING = "server.api_keys_file"
MIN_KEY_CHARACTERS = 16
DIGEST_PREFIX = "sha256:"

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(r"[\x21-\x7e]+")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiKey:
    """One key, without the key."""

    name: str
    """For the log: who this is."""
    scopes: frozenset[ApiScope]
    digest: bytes = field(repr=False)
    """SHA-256. Keys are random and long, so that a slow hash would gain nothing."""


class ApiKeys:
    """All keys a server accepts. Empty means that none is asked for."""

    def __init__(self, keys: Iterable[ApiKey] = ()) -> None:
        """
        Raises:
            ConfigurationError: a name or a key stands twice.
        """
        self._keys = tuple(keys)
        names: set[str] = set()
        digests: dict[bytes, str] = {}
        for key in self._keys:
            if key.name in names:
                raise ConfigurationError(f"API key {key.name!r} is defined twice")
            if key.digest in digests:
                raise ConfigurationError(
                    f"API keys {digests[key.digest]!r} and {key.name!r} are the same key: "
                    "one of its two sets of scopes would be ignored"
                )
            names.add(key.name)
            digests[key.digest] = key.name

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, presented: bytes) -> ApiKey | None:
        """The key that a caller presents, or None. Takes as long for any key as for none."""
        digest = hashlib.sha256(presented).digest()
        found: ApiKey | None = None
        for key in self._keys:
            # To the end in any case: an early exit would tell the position of a key.
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found


def load_api_keys(path: str | None, environment: Mapping[str, str]) -> ApiKeys:
    """Read the keys of ``server.api_keys_file`` and of ``SLIPSTREAM_API_KEYS``; both count.

    Raises:
        ConfigurationError: the file is open to others, or a line is wrong; or a source that is
            given has no key in it, which must not turn authentication off.
    """
    keys: list[ApiKey] = []
    if path is not None:
        text = read_private_text(path, KEYS_FILE_SETTING)
        keys += parse_api_keys(text.splitlines(), f"{KEYS_FILE_SETTING} {path}")
    if KEYS_VARIABLE in environment:
        keys += parse_api_keys(re.split(r"[;\n]", environment[KEYS_VARIABLE]), KEYS_VARIABLE)
    return ApiKeys(keys)


def parse_api_keys(lines: Iterable[str], source: str) -> list[ApiKey]:
    """Parse ``NAME SCOPES KEY`` lines.

    Args:
        source: where they are from, for messages, which never quote a line: it may be a key.

    Raises:
        ConfigurationError: naming the line by its number.
    """
    keys = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            keys.append(_parse_line(text, f"{source} line {number}"))
    if not keys:
        raise ConfigurationError(f"{source} has no key in it", param=KEYS_FILE_SETTING)
    return keys


def _parse_line(text: str, where: str) -> ApiKey:
    fields = text.split()
    if len(fields) != 3:
        raise ConfigurationError(
            f"{where} has {len(fields)} fields, not the three of NAME SCOPES KEY",
            param=KEYS_FILE_SETTING,
        )
    name, scopes, key = fields
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"{where}: a name has up to 64 letters, digits, dots, dashes and underscores",
            param=KEYS_FILE_SETTING,
        )
    known = {scope.value for scope in ApiScope}
    if not set(scopes.split(",")) <= known:
        raise ConfigurationError(
            f"{where} ({name}): scopes are {', '.join(ApiScope)}, with commas between them",
            param=KEYS_FILE_SETTING,
        )
    return ApiKey(
        name=name,
        scopes=frozenset(ApiScope(scope) for scope in scopes.split(",")),
        digest=_digest(key, f"{where} ({name})"),
    )


def _digest(key: str, where: str) -> bytes:
    if key.startswith(DIGEST_PREFIX):
        digest = key.removeprefix(DIGEST_PREFIX)
        if not _DIGEST.fullmatch(digest):
            raise ConfigurationError(
                f"{where}: {DIGEST_PREFIX} is followed by 64 hexadecimal digits",
                param=KEYS_FILE_SETTING,
            )
        return bytes.fromhex(digest)
    if len(key) < MIN_KEY_CHARACTERS or not _KEY.fullmatch(key):
        raise ConfigurationError(
            f"{where}: a key has at least {MIN_KEY_CHARACTERS} characters, visible ASCII only",
            param=KEYS_FILE_SETTING,
        )
    return hashlib.sha256(key.encode()).digest()
