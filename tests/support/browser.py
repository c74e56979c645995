"""Open a page in headless Chromium and report errors and network requests, which a reader would not see."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.support.real_runs import HANG_SECONDS

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")


def check_page(path: Path, num_figures: int) -> None:
    """Assert that `path` opens from ``file://`` with all its figures drawn, no console message and no request."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        dom, problems = _open(path.resolve().as_uri(), Path(scratch))
    assert not problems, "\n".join(problems)
    drawn = len(re.findall(r'<div class="plot-container', dom))
    assert drawn == num_figures, f"{drawn} of {num_figures} figures are drawn"


def _open(url: str, scratch: Path) -> tuple[str, list[str]]:
    """Return the page's HTML after its scripts have run, and its console messages and requests."""
    assert CHROMIUM is not None
    net_log = scratch / "net-log.json"
    browser = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={scratch / 'profile'}",
            f"--log-net-log={net_log}",
            "--enable-logging=stderr",
            "--window-size=1280,1000",
            "--virtual-time-budget=30000",
            "--dump-dom",
            url,
        ],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=True,
    )
    problems = [line for line in browser.stderr.splitlines() if "CONSOLE" in line]
    problems += [f"requested {url}" for url in _requested(net_log)]
    return browser.stdout, problems


def _requested(net_log: Path) -> set[str]:
    """Return the http, https and web socket addresses that the page requested, from Chromium's network log."""
    events = [event.get("params", {}) for event in json.loads(net_log.read_text())["events"]]
    return {
        event["url"]
        for event in events
        if event.get("url", "").startswith(("http", "ws"))
        and event.get("initiator", "not an origin") != "not an origin"  # Chromium's own requests
    }
