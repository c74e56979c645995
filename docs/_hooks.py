"""Fill the reference pages from the code. MkDocs runs this file (`hooks` in mkdocs.yml) with the library importable.

A page marks a place with ``<!-- generated: NAME -->``; the function of that name in `GENERATED` writes the content.
"""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import typer.main

import copra_fl
from copra_fl.aggregation import rule, rules
from copra_fl.cli import app
from copra_fl.cli.config import all_keys
from copra_fl.config import Key
from copra_fl.data.partition import Partitioner, Pool
from copra_fl.models.export import SavedModel
from copra_fl.records import RoundRecord
from copra_fl.reporting import frames
from copra_fl.reporting.results import Comparison, Run
from copra_fl.reporting.statistics import round_metrics
from copra_fl.sources.assets import Asset
from copra_fl.tasks import Task

ROOT = Path(__file__).parent.parent
EXPERIMENTS = ROOT / "experiments"
MARKER = re.compile(r"^<!-- generated: ([\w-]+) -->$", re.MULTILINE)
PUBLIC = ("simulate", "compare", "load_run", "load_comparison", "load", "Config", "CopraCallback")
SECTIONS = {
    "data": "Data",
    "model": "Model",
    "copra": "CopRA",
    "training": "Local training",
    "federation": "Federation",
    "aggregation": "Aggregation",
    "privacy": "Differential privacy",
    "evaluation": "Evaluation",
}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace every marker of a page with the content generated for it. Raises KeyError for an unknown marker."""
    return MARKER.sub(lambda marker: GENERATED[marker[1]](), markdown)


def configuration() -> str:
    """Return one table of configuration keys per section, and one per rule with parameters."""
    rows: dict[str, list[list[str]]] = {}
    for key in all_keys().values():
        cells = [f"`{key.name}`{{ #{key.name} }}", shown(key.default), allowed(key), prose(key.doc)]
        rows.setdefault(SECTIONS.get(key.owner) or f"Rule `{key.owner}`", []).append(cells)
    header = ["key", "default", "allowed values", "meaning"]
    return "\n\n".join(f"## {owner}\n\n{table(header, cells)}" for owner, cells in rows.items())


def allowed(key: Key) -> str:
    """Return the values that a key accepts."""
    if key.choices:
        choices = ", ".join(f"`{choice}`" for choice in key.choices)
        return f"{choices}, or [a plugin](../how-to/plugins.md)" if key.plugins else choices
    return key.allowed


def commands() -> str:
    """Return a section per command: usage, help and a table of its arguments and options."""
    return "\n\n".join(command_section(path, command) for path, command in all_commands(root_command(), ["copra-fl"]))


def root_command() -> click.Group:
    """Return the command line as click sees it."""
    command = typer.main.get_command(app)
    assert isinstance(command, click.Group)
    return command


def all_commands(group: click.Group, path: list[str]) -> Iterator[tuple[list[str], click.Command]]:
    """Yield the words and the command of every command below `group` that runs something."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from all_commands(command, [*path, name])
        else:
            yield [*path, name], command


def command_section(path: list[str], command: click.Command) -> str:
    """Return heading, usage, help and parameters of one command."""
    parameters = [parameter for parameter in command.params if parameter.name != "help"]
    arguments = " ".join(name(parameter) for parameter in parameters if isinstance(parameter, click.Argument))
    usage = " ".join(filter(None, [*path, "[OPTIONS]", arguments]))
    rows = [
        [f"`{name(parameter)}`", default_of(parameter), prose(getattr(parameter, "help", None) or "")]
        for parameter in parameters
    ]
    listing = table(["argument or option", "default", "meaning"], rows) if rows else ""
    examples = "\n".join((command.epilog or "").split("\n\n")[1:])
    shown = f"\n\n```bash\n{examples}\n```" if examples else ""
    return f"## {' '.join(path)}\n\n```text\n{usage}\n```\n\n{inspect.cleandoc(command.help or '')}\n\n{listing}{shown}"


def name(parameter: click.Parameter) -> str:
    """Return a parameter as it is typed, with the kind of its value."""
    if isinstance(parameter, click.Argument):
        return parameter.metavar or (parameter.name or "").upper()
    flags = "/".join([max(parameter.opts, key=len), *parameter.secondary_opts])
    if getattr(parameter, "is_flag", False) or parameter.secondary_opts:
        return flags
    if isinstance(parameter.type, click.Choice):
        return f"{flags} {'|'.join(str(getattr(choice, 'value', choice)) for choice in parameter.type.choices)}"
    return f"{flags} {parameter.metavar or parameter.type.name.upper().removesuffix(' RANGE')}"


def default_of(parameter: click.Parameter) -> str:
    """Return a parameter's default; "required" where the user must give a value."""
    if parameter.required:
        return "required"
    default = getattr(parameter.default, "value", parameter.default)
    return "" if default in (None, False, "", ()) or "UNSET" in repr(default).upper() else shown(default)


def methods() -> str:
    """Return a table of the methods in experiments/methods."""
    files = sorted((EXPERIMENTS / "methods").glob("*.toml"))
    rows = [[f"`{path.stem}`", settings(path), prose(comment(path))] for path in files]
    return table(["method", "settings", "what it is"], rows)


def recipes() -> str:
    """Return a table of the recipes in experiments."""
    rows = [[f"`{path.stem}`", prose(comment(path))] for path in sorted(EXPERIMENTS.glob("*.toml"))]
    return table(["recipe", "what it runs"], rows)


def comment(path: Path) -> str:
    """Return the first paragraph of the comment that a TOML file begins with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next((number for number, line in enumerate(lines) if not line.strip("# ")), len(lines))
    return " ".join(line.removeprefix("#").strip() for line in lines[:end] if line.startswith("#"))


def settings(path: Path) -> str:
    """Return the settings of a method file, separated by commas."""
    flat = flatten(tomllib.loads(path.read_text(encoding="utf-8")))
    return ", ".join(f"`{key} = {value!r}`" for key, value in flat.items()).replace("'", '"')


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def api() -> str:
    """Return the mkdocstrings blocks of what `copra_fl` exports."""
    exported = [getattr(copra_fl, public) for public in PUBLIC]
    return "\n\n".join(block(identifier(thing)) for thing in exported)


def results_api() -> str:
    """Return the mkdocstrings blocks of results and of the frames that they give."""
    shown = (Run, Comparison, frames.history, frames.clients, round_metrics, RoundRecord, SavedModel)
    return "\n\n".join(map(block, map(identifier, shown)))


def task_api() -> str:
    """Return the mkdocstrings block of the class that a task subclasses."""
    return block(identifier(Task))


def partitioner_api() -> str:
    """Return the mkdocstrings blocks of the classes that a partitioner of one's own uses."""
    return "\n\n".join(map(block, map(identifier, (Partitioner, Pool))))


def asset_api() -> str:
    """Return the mkdocstrings block of an asset."""
    return block(identifier(Asset))


def rule_api() -> str:
    """Return the mkdocstrings blocks of the rule interface and of every rule."""
    modules = sorted(f"{rules.__name__}.{known.name.replace('-', '_')}" for known in rules.RULES)
    return "\n\n".join([block(rule.__name__, heading=False), "## The rules", *(block(module) for module in modules)])


def identifier(thing: Any) -> str:
    """Return the dotted name under which mkdocstrings finds a class or a function."""
    return f"{thing.__module__}.{thing.__qualname__}"


def block(dotted: str, heading: bool = True) -> str:
    """Return a mkdocstrings block."""
    return f"::: {dotted}" + ("" if heading else "\n    options:\n      show_root_heading: false")


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in lines)


def shown(value: Any) -> str:
    """Return a default as TOML writes it."""
    return "empty" if value == "" else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def prose(text: str) -> str:
    """Return `text` on one line, with the documentation pages that it names as links."""
    return re.sub(r"docs/([\w/-]+)\.md", link, " ".join(text.split())).replace("<", "&lt;")


def link(path: re.Match[str]) -> str:
    """Return a link to a documentation page; the path as it is if there is no such page."""
    page = ROOT / path[0]
    if not page.exists():
        return path[0]
    return f"[{page.read_text(encoding='utf-8').splitlines()[0].removeprefix('# ')}](../{path[1]}.md)"


GENERATED: dict[str, Callable[[], str]] = {
    "configuration": configuration,
    "commands": commands,
    "methods": methods,
    "recipes": recipes,
    "api": api,
    "results-api": results_api,
    "task-api": task_api,
    "partitioner-api": partitioner_api,
    "asset-api": asset_api,
    "rule-api": rule_api,
}
