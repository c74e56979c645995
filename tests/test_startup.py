"""Start of the processes of a run: they import no more than they need, and torch's threads sleep while they wait."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from copra_fl import startup
from copra_fl.config import Config


def printed_by(code: str) -> str:
    """Return the standard output of a new process of a run, in which nobody has set OMP_WAIT_POLICY."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= startup.environment([Config()])
    root = Path(__file__).parent.parent
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_the_apps_import_nothing_large() -> None:
    assert printed_by("import sys, clients.app, server.app; print({'torch', 'peft'} & sys.modules.keys())") == "set()"


def test_the_server_app_is_imported_while_flower_removes_a_folder_from_sys_path() -> None:
    """Flower's main thread does so while the app's thread imports; here a finder does it at the worst moment."""
    code = """
import os, sys, sysconfig
removed = []
class Meddler:
    def find_spec(self, name, target=None):
        if name == 'copra_fl' and not removed:
            removed.append(sys.path.pop(0))
def meddle(path):
    if path != '/meddler':
        raise ImportError
    return Meddler()
import flwr.app, flwr.serverapp
sys.path_hooks.insert(0, meddle)
root, packages = os.getcwd(), sysconfig.get_paths()['purelib']
others = [path for path in sys.path if path not in ('', root, packages)]
sys.path[:] = ['/of-flower', *others, packages, '/meddler', root]
sys.path_importer_cache.clear()
import server.app
print(removed, server.app.logs.__name__)
"""
    assert printed_by(code) == "['/of-flower'] copra_fl.logs"


@pytest.mark.parametrize("module", ["clients.handlers", "server.runs"])
def test_a_process_imports_what_it_needs_and_its_threads_sleep_at_barriers(module: str) -> None:
    """Each of these modules would add a second or 40 MB. Garbage collection is on again after the imports."""
    code = f"""
import {module}, gc, os, sys
print(os.environ['OMP_WAIT_POLICY'], gc.isenabled(), gc.get_freeze_count() > 1e5)
print({{'bitsandbytes.nn', 'scipy.optimize', 'pandas', 'datasets', 'plotly', 'ray'}} & sys.modules.keys())
from transformers.loss.loss_for_object_detection import linear_sum_assignment
print(*linear_sum_assignment([[9, 1, 9], [1, 9, 9], [9, 9, 1]])[1])
"""
    assert printed_by(code).splitlines() == ["PASSIVE True True", "set()", "1 0 2"]


@pytest.mark.parametrize(
    "settings", [{"quantization": "4bit"}, {"engine": "trainer", "script": "train.py"}, {"rule": "hospital.rules:OWN"}]
)
def test_nothing_is_hidden_from_runs_that_may_need_it(settings: dict[str, str]) -> None:
    configs = [Config(), Config.from_flat(settings)]
    assert startup.environment(configs[:1]) == {startup.HIDDEN: "bitsandbytes"}
    assert startup.environment(configs) == {}


def test_other_parts_of_a_deferred_module_are_imported_at_once() -> None:
    code = """
import sys
from copra_fl.startup import deferred
with deferred('scipy.optimize', 'linear_sum_assignment'):
    from scipy.optimize._linesearch import line_search_wolfe1
    from scipy.optimize import linear_sum_assignment
    print('scipy.optimize._optimize' in sys.modules)
    from scipy.optimize import brentq
print(round(brentq(lambda x: x * x - 4, 0, 9), 6), 'scipy.optimize._optimize' in sys.modules)
"""
    assert printed_by(code).splitlines() == ["False", "2.0 True"]


@pytest.mark.parametrize("command", ["--help", "simulate --help", "deploy run --help", "probe shapley --help"])
def test_help_imports_nothing_large(command: str) -> None:
    """`--help` answers in a third of a second; each of these modules would add seconds."""
    large = {"torch", "pandas", "numpy", "scipy", "flwr", "ray", "plotly", "pydantic", "cryptography"}
    code = (
        f"import sys; sys.argv = ['copra-fl', *{command.split()}]\n"
        "from copra_fl.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: print('code', end.code)\n"
        f"print({large} & sys.modules.keys())"
    )
    assert printed_by(code).splitlines()[-2:] == ["code 0", "set()"]


@pytest.mark.parametrize("has_arguments", [True, False])
def test_flwr_waits_for_its_arguments_and_ends_without_them(has_arguments: bool, tmp_path: Path) -> None:
    log = tmp_path / "flower.log"
    log.write_text("before\n")
    line = json.dumps([["--version"], str(log)]) + "\n" if has_arguments else ""
    command = [sys.executable, "-m", "copra_fl.simulation.waiting_flwr"]
    ended = subprocess.run(command, input=line, capture_output=True, text=True, check=True)
    assert ended.stdout == ended.stderr == ""
    assert log.read_text() == "before\n" + f"Flower version: {version('flwr')}\n" * has_arguments
