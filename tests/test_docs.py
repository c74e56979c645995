"""The documentation: the site builds without a network, its links hold, and what it names exists."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import click
import pytest

from clients.policy import KEYS as POLICY_KEYS
from copra_fl.cli.config import all_keys
from copra_fl.simulation.study_tables import TUNING_KEYS
from tests.support.command_line import all_commands, root_command
from tests.support.documents import ROOT, blocks
from tests.support.notebooks import NOTEBOOKS
from tests.support.real_runs import HANG_SECONDS

DOCS = ROOT / "docs"
KEYS = all_keys().keys()
PAGES = sorted(DOCS.rglob("*.md"))
ROOT_PAGES = [
    ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
]
WRITTEN = [*PAGES, *ROOT_PAGES, ROOT / "experiments" / "LOG.md", ROOT / "llms.txt"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAX_LINES = {"README.md": 110, "ARCHITECTURE.md": 130, "llms.txt": 80}
MAX_COLUMNS = 120
#: idioms that a reader has to decode, and the words of the code base before its redesign
BANNED = re.compile(
    r"\b(be had|made plain|there is none|as ever|comes? along|besides|is told|are told|had better|whoever asks|greets?|"
    r"refus(?:e|es|ed|al)|keep-warm|prefix-cache|unseen-clients|round-timeout(?!-s)|node-timeout(?!-s)|"
    r"max-memory(?!-gb)|fair-lambda|optimis\w+)\b"
)
#: programs in command lines that are not ours to check
OTHER_PROGRAMS = {
    ".", "cd", "docker", "echo", "export", "flower-supernode", "flwr", "pip", "ray", "ssh-keygen", "tar"
}  # fmt: skip


def named(path: Path) -> str:
    """Return a file's path from the root of the repository."""
    return path.relative_to(ROOT).as_posix()


class Page(HTMLParser):
    """The links, the loaded files and the anchors of an HTML page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload"):
            self.loaded.append(values["href"])
        if "src" in values:
            self.loaded.append(values["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    """Every page of the site, built strictly; proxies that lead nowhere stand for a missing network."""
    folder = tmp_path_factory.mktemp("site")
    nowhere = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    environment = os.environ | nowhere | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert result.returncode == 0, result.stdout + result.stderr
    return {path.resolve(): Page(path) for path in folder.rglob("*.html") if path.name != "404.html"}


def target(page: Path, link: str) -> tuple[Path, str]:
    """Return the file and the anchor that a link of a page leads to."""
    parts = urlsplit(link)
    return ((page.parent / unquote(parts.path)).resolve() if parts.path else page), unquote(parts.fragment)


def is_external(link: str) -> bool:
    return bool(urlsplit(link).scheme or urlsplit(link).netloc)


def test_every_source_page_is_built(site: dict[Path, Page]) -> None:
    assert len(site) == len(PAGES) + len(NOTEBOOKS)


def test_no_link_is_dead(site: dict[Path, Page]) -> None:
    dead = []
    for path, page in site.items():
        for link in [*page.links, *page.loaded]:
            if is_external(link):
                continue
            file, anchor = target(path, link)
            if not file.exists() or (anchor and file in site and anchor not in site[file].anchors):
                dead.append(f"{path.name}: {link}")
    assert dead == []


def test_every_page_is_reachable_from_the_start(site: dict[Path, Page]) -> None:
    waiting = [next(path for path in site if path.name == "index.html")]
    reached = set(waiting)
    while waiting:
        path = waiting.pop()
        linked = {target(path, link)[0] for link in site[path].links if not is_external(link)} & site.keys()
        waiting += linked - reached
        reached |= linked
    assert reached == site.keys()


def test_pages_load_nothing_from_the_network(site: dict[Path, Page]) -> None:
    assert [link for page in site.values() for link in page.loaded if is_external(link)] == []


def page_named(site: dict[Path, Page], name: str) -> Page:
    return next(page for path, page in site.items() if path.as_posix().endswith(f"/reference/{name}.html"))


def test_the_reference_has_every_key_and_command(site: dict[Path, Page]) -> None:
    assert page_named(site, "configuration").anchors >= KEYS
    headings = {" ".join(words).replace(" ", "-") for words in runnable_commands()}
    assert headings <= page_named(site, "commands").anchors


def test_llms_txt_lists_every_page() -> None:
    listed = re.findall(r"^- \[[^]]+\]\(([^)]+)\): ", (ROOT / "llms.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert [path for path in listed if not (ROOT / path).is_file()] == []
    expected = set(map(named, WRITTEN)) - {"llms.txt"}
    assert expected == set(listed) and len(listed) == len(set(listed))


@pytest.mark.parametrize("path", [ROOT / name for name in MAX_LINES], ids=lambda path: path.name)
def test_the_pages_at_the_root_stay_short(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_LINES[path.name]
    assert [line for line in lines if len(line) > MAX_COLUMNS] == []


@pytest.mark.parametrize("path", WRITTEN, ids=named)
def test_no_line_is_long_except_in_tables(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > MAX_COLUMNS and not line.startswith("|")] == []


@pytest.mark.parametrize("path", WRITTEN, ids=named)
def test_no_page_uses_a_banned_phrase(path: Path) -> None:
    assert [match[0] for match in BANNED.finditer(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("path", [*WRITTEN, *NOTEBOOKS], ids=named)
def test_no_page_installs_from_an_index_that_does_not_have_the_package(path: Path) -> None:
    assert re.findall(r"pip install \W*copra-fl\b", path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", ROOT_PAGES, ids=lambda path: path.name)
def test_links_of_the_pages_at_the_root_hold(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[\w-]+\]: (\S+)", text, re.MULTILINE)
    local = [urlsplit(link) for link in links if not is_external(link)]
    assert [parts.path for parts in local if not (ROOT / parts.path).exists()] == []
    anchors = [(ROOT / parts.path, parts.fragment) for parts in local if parts.fragment]
    assert [anchor for file, anchor in anchors if anchor not in slugs(file)] == []


def slugs(path: Path) -> set[str]:
    """Return the anchors of the headings of a Markdown page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def test_the_files_that_the_pages_name_exist() -> None:
    """Paths in backticks, below the root or as ARCHITECTURE and the decisions write them; and all below tests/."""
    missing = []
    for page in WRITTEN:
        text = page.read_text(encoding="utf-8")
        paths = re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|toml|md|json))`", text)
        for name in [*paths, *re.findall(r"\btests/[\w./]*\w", text)]:
            bases = (ROOT, ROOT / "copra_fl", ROOT / "copra_fl" / "training")
            is_there = any((base / name).exists() for base in bases) or "NAME" in name
            if not is_there and not name.startswith(("runs/", "deployment/", "adapter/", "hospital/")):
                missing.append(f"{page.name}: {name}")
    assert missing == []


def test_the_tree_in_architecture_names_every_folder_and_no_other() -> None:
    tree = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").split("## What is where")[1].split("```")[1]
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and is_tracked(path)}
    assert set(re.findall(r"^(\w+)/ ", tree, re.MULTILINE)) == folders
    inside = {path.name for path in (ROOT / "copra_fl").iterdir() if path.is_dir() and is_tracked(path)}
    assert set(re.findall(r"^  (\w+)/ ", tree, re.MULTILINE)) == inside
    modules = {path.name for path in (ROOT / "copra_fl").glob("*.py") if path.name != "__init__.py"}
    (listed,) = re.findall(r"^  (\w+\.py[^:]*):", tree, re.MULTILINE)
    assert set(re.split(r",\s+", listed)) == modules


def is_tracked(folder: Path) -> bool:
    listed = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return bool(listed) and not folder.name.startswith(".")


def test_the_pages_that_the_sources_name_exist() -> None:
    """Paths below docs/ in code, recipes and compose files."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sources = [ROOT / name for name in listed.splitlines() if name.endswith((".py", ".toml", ".yml", ".md"))]
    dead = [
        f"{named(source)}: {name}"
        for source in sources
        if source.exists()
        for name in re.findall(r"\bdocs/[\w/-]+\.md\b", source.read_text(encoding="utf-8"))
        if not (ROOT / name).exists()
    ]
    assert dead == []


def test_every_error_class_says_what_to_do() -> None:
    """Each public exception that the library defines has a row in the reference."""
    names = set()
    for path in (ROOT / "copra_fl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any(is_exception(base) for base in node.bases):
                names |= {node.name} - {"_Federated"}  # it ends a script, and is always caught
    page = (DOCS / "reference" / "errors.md").read_text(encoding="utf-8")
    assert "ConfigError" in names and [name for name in sorted(names) if f"| `{name}` |" not in page] == []


def is_exception(base: ast.expr) -> bool:
    name = base.id if isinstance(base, ast.Name) else ""
    return name.endswith(("Error", "Exception", "RunFailed"))


def test_environment_variables_exist() -> None:
    """The variables that the pages name occur in the code or in the compose files."""
    sources = [path for folder in ("copra_fl", "clients", "server") for path in (ROOT / folder).rglob("*.py")]
    code = "".join(path.read_text(encoding="utf-8") for path in [*sources, *ROOT.glob("docker-compose*.yml")])
    for page in WRITTEN:
        for name in re.findall(r"COPRA_FL_[A-Z_]+", page.read_text(encoding="utf-8")):
            assert name.removesuffix("N") in code, f"{page.name}: {name}"


# Commands in fenced blocks.


def lines(page: str) -> Iterator[str]:
    """Yield the command lines of a page, without comments."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if command := re.split(r"\s+#", line)[0].strip():
                yield command


COMMANDS = sorted({(page, line) for page in map(named, [*PAGES, *ROOT_PAGES]) for line in lines(page)})


def runnable_commands() -> list[list[str]]:
    """Return the words of every command that runs something, which groups of commands do not."""
    commands = all_commands(root_command(), ["copra-fl"])
    return [words for words, command in commands if not isinstance(command, click.Group)]


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_can_be_parsed(page: str, line: str) -> None:
    """Programs, options, recipes, methods and keys exist; tests/test_readme.py runs the lines that name .venv/bin."""
    words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
    program, *arguments = words
    match program.rpartition("/")[2]:
        case "copra-fl":
            check_options(arguments)
        case "make":
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert re.search(rf"^{arguments[0]}:", makefile, re.MULTILINE)
        case "python":
            assert arguments[0] == "-m" and (ROOT / f"{arguments[1].replace('.', '/')}.py").exists()
        case "pre-commit":
            assert (ROOT / ".pre-commit-config.yaml").exists()
        case other:
            assert other in OTHER_PROGRAMS
    if extra := re.search(r"[\w.]\[([\w,]+)\]'", line):
        assert set(extra[1].split(",")) <= PROJECT["project"]["optional-dependencies"].keys()


def test_commands_in_sentences_exist() -> None:
    known = {words[1] for words in runnable_commands()}
    for page in WRITTEN:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        named_in_page = set(re.findall(r"`copra-fl ([a-z]+)", text))
        assert named_in_page <= known, f"{named(page)}: {named_in_page - known}"


def check_options(arguments: list[str]) -> None:
    """Fail unless click can parse the arguments, and their recipes, methods and keys exist."""
    command: click.Command = root_command()
    while isinstance(command, click.Group):
        name, *arguments = arguments
        command = command.commands[name]
    context = click.Context(command)
    values, left_over, _ = command.make_parser(context).parse_args(list(arguments))
    assert left_over == []
    required = [parameter.name for parameter in command.params if parameter.required]
    assert [name for name in required if not values.get(name)] == []
    for setting in values.get("set_") or []:
        assert setting.partition("=")[0] in KEYS, setting
    experiments = ROOT / "experiments"
    recipe = str(values.get("recipe") or "base")
    assert recipe.endswith(".toml") or (experiments / f"{recipe}.toml").exists()
    for method in re.split(r"[,+]", str(values.get("methods") or "all")):
        assert method == "all" or method.endswith(".toml") or (experiments / "methods" / f"{method}.toml").exists()


@pytest.mark.parametrize("page", [page for page in map(named, PAGES) if blocks(page, "toml")])
def test_settings_in_toml_blocks_exist(page: str) -> None:
    """In tables of a study the last part of a key is a setting, or a key of its tuning."""
    for block in blocks(page, "toml"):
        keys = {key.rpartition(".")[2] if key.startswith("study.") else key for key in flatten(tomllib.loads(block))}
        assert keys - KEYS - set(TUNING_KEYS) - POLICY_KEYS.keys() == set()


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as dotted keys, as Flower does."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def test_keys_that_the_pages_set_exist() -> None:
    """Settings in backticks such as `rank = 8` or `dp-clip > 0`, outside of tables of other programs."""
    for page in [*PAGES, *ROOT_PAGES]:
        for key in re.findall(r"`([a-z][a-z0-9.-]+) (?:=|>) [^`]+`", page.read_text(encoding="utf-8")):
            assert key in KEYS or key in POLICY_KEYS or "labels" in key, f"{page.name}: {key}"
