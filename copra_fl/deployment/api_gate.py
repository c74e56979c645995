"""An ASGI wrapper of a SuperLink: who may call which of its APIs, and how many bytes a request may have.

Flower 1.42 serves three APIs on one port: Fleet, for nodes, which sign every request; Control, which submits runs and
registers nodes; and Runtime, which hands a run's messages to the processes that work on it. Flower reads the whole body
of a request before it looks at a node's key, and it asks callers of Control for no identity: whoever reaches the port
could fill the server's memory, run code on the server and, through an app, on every node. Behind this gate

- Fleet answers nodes that `admit_node` admits by their headers, before a byte of the body is read;
- Control, and all other pages, answer processes of the SuperLink's own user on this machine (in this container) that
  send the operator's secret (`copra_fl.deployment.operator_secret`);
- Runtime answers processes of the same user; Flower asks them for a signature with the secret, or a task's token;
- a request has at most `MAX_BODY_BYTES`.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, NamedTuple

from copra_fl.deployment.peers import is_this_user

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

FLEET, RUNTIME, HEALTH = "/v1/fleet/", "/v1/runtime/", "/health"
#: Most bytes in a request. Flower splits arrays into chunks of 5 MiB; a list of a message's objects has 411 bytes per
#: client that the node hosts, so a node can host 40,000 clients.
MAX_BODY_BYTES = 16 * 2**20


class Refusal(NamedTuple):
    """The status and the text that a rejected caller gets."""

    status: int
    text: str


#: Takes the headers of a request to the Fleet API; returns None if the node may send it.
AdmitNode = Callable[[Mapping[bytes, bytes]], Refusal | None]


def admit_every_node(headers: Mapping[bytes, bytes]) -> None:
    """Admit any caller: a deployment without keys."""


def admit_no_node(headers: Mapping[bytes, bytes]) -> Refusal:
    """Reject every caller: a simulation, which has no nodes on the network."""
    return Refusal(403, "a simulation has no Fleet API")


class ApiGate:
    """Wrap the ASGI application `app`; see the module. `secret` is the operator's."""

    def __init__(self, app: App, secret: str, admit_node: AdmitNode) -> None:
        self._app = app
        self._authorization = f"Bearer {secret}".encode()
        self._admit_node = admit_node

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if refusal := self._refusal(scope):
            await _answer(send, refusal)
            return
        messages = await _read(receive)
        if messages is None:
            await _answer(send, TOO_LARGE)
            return

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, replay, send)

    def _refusal(self, scope: Scope) -> Refusal | None:
        """Return why a request is rejected by its headers; None if it is not."""
        headers, path = dict(scope["headers"]), scope["path"]
        if path.startswith(FLEET):
            refusal = self._admit_node(headers)
        elif path == HEALTH:
            refusal = None
        elif not is_this_user(scope["client"], scope["server"]):
            refusal = Refusal(403, "only the Fleet API is open to other machines and users")
        elif path.startswith(RUNTIME):
            refusal = None
        elif not secrets.compare_digest(headers.get(b"authorization", b""), self._authorization):
            refusal = Refusal(401, "this API is the operator's: it needs the secret in the SuperLink's FLWR_HOME")
        else:
            refusal = None
        if refusal is None and int(headers.get(b"content-length", b"0")) > MAX_BODY_BYTES:
            refusal = TOO_LARGE
        return refusal


TOO_LARGE = Refusal(413, f"a request has at most {MAX_BODY_BYTES} bytes")


async def _read(receive: Receive) -> list[Message] | None:
    """Return the messages of a request up to the end of its body; None if it is longer than MAX_BODY_BYTES."""
    messages: list[Message] = []
    num_bytes, complete = 0, False
    while not complete:
        message = await receive()
        messages.append(message)
        num_bytes += len(message.get("body", b""))
        if num_bytes > MAX_BODY_BYTES:
            return None
        complete = not message.get("more_body", False)
    return messages


async def _answer(send: Send, refusal: Refusal) -> None:
    """Send `refusal` and close the connection: what else the caller sends is not read."""
    headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": f"copra-fl: {refusal.text}".encode()})
