"""An ASGI wrapper that rejects calls from the network to the operator's APIs of a SuperLink.

Flower 1.41 serves three APIs on one port: Fleet, for nodes, which sign every request; Control, which submits runs and
registers nodes; and Runtime, which hands a run's messages to the processes that work on it. Control and Runtime do not
authenticate their callers: anyone who reaches the port could run code on the server and, through an app, on every node.
Behind this gate they answer only callers on the machine (in the container) that the SuperLink itself runs on.
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


class ApiGate:
    """Wrap the ASGI application `app`: callers on other machines reach only the Fleet API and the health check.

    Until `ready` is set, nodes get status 503 and try again: a node that connected before its key was registered
    would give up.
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
            await _answer(send, 503, b"copra-fl: the nodes' keys are being registered, try again")
        else:
            await self._app(scope, receive, send)


async def _answer(send: Send, status: int, text: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": text})


def _is_local(client: tuple[str, int] | None) -> bool:
    """Return True if the caller is on this machine; `client` is the address and port of its connection."""
    return client is not None and ipaddress.ip_address(client[0]).is_loopback
