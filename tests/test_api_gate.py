"""The API gate of a SuperLink, called as an ASGI server calls it. Over TLS: tests/test_deploy_processes.py."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from copra_fl.deployment.api_gate import ApiGate

FLEET, CONTROL, RUNTIME = "/v1/fleet/pull-messages", "/v1/control/start-run", "/v1/runtime/acquire-task"
OUTSIDE, INSIDE, INSIDE6, OUTSIDE6 = ("10.89.0.3", 5), ("127.0.0.1", 5), ("::1", 5), ("fd00::3", 5)


def answer(client: tuple[str, int] | None, path: str, ready: bool = True) -> int:
    """Return the status that a caller at `client` gets; the application behind the gate answers 200 to everything."""

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    statuses: list[int] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def receive() -> Any:
        raise AssertionError("the gate must not read the request of a rejected caller")

    event = threading.Event()
    if ready:
        event.set()
    asyncio.run(ApiGate(application, event)({"type": "http", "path": path, "client": client}, receive, send))
    (status,) = statuses
    return status


@pytest.mark.parametrize("path", [CONTROL, RUNTIME, "/docs", "/openapi.json", "/", "/v1/fleetx", "//v1/fleet/x"])
def test_the_network_reaches_only_fleet_and_health(path: str) -> None:
    assert [answer(client, path) for client in (OUTSIDE, OUTSIDE6, None)] == [403] * 3
    assert [answer(client, path) for client in (INSIDE, INSIDE6)] == [200] * 2
    assert [answer(OUTSIDE, open_path) for open_path in (FLEET, "/health")] == [200] * 2


def test_nodes_wait_until_the_keys_are_registered() -> None:
    assert [answer(client, FLEET, ready=False) for client in (OUTSIDE, INSIDE)] == [503] * 2
    assert answer(INSIDE, CONTROL, ready=False) == 200, "the keys are registered through it"
    assert answer(OUTSIDE, CONTROL, ready=False) == 403
