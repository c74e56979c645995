"""Closes the operator's side of a SuperLink's port to the network.

Flower 1.41 serves three APIs on one port: Fleet, which nodes use and sign every request of; Control, which submits
runs and registers nodes; and Runtime, which hands out a run's messages to the processes that work on it. The last two
ask nobody who they are: whoever reaches the port could run code on the server and, through an app, on every node.
Behind this gate they answer only to the machine (the container) that the SuperLink itself runs in.
"""

from __future__ import annotations

import ipaddress
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

FLEET, HEALTH = "/v1/fleet/", "/health"


class Gate:
    """The ASGI application `app`, of which callers from outside reach only the Fleet API and the health check.

    Until `ready` is set, nodes are told to try again: one that came before its key was registered would give up.
    """

    def __init__(self, app: App, ready: threading.Event) -> None:
        self._app = app
        self._ready = ready

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        if not path.startswith((FLEET, HEALTH)) and not _is_local(scope["client"]):
            await _answer(send, 403, b"copra-fl: only the Fleet API is open to the network")
        elif path.startswith(FLEET) and not self._ready.is_set():
            await _answer(send, 503, b"copra-fl: the nodes' keys are being registered")
        else:
            await self._app(scope, receive, send)


async def _answer(send: Send, status: int, text: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": text})


def _is_local(client: tuple[str, int] | None) -> bool:
    """Whether a caller is on this machine: `client` is its address and port, as the connection has it."""
    return client is not None and ipaddress.ip_address(client[0]).is_loopback
