"""The secret by which a SuperLink knows its operator. Each start of a SuperLink makes a new one.

It lies in FLWR_HOME, which only the SuperLink's user can read, in the two places where Flower's own commands look:

    credentials.yaml   `flwr` sends it to the Control API as a bearer token, as after `flwr login`
    operator-secret    `flower-superexec` signs its requests for tasks with it
"""

from __future__ import annotations

import base64
import secrets
import tomllib
from pathlib import Path

import yaml

from copra_fl.files import atomic_write

CREDENTIALS, NAME = "credentials.yaml", "operator-secret"


def make(home: Path) -> str:
    """Make a secret, write it for Flower's commands into the folder `home` (FLWR_HOME), and return it."""
    secret = secrets.token_hex(32)
    credentials = {}
    for address in _addresses(home / "config.toml"):
        # The refresh token is never sent, because the gate never asks for it, but `flwr` looks for one.
        for key, value in (("authn-type", "oidc"), ("oidc-access-token", secret), ("oidc-refresh-token", "none")):
            credentials[f"flower.account-auth.{address}.{key}"] = base64.b64encode(value.encode()).decode()
    atomic_write(home / CREDENTIALS, yaml.safe_dump(credentials), mode=0o600)
    atomic_write(home / NAME, secret, mode=0o600)
    return secret


def _addresses(config: Path) -> list[str]:
    """Return the addresses of the SuperLinks in a config.toml of `flwr`, as HOST:PORT."""
    connections = tomllib.loads(config.read_text(encoding="utf-8")).get("superlink", {})
    return [entry["address"] for entry in connections.values() if isinstance(entry, dict) and "address" in entry]
