"""The command of a client's container: `flower-supernode` in this process, with logs in the format of COPRA_FL_LOG.

python -m copra_fl.deployment.supernode [--hide-keys] [FLOWER-SUPERNODE-ARGS...]

If the SuperLink rejects the node (status 401), Flower logs "terminated gracefully" and exits with 0. This command logs
the reason, a wrong clock for example, and exits with 1.

With --hide-keys, ClientApps cannot read the node's private key. For containers (`hidden_keys.deny_reading`).
"""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import entry_points
from typing import Any

import httpx
import uvicorn

from copra_fl import logs
from copra_fl.deployment import clocks
from copra_fl.deployment.api_gate import FLEET
from copra_fl.deployment.hidden_keys import hide

#: as a command, this module is not called by its name
log = logging.getLogger("copra_fl.deployment.supernode")


def main() -> None:
    arguments = sys.argv[1:]
    if "--hide-keys" in arguments:
        arguments.remove("--hide-keys")
        arguments = hide(arguments, "--auth-supernode-private-key")
    (entry_point,) = entry_points(group="console_scripts", name="flower-supernode")
    run = entry_point.load()
    logs.configure()
    if logs.as_json():
        uvicorn.config.LOGGING_CONFIG["formatters"] |= dict.fromkeys(("default", "access"), {"()": logs.JsonFormatter})
    sys.argv = ["flower-supernode", *arguments]
    reasons = explain_rejections()
    try:
        run()
    finally:
        if reasons:
            sys.exit(1)


def explain_rejections() -> list[str]:
    """Log why the SuperLink rejects this node, from now on; return a list to which each reason is added."""
    send, reasons = httpx.Client.send, list[str]()

    def send_and_explain(client: httpx.Client, request: httpx.Request, **settings: Any) -> httpx.Response:
        response = send(client, request, **settings)
        if response.status_code == httpx.codes.UNAUTHORIZED and request.url.path.startswith(FLEET):
            reasons.append(reason(response.headers, datetime.now(UTC)))
            log.error("the SuperLink rejects this node: %s", reasons[-1])
        return response

    httpx.Client.send = send_and_explain  # type: ignore[method-assign,assignment]
    return reasons


def reason(headers: httpx.Headers, now: datetime) -> str:
    """Return why a SuperLink has answered 401 with `headers` at the time `now` of this machine's clock.

    The time in an answer is that of the server, in whole seconds. Apart from the clock, only the key can be wrong.
    """
    if "date" in headers:
        seconds_ahead = (now - parsedate_to_datetime(headers["date"])).total_seconds()
        # A second of doubt: at the limit it is more likely the clock.
        if not 1 - clocks.MAX_BEHIND < seconds_ahead < clocks.MAX_AHEAD - 1:
            return f"its {clocks.describe(seconds_ahead)}"
    return "its key is not, or no longer, in the server's folder of nodes"


if __name__ == "__main__":
    main()
