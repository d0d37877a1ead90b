"""What a client brings to a server: its API key, and whom it trusts for TLS.

The key comes from a file or from ``SLIPSTREAM_API_KEY``, never from the command line, which every
user of the machine can read.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shared.errors import ConfigurationError
from shared.private_files import read_private_text

KEY_VARIABLE = "SLIPSTREAM_API_KEY"
KEY_FILE_VARIABLE = "SLIPSTREAM_API_KEY_FILE"
CA_FILE_VARIABLE = "SLIPSTREAM_CA_FILE"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientCredentials:
    """Contents and not paths, so that it can be handed to a process on another machine."""

    api_key: str | None = field(default=None, repr=False)
    ca_certificates: str | None = field(default=None, repr=False)
    """PEM; trusted instead of the system's authorities."""

    def headers(self) -> dict[str, str]:
        """Headers of every request."""
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}

    def verification(self) -> ssl.SSLContext | bool:
        """httpx's ``verify``."""
        if self.ca_certificates is None:
            return True
        return ssl.create_default_context(cadata=self.ca_certificates)


def load_credentials(
    key_file: str | Path | None,
    ca_file: str | Path | None,
    environment: Mapping[str, str],
    *,
    key_file_setting: str = "--api-key-file",
    ca_file_setting: str = "--ca-file",
) -> ClientCredentials:
    """Read key and certificates. What is given comes first, then the environment.

    Args:
        key_file_setting, ca_file_setting: what the files are called where they are given.

    Raises:
        ConfigurationError: a file cannot be read, is open to others, or has not what it should.
    """
    if key_file is None and KEY_VARIABLE not in environment:
        key_file, key_file_setting = environment.get(KEY_FILE_VARIABLE), KEY_FILE_VARIABLE
    if ca_file is None:
        ca_file, ca_file_setting = environment.get(CA_FILE_VARIABLE), CA_FILE_VARIABLE
    if key_file is not None:
        source = f"{key_file_setting} {key_file}"
        api_key = _checked(read_private_text(key_file, key_file_setting).strip(), source)
    elif KEY_VARIABLE in environment:
        api_key = _checked(environment[KEY_VARIABLE].strip(), KEY_VARIABLE)
    else:
        api_key = None
    certificates = None if ca_file is None else _read_certificates(ca_file, ca_file_setting)
    return ClientCredentials(api_key=api_key, ca_certificates=certificates)


def is_untrusted_certificate(error: Exception) -> bool:
    """Whether a connection failed because the server's certificate is not trusted: no retry and
    no other server will change that."""
    return "CERTIFICATE_VERIFY_FAILED" in str(error)


def _checked(key: str, source: str) -> str:
    # Never quoted: whatever it is, it may have been meant as a key.
    if not key or not all("!" <= character <= "~" for character in key):
        raise ConfigurationError(
            f"{source} holds {len(key)} characters that are not one key: a key alone is expected, "
            "in visible ASCII"
        )
    return key


def _read_certificates(path: str | Path, setting: str) -> str:
    try:
        text = Path(path).read_text(encoding="ascii")
        ssl.create_default_context(cadata=text)
    except OSError as exc:  # ssl.SSLError is one
        raise ConfigurationError(f"{setting} {path}: {exc.strerror or exc}", param=setting) from exc
    except ValueError as exc:
        raise ConfigurationError(
            f"{setting} {path} has no certificates in PEM form: {exc}", param=setting
        ) from exc
    return text
