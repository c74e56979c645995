"""Rules for committed files: small text files and pictures, with no path of the machine that made them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: the pre-trained weights of an asset, the only file that may be large and binary
WEIGHTS = "model.safetensors"
PICTURES = {".png", ".jpg", ".svg"}
#: files that may be empty
MARKERS = {"__init__.py", "py.typed"}
MEGABYTE = 1_000_000
MAX_FILE_BYTES = MEGABYTE
#: of all tracked files together, what a clone without history writes; results are 2.7 MB of it
MAX_CLONE_BYTES = 9 * MEGABYTE
#: A file in a home, workspace or temporary folder. The folder alone, as in ``tmpfs: [/tmp]``, and folders that this
#: project itself makes in its containers (/state, /runs, /app, /opt/copra-fl) belong to no particular machine.
MACHINE_PATH = re.compile(rb"(?<![\w.~$}-])/(?:work|home|root|tmp|Users|var/folders)/[\w.-]+")


def violations(name: str, content: bytes) -> list[str]:
    """Return the reasons why a file of this name and content must not be committed."""
    path, reasons = Path(name), []
    is_weights = path.match(f"fractal-vit/{WEIGHTS}")
    if not content and path.name not in MARKERS:
        reasons.append("is empty")
    if len(content) > MAX_FILE_BYTES and not is_weights:
        reasons.append(f"has {len(content)} bytes, more than {MAX_FILE_BYTES}")
    if _is_binary(content) and path.suffix not in PICTURES and not is_weights:
        reasons.append("is binary")
    reasons += [f"names a path of one machine: {match.decode()}" for match in MACHINE_PATH.findall(content)]
    if name == "LICENSE" and not content.strip().startswith(b"Apache License"):
        reasons.append("does not begin with the title of the license")
    return [f"{name} {reason}" for reason in reasons]


def _is_binary(content: bytes) -> bool:
    try:
        return "\0" in content.decode()
    except UnicodeDecodeError:
        return True


@pytest.fixture(scope="module")
def tracked() -> dict[str, bytes]:
    """Tracked file -> its content in the working tree."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a Git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return {name: (ROOT / name).read_bytes() for name in names.split("\0") if name and (ROOT / name).is_file()}


def test_no_tracked_file_breaks_a_rule(tracked: dict[str, bytes]) -> None:
    assert len(tracked) > 100 and "LICENSE" in tracked
    assert [reason for name, content in tracked.items() for reason in violations(name, content)] == []


def test_a_clone_without_history_is_small(tracked: dict[str, bytes]) -> None:
    assert sum(map(len, tracked.values())) < MAX_CLONE_BYTES


# Put together here, so that this file passes its own test.
HOME, WORK, TMP = (f"/{folder}" for folder in ("home/someone", "work/scratch", "tmp/run"))


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("LICENSE", b"", "is empty"),
        ("LICENSE", b"MIT License\n", "does not begin with the title of the license"),
        ("notes.md", b"", "is empty"),
        ("data.csv", b"1,2\n" * 300_000, "has 1200000 bytes"),
        (f"assets/other/{WEIGHTS}", b"\1" * 1_100_000, "has 1100000 bytes"),
        ("a.whl", b"PK\3\4\0\0", "is binary"),
        ("a.bin", b"\xff\xfe\xfa", "is binary"),
        ("a.json", f'{{"python": "{HOME}/venv/bin/python"}}'.encode(), f"{HOME}"),
        ("a.md", f"`bench --output {WORK}/out`".encode(), f"{WORK}"),
        ("a.svg", f"<!-- {TMP}/figure -->".encode(), f"{TMP}"),
    ],
)
def test_a_bad_file_is_found(name: str, content: bytes, reason: str) -> None:
    assert any(reason in text for text in violations(name, content))


@pytest.mark.parametrize(
    "name, content",
    [
        ("LICENSE", b"\n                Apache License\n"),
        ("clients/__init__.py", b""),
        ("copra_fl/py.typed", b""),
        ("docs/images/report.png", b"\x89PNG\r\n\x1a\n\0"),
        (f"copra_fl/assets/fractal-vit/{WEIGHTS}", b"\0" * 1_500_000),
        ("docker-compose.yml", b"  tmpfs: [/tmp]\n  volumes: [./state:/state]\n"),
        ("a.md", b"below `/tmp`; https://example.org/home/page and $HOME/work/data"),
    ],
)
def test_a_good_file_is_not(name: str, content: bytes) -> None:
    assert violations(name, content) == []
