"""A stand-in for the Hugging Face hub on this machine: it speaks as much of the hub's HTTP as an upload needs."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

#: files of this suffix travel as large files (LFS), as the hub asks for
LARGE = ".safetensors"


@dataclass
class Hub:
    """State of the server: address, models with their files, and the token that may write."""

    token: str
    address: str = ""
    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    large: dict[str, bytes] = field(default_factory=dict)

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Return status and content of the answer to a request with a valid token."""
        match method, path.strip("/").split("/"):
            case "POST", ["api", "repos", "create"]:
                request = json.loads(body)
                name = f"{request.get('organization') or 'me'}/{request['name']}"
                if name in self.models:
                    return 409, {"error": "You already created this model repo", "url": f"{self.address}/{name}"}
                self.models[name] = {}
                self.private |= {name} if request.get("visibility") == "private" else set()
                return 200, {"url": f"{self.address}/{name}", "id": name}
            case "POST", ["api", "validate-yaml"]:
                return 200, {"errors": [], "warnings": []}
            case "POST", ["api", "models", owner, name, "preupload", "main"] if f"{owner}/{name}" in self.models:
                paths = [file["path"] for file in json.loads(body)["files"]]
                modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in paths}
                files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
                return 200, {"files": files}
            case "POST", [owner, name, "info", "lfs", "objects", "batch"]:
                oids = [(entry["oid"], entry["size"]) for entry in json.loads(body)["objects"]]
                return 200, {
                    "transfer": "basic",
                    "objects": [
                        {"oid": oid, "size": size, "actions": {"upload": {"href": f"{self.address}/large/{oid}"}}}
                        for oid, size in oids
                    ],
                }
            case "PUT", ["large", oid]:
                assert hashlib.sha256(body).hexdigest() == oid
                self.large[oid] = body
                return 200, {}
            case "POST", ["api", "models", owner, name, "commit", "main"] if f"{owner}/{name}" in self.models:
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        self.models[f"{owner}/{name}"][value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        self.models[f"{owner}/{name}"][value["path"]] = self.large[value["oid"]]
                return 200, {"commitUrl": f"{self.address}/{owner}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}
        return 404, {"error": f"{method} {path} is not known"}


@contextmanager
def model_hub(token: str) -> Iterator[Hub]:
    """Serve a `Hub` inside the block."""
    hub = Hub(token)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def respond(self) -> None:
            body = self.read()
            status, content = 401, {"error": "Invalid username or password."}
            if self.path.startswith("/large/") or self.headers["Authorization"] == f"Bearer {hub.token}":
                status, content = hub.answer(self.command, self.path, body)
            answer = json.dumps(content).encode()
            self.send_response(status)
            if "error" in content:
                self.send_header("X-Error-Message", content["error"])
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_PUT = respond

        def read(self) -> bytes:
            if self.headers["Transfer-Encoding"] != "chunked":
                return self.rfile.read(int(self.headers["Content-Length"] or 0))
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
