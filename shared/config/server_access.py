"""Who may reach the server: API keys, TLS and the address, checked before anything starts."""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Mapping

from shared.api_keys import KEYS_VARIABLE, ApiKeys, load_api_keys
from shared.config.server import ServerConfig
from shared.errors import ConfigurationError
from shared.private_files import OtherAccess, read_private_text


def check_server_access(config: ServerConfig, environment: Mapping[str, str]) -> ApiKeys:
    """Everything that is read here is read again by the server; errors come before it starts.

    Returns:
        The keys the server will ask for; none when it asks for none.

    Raises:
        ConfigurationError: keys or certificate cannot be used, or other machines could reach a
            server without keys.
    """
    keys = load_api_keys(config.api_keys_file, environment)
    check_certificate(config)
    if not keys and not is_loopback(config.host) and not config.allow_unauthenticated:
        raise ConfigurationError(
            f"server.host {config.host!r} is reachable from other machines and no API key is "
            f"configured: set server.api_keys_file or {KEYS_VARIABLE}, keep server.host on "
            "127.0.0.1, or say server.allow_unauthenticated true",
            param="server.host",
        )
    return keys


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_certificate(config: ServerConfig) -> None:
    """Check that certificate and key can be read and belong together.

    Raises:
        ConfigurationError: naming the file at fault.
    """
    if config.tls_certificate_file is None or config.tls_key_file is None:
        return  # both or none: the model has checked it
    # A group may read it, as Debian's ssl-cert does; `slipstream doctor` points it out.
    read_private_text(config.tls_key_file, "server.tls_key_file", OtherAccess.OTHERS)
    try:
        with open(config.tls_certificate_file, "rb"):
            pass
    except OSError as exc:
        raise ConfigurationError(
            f"server.tls_certificate_file {config.tls_certificate_file}: {exc.strerror}",
            param="server.tls_certificate_file",
        ) from exc
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(
            config.tls_certificate_file, config.tls_key_file, password=_no_password
        )
    except ssl.SSLError as exc:
        raise ConfigurationError(
            f"server.tls_certificate_file {config.tls_certificate_file} and server.tls_key_file "
            f"{config.tls_key_file} are not a certificate and its key in PEM form: {exc}",
            param="server.tls_certificate_file",
        ) from exc


def _no_password() -> str:
    # Without this OpenSSL would ask at the terminal.
    raise ConfigurationError(
        "server.tls_key_file is protected by a passphrase, which nobody could type at a restart: "
        "store the key without one, readable by its owner only",
        param="server.tls_key_file",
    )
