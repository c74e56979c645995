"""constraints.txt, which every documented installation uses, against the ranges of pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = "copra-fl"
#: it installs the others, and is not listed by itself
INSTALLER = "pip"


def read_constraints(text: str) -> dict[str, Version]:
    """Package -> its release. Raises ValueError for a line that is more than NAME==RELEASE."""
    releases = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        pinned = re.fullmatch(r"(?P<name>[\w.-]+)==(?P<release>[\w.]+)", line)  # no +cpu: each index has its own
        if pinned is None:
            raise ValueError(f"{line!r} is not NAME==RELEASE")
        releases[canonicalize_name(pinned["name"])] = Version(pinned["release"])
    return releases


def requirements(pyproject: dict, extra: str = "dev") -> Iterator[Requirement]:
    """Everything that a developer's installation asks for: dependencies, `extra` with the extras in it, the backend."""
    project = pyproject["project"]
    yield from map(Requirement, [*pyproject["build-system"]["requires"], *project["dependencies"]])
    extras = [extra]
    for name in extras:
        for requirement in map(Requirement, project["optional-dependencies"][name]):
            if requirement.name == PROJECT:
                extras += requirement.extras
            else:
                yield requirement


def disagreements(pyproject: dict, releases: dict[str, Version]) -> list[str]:
    """Return each requirement that `releases` lack or that their release does not meet."""
    problems = []
    for requirement in requirements(pyproject):
        name = canonicalize_name(requirement.name)
        if name == INSTALLER:
            continue
        if name not in releases:
            problems.append(f"{requirement} is missing from constraints.txt")
        elif releases[name] not in requirement.specifier:
            problems.append(f"constraints.txt has {name} {releases[name]}, pyproject.toml asks for {requirement}")
    return problems


@pytest.fixture
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture
def releases() -> dict[str, Version]:
    return read_constraints((ROOT / "constraints.txt").read_text(encoding="utf-8"))


def test_the_constraints_meet_every_requirement(pyproject: dict, releases: dict[str, Version]) -> None:
    asked = {requirement.name for requirement in requirements(pyproject)}
    assert {"torch", "hatchling", "pytest", "bitsandbytes", "mkdocs-material"} <= asked
    assert disagreements(pyproject, releases) == [], "run `make constraints`"


def test_a_disagreement_is_found(pyproject: dict, releases: dict[str, Version]) -> None:
    del releases["ruff"]
    releases["torch"] = Version("1.0")
    assert disagreements(pyproject, releases) == [
        "constraints.txt has torch 1.0, pyproject.toml asks for torch>=2.11",
        "ruff>=0.12 is missing from constraints.txt",
    ]


@pytest.mark.parametrize("line", ["torch==2.13.0+cpu", "torch>=2", "torch @ https://example.org/torch.whl"])
def test_only_releases_are_constraints(line: str) -> None:
    with pytest.raises(ValueError, match="is not NAME==RELEASE"):
        read_constraints(line)
