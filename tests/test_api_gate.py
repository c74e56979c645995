"""The API gate before a real HTTP server. Before a real SuperLink, over TLS: tests/test_deploy_processes.py."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import flwr.common.constant
import httpx
import psutil
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.supercore import constant
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes, sign_message
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from copra_fl.deployment import clocks, operator_secret, peers, supernode
from copra_fl.deployment.api_gate import MAX_BODY_BYTES, AdmitNode, ApiGate, Refusal, admit_every_node, admit_no_node
from copra_fl.deployment.gated_superlink import SERVER_SETTINGS
from copra_fl.deployment.node_keys import PUBLIC_KEY, SIGNATURE, TIMESTAMP, NodeKeys
from copra_fl.training.engine import M_TRIM_THRESHOLD

FLEET, CONTROL, RUNTIME = "/v1/fleet/pull-messages", "/v1/control/start-run", "/v1/runtime/acquire-task"
SECRET = "of-the-operator"
OPERATOR = {"authorization": f"Bearer {SECRET}"}
#: what a closed or refused request may add to the memory of server and tests; the bodies are ten times as long
MAX_GROWTH, LONG_BODY = 50 * 2**20, 500 * 2**20

#: a server that neither answers nor closes the connection for so long has failed
HANG_SECONDS = 60


class Server:
    """uvicorn, with the settings of the SuperLink, before an application that reads each body, as Flower does."""

    def __init__(self, admit_node: AdmitNode) -> None:
        self.bodies: list[int] = []
        settings = SERVER_SETTINGS | {"log_level": "error", "lifespan": "off"}
        self.server = uvicorn.Server(uvicorn.Config(ApiGate(self.answer, SECRET, admit_node), **settings))
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=HANG_SECONDS)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})

    async def answer(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message.get("more_body", False)
        self.bodies.append(len(body))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    def post(self, path: str, headers: dict[str, str] | None = None, body: bytes = b"") -> int:
        return self.client.post(path, headers=headers, content=body).status_code

    def send(self, *parts: bytes) -> int:
        """Send `parts` over a socket and return the status of the answer; 0 if the connection ends without one."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=HANG_SECONDS) as connection:
            with contextlib.suppress(OSError):
                for part in parts:
                    connection.sendall(part)
            try:
                return int(connection.recv(12).split()[1])
            except (OSError, IndexError):
                return 0


@pytest.fixture
def serve() -> Iterator[Callable[[AdmitNode], Server]]:
    """Start servers, which end with the test."""
    servers: list[Server] = []

    def start(admit_node: AdmitNode) -> Server:
        servers.append(server := Server(admit_node))
        server.thread.start()
        while not server.server.started:
            time.sleep(0.01)
        return server

    yield start
    for server in servers:
        server.client.close()
        server.server.should_exit = True
        server.thread.join()


def ask(client: tuple[str, int] | None, path: str) -> int:
    """Return the status that a caller at `client` gets, with the operator's secret and without a connection."""
    statuses: list[int] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    headers = [(name.encode(), value.encode()) for name, value in OPERATOR.items()]
    scope = {"type": "http", "path": path, "client": client, "server": ("127.0.0.1", 8000), "headers": headers}
    asyncio.run(ApiGate(application, SECRET, admit_every_node)(scope, receive, send))
    (status,) = statuses
    return status


@pytest.mark.parametrize("path", [CONTROL, RUNTIME, "/docs", "/openapi.json", "/", "/v1/fleetx", "//v1/fleet/x"])
def test_the_network_reaches_only_fleet_and_health(path: str) -> None:
    outside = [("10.89.0.3", 5), ("fd00::3", 5), None]
    assert [ask(client, path) for client in outside] == [403] * 3
    assert [ask(client, open_path) for client in outside for open_path in (FLEET, "/health")] == [200] * 6


def test_on_this_machine_the_operator_needs_the_secret(serve: Callable[[AdmitNode], Server]) -> None:
    """A proxy or a tunnel on the same machine calls from loopback. Flower itself asks Runtime's callers for tokens."""
    server = serve(admit_every_node)
    wrong = {"authorization": "Bearer 1"}
    for path in (CONTROL, "/docs", "/openapi.json", "/", "//v1/runtime/x", "/v1/control/list-nodes"):
        assert [server.post(path, headers) for headers in (None, wrong, OPERATOR)] == [401, 401, 200]
    assert [server.post(path) for path in (RUNTIME, FLEET, "/health")] == [200] * 3
    assert serve(admit_no_node).post(FLEET, OPERATOR) == 403, "a simulation has no nodes"


CALL_AS_ANOTHER_USER = """
import os, socket, sys
os.setuid(12345)
for request in sys.argv[2:]:
    for leaves_at_once in (True, True, True, False):
        connection = socket.socket()
        connection.connect(("127.0.0.1", int(sys.argv[1])))
        connection.sendall(request.encode())
        if not leaves_at_once:
            print(connection.recv(100).split()[1].decode())
        connection.close()
"""


@pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="only root can be another user")
def test_another_user_of_the_machine_is_rejected_with_the_secret_too(serve: Callable[[AdmitNode], Server]) -> None:
    """Also if the connection is closed at once: Linux lists root as the owner of a closed connection."""
    server = serve(admit_every_node)
    request = "GET {} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n\r\n"
    requests = [request.format(path, SECRET) for path in (CONTROL, RUNTIME)]
    command = [sys.executable, "-I", "-c", CALL_AS_ANOTHER_USER, str(server.port), *requests]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "403\n403\n"
    assert server.post("/health") == 200 and server.bodies == [0], "it has handled all that came before"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux lists the users of connections")
@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"), (socket.AF_INET6, "::ffff:127.0.0.1")]
)
def test_the_user_of_a_connection_is_known_while_it_is_open(family: socket.AddressFamily, host: str) -> None:
    is_ipv6 = family == socket.AF_INET6
    listener = socket.create_server(("::" if is_ipv6 else host, 0), family=family, dualstack_ipv6=is_ipv6)
    with listener, socket.socket(family) as client:
        client.connect((host, listener.getsockname()[1]))
        accepted, _ = listener.accept()
        with accepted:
            ends = [address[:2] for address in (accepted.getpeername(), accepted.getsockname())]
            assert peers.connection_user(*ends) == os.geteuid() and peers.is_this_user(*ends)
            client.close()
            assert peers.connection_user(*ends) is None and not peers.is_this_user(*ends)
    assert not peers.is_this_user(("10.0.0.1", 1), ends[1])


def zeros(num_bytes: int) -> Iterator[bytes]:
    return iter([bytes(2**20)] * (num_bytes // 2**20))


def chunks(num_bytes: int) -> Iterator[bytes]:
    return (b"100000\r\n" + part + b"\r\n" for part in zeros(num_bytes))


START = f"POST {FLEET} HTTP/1.1\r\nhost: x\r\n".encode()


@pytest.fixture
def freed_memory_returns() -> None:
    """Let the C library return what is freed: an engine that a test opened before in this process keeps it."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_TRIM_THRESHOLD, 2**17)


@pytest.mark.usefixtures("freed_memory_returns")
@pytest.mark.parametrize(
    ("admit_node", "headers", "parts", "status"),
    [
        pytest.param(NodeKeys().admit, b"content-length: 3000000000", zeros, 503, id="keys-not-registered-yet"),
        pytest.param(admit_no_node, b"content-length: 1000000000000", zeros, 403, id="unknown-node"),
        pytest.param(admit_no_node, b"transfer-encoding: chunked", chunks, 403, id="unknown-node-chunked"),
        pytest.param(admit_every_node, b"content-length: 1000000000000", zeros, 413, id="a-huge-length"),
        pytest.param(admit_every_node, b"content-length: " + b"9" * 5000, zeros, 400, id="not-a-length"),
        pytest.param(admit_every_node, b"transfer-encoding: chunked", chunks, 413, id="an-endless-body"),
        pytest.param(admit_every_node, b"content-length: 10", zeros, 200, id="more-than-its-length"),
        pytest.param(admit_every_node, b"x: " + b"x" * 2**20, zeros, 400, id="an-endless-header"),
    ],
)
def test_no_request_fills_the_memory(
    serve: Callable[[AdmitNode], Server], admit_node: AdmitNode, headers: bytes,
    parts: Callable[[int], Iterator[bytes]], status: int,
) -> None:  # fmt: skip
    server, process = serve(admit_node), psutil.Process()
    before = process.memory_info().rss
    answer = server.send(START, headers + b"\r\n\r\n", *parts(LONG_BODY))
    assert process.memory_info().rss - before < MAX_GROWTH
    assert answer in (status, 0), "a caller that still sends when the server closes the connection may miss the answer"
    assert sum(server.bodies) <= 10
    if b"length" in headers and status != 200:
        assert server.send(START, headers + b"\r\n\r\n") == status
    assert server.post("/health") == 200, "the server answers others"


def test_the_longest_request_passes_and_a_byte_more_does_not(serve: Callable[[AdmitNode], Server]) -> None:
    server = serve(admit_every_node)
    assert server.post(FLEET, body=bytes(MAX_BODY_BYTES)) == 200
    assert server.post(FLEET, body=bytes(MAX_BODY_BYTES + 1)) == 413
    assert server.bodies == [MAX_BODY_BYTES]
    assert 3 * flwr.common.constant.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE < MAX_BODY_BYTES


def openssh(key: ec.EllipticCurvePublicKey) -> str:
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode() + "\n"


def headers_of(keys: tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey]) -> dict[bytes, bytes]:
    """Return the headers that Flower's own SuperNode sends."""
    request = httpx.Request("POST", "http://x/v1/fleet/x")
    context = ProtobufRequestContext(rpc_method="", message=None, request=request)  # type: ignore[arg-type]
    NodeAuthHttpInterceptor(*keys).intercept(context, lambda context: httpx.Response(200))
    return dict(request.headers.raw) | {name.lower(): value for name, value in request.headers.raw}


def refusal(keys: NodeKeys, headers: dict[bytes, bytes]) -> Refusal:
    answer = keys.admit(headers)
    assert answer is not None
    return answer


def test_a_node_needs_a_registered_key_and_its_signature() -> None:
    mine, other = generate_key_pairs(), generate_key_pairs()
    keys = NodeKeys()
    assert refusal(keys, headers_of(mine)).status == 503, "nodes wait until the keys are registered"
    keys.replace({"client-0": openssh(mine[1])})
    signed = headers_of(mine)
    assert keys.admit(signed) is None
    assert refusal(keys, headers_of(other)).text == "this node's key is not registered"
    assert refusal(keys, {}).text == "this node's key is not registered"
    forgeries = [
        {SIGNATURE: headers_of(other)[SIGNATURE]}, {SIGNATURE: b"x"}, {TIMESTAMP: b"2026-11-28T00:00:00+00:00"},
        {SIGNATURE: b64encode(sign_message(mine[0], b"yesterday")), TIMESTAMP: b"yesterday"},
        {SIGNATURE: b64encode(sign_message(mine[0], b"\xff")), TIMESTAMP: b"\xff"},
        {SIGNATURE: b64encode(sign_message(mine[0], b"2026-11-28")), TIMESTAMP: b"2026-11-28"},
    ]  # fmt: skip
    for forged in forgeries:
        assert refusal(keys, signed | forged).text == "the signature is not that of the node's key"
    for name in (SIGNATURE, TIMESTAMP):
        assert refusal(keys, {key: value for key, value in signed.items() if key != name}).status == 401
    keys.replace({})
    assert refusal(keys, headers_of(mine)).status == 401, "its key has been removed"


def test_names_and_limits_are_flowers() -> None:
    names = constant.FLEET_HTTP_PUBLIC_KEY_HEADER, flwr.common.constant.TIMESTAMP_HEADER
    assert (PUBLIC_KEY.decode(), TIMESTAMP.decode(), SIGNATURE.decode()) == (
        *names,
        constant.FLEET_HTTP_SIGNATURE_HEADER,
    )
    assert (-clocks.MAX_AHEAD, clocks.MAX_BEHIND) == (
        constant.MIN_TIMESTAMP_DIFF_SECONDS,
        constant.MAX_TIMESTAMP_DIFF_SECONDS,
    )


@pytest.mark.parametrize(
    ("seconds_ahead", "words"),
    [
        (8, "8 s ahead of the server's"), (180, "180 s ahead of the server's"), (3, ""), (0, ""), (-300, ""),
        (-310, "310 s behind the server's"),
    ],
)  # fmt: skip
def test_a_wrong_clock_is_named_on_both_sides(seconds_ahead: int, words: str, caplog: pytest.LogCaptureFixture) -> None:
    """The node learns the server's time from the date in its answer."""
    private, public = generate_key_pairs()
    keys = NodeKeys()
    keys.replace({"client-7": openssh(public)})
    timestamp = (datetime.now(UTC) + timedelta(seconds=seconds_ahead)).isoformat().encode()
    signature = b64encode(sign_message(private, timestamp))
    headers = {PUBLIC_KEY: b64encode(public_key_to_bytes(public)), TIMESTAMP: timestamp, SIGNATURE: signature}
    with caplog.at_level(logging.WARNING, logger="copra_fl"):
        answer = keys.admit(headers)
    date = datetime(2026, 11, 28, tzinfo=UTC)
    dated = httpx.Headers({"date": format_datetime(date, usegmt=True)})
    seen = supernode.reason(dated, date + timedelta(seconds=seconds_ahead))
    if words:
        assert answer is not None and answer.status == 401 and f"the clock is {words}" in answer.text
        assert f"client-7 is rejected: its clock is {words}" in caplog.text
        assert seen.startswith(f"its clock is {words}, and may be at most 5 s ahead of it and 305 s behind it")
    else:
        assert answer is None and not caplog.records
        assert seen == "its key is not, or no longer, in the server's folder of nodes"


def test_a_node_logs_why_it_is_rejected(
    serve: Callable[[AdmitNode], Server], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(httpx.Client, "send", httpx.Client.send)  # restores it at the end
    reasons = supernode.explain_rejections()
    keys = NodeKeys()
    keys.replace({})
    server = serve(keys.admit)
    assert [server.post(path) for path in ("/health", CONTROL)] == [200, 401] and not reasons
    assert server.post(FLEET) == 401
    assert reasons == ["its key is not, or no longer, in the server's folder of nodes"]
    assert f"the SuperLink rejects this node: {reasons[0]}" in caplog.text


def test_flowers_commands_find_the_secret(tmp_path: Path) -> None:
    """`flwr` in its store of credentials; files and folder are the user's own."""
    from flwr.cli.auth_plugin import OidcCliPlugin
    from flwr.supercore.credential_store import FileCredentialStore

    (tmp_path / "config.toml").write_text(
        '[superlink]\ndefault = "here"\n[superlink.here]\naddress = "localhost:8000"\n[superlink.other]\n'
    )
    secrets = [operator_secret.make(tmp_path) for _ in range(2)]
    assert len(secrets[0]) == 64 and secrets[0] != secrets[1]
    plugin = OidcCliPlugin("localhost:8000")
    plugin.store = FileCredentialStore(tmp_path / operator_secret.CREDENTIALS)
    plugin.load_tokens()
    assert plugin.access_token == (tmp_path / operator_secret.NAME).read_text() == secrets[1]
    assert plugin.store.get("flower.account-auth.localhost:8000.authn-type") == b"oidc"
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in (operator_secret.CREDENTIALS, operator_secret.NAME)]
    assert modes == [0o600, 0o600]
