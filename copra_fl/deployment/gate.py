"""Closes the operator's side of a SuperLink's port to the network.

Flower 1.41 serves three APIs on one port: Fleet, which nodes use and sign every request of; Control, which submits
runs and registers nodes; and Runtime, which hands out a run's messages to the processes that work on it. The last two
ask nobody who they are: whoever reaches the port could run code on the server and, through an app, on every node.
Behind this gate they answer only to the machine (the container) that the SuperLink itself runs in.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: what the network may reach
OPEN = ("/v1/fleet/", "/health")
REFUSAL = b"copra-fl: only the Fleet API is open to the network"


class Gate:
    """The ASGI application `app`, of which callers from outside reach only the paths that start as in `OPEN`."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"].startswith(OPEN) or _is_local(scope["client"]):
            await self._app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": REFUSAL})


def _is_local(client: tuple[str, int] | None) -> bool:
    """Whether a caller is on this machine: `client` is its address and port, as the connection has it."""
    return client is not None and ipaddress.ip_address(client[0]).is_loopback
