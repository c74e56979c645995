"""The defaults in pyproject.toml, which Flower reads: ``python -m tests.support.defaults`` renews them."""

from __future__ import annotations

from pathlib import Path

from copra_fl.cli.config import all_keys
from copra_fl.config import PARAMETERS, toml_value

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
TABLE = "[tool.flwr.app.config]\n"
#: keys of the server app that are not configuration keys of a run
APP_KEYS = {"output": "", "resume": False, PARAMETERS: ""}


def with_defaults(pyproject: str) -> str:
    """Return the text of pyproject.toml with `TABLE` replaced by the defaults of all configuration keys."""
    head, _, rest = pyproject.partition(TABLE)
    _, _, tail = rest.partition("\n\n")
    defaults = APP_KEYS | {name: key.default for name, key in all_keys().items()}
    lines = "".join(f"{name} = {toml_value(value)}\n" for name, value in defaults.items())
    return f"{head}{TABLE}{lines}\n{tail}"


if __name__ == "__main__":
    PYPROJECT.write_text(with_defaults(PYPROJECT.read_text(encoding="utf-8")), encoding="utf-8")
