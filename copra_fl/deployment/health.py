"""Health check of a container: exit code 0 if the Flower process at a URL answers.

python -m copra_fl.deployment.health URL [CA CERTIFICATE]
"""

from __future__ import annotations

import ssl
import sys
import urllib.request

TIMEOUT_SECONDS = 5


def main(url: str, ca: str | None = None) -> None:
    context = ssl.create_default_context(cafile=ca) if url.startswith("https") else None
    urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS, context=context).close()


if __name__ == "__main__":
    main(*sys.argv[1:])
