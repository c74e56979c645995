"""The wheel: one import name, the Flower app inside, and an installed copy that runs from any folder."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.supercore.fab_format_version import normalize_and_validate_fab_format

from copra_fl.simulation.superlink import copy_app
from tests.support.real_runs import RealRun, settings

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(target), str(ROOT)]
    subprocess.run(command, check=True)
    return next(target.glob("*.whl"))


def test_the_wheel_claims_one_import_name_and_carries_the_app(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"copra_fl"}
    carried = {name.removeprefix("copra_fl/_app/") for name in names if name.startswith("copra_fl/_app/")}
    assert carried >= {"pyproject.toml", "clients/app.py", "server/app.py"}
    assert carried >= {"docker-compose.yml", "docker-compose.gpu.yml"}
    assert "copra_fl/reporting/html.html.j2" in names
    patterns = ("*.toml", "methods/*.toml", "bench/*.toml", "bench/*.py")
    needed = {str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "experiments").glob(pattern)}
    assert {name for name in carried if name.startswith("experiments/")} == needed


def test_wheel_source_archive_and_flower_app_carry_the_license(wheel: Path, tmp_path: Path) -> None:
    license_text = (ROOT / "LICENSE").read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        places = [name for name in archive.namelist() if Path(name).name == "LICENSE"]
        assert [archive.read(name) for name in places] == [license_text] * 2  # .dist-info/licenses and _app
    build = [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as sources:
        names = {name.split("/", 1)[1] for name in sources.getnames()}
        member = sources.extractfile(next(name for name in sources.getnames() if name.endswith("/LICENSE")))
        assert member is not None and member.read() == license_text
    assert names >= {"pyproject.toml", "clients/app.py", "tests/test_packaging.py", "experiments/LOG.md"}
    assert not [name for name in names if name.startswith(("docs/images", "experiments/results")) or ".whl" in name]
    copy_app(tmp_path / "app")
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(tmp_path / "app"))) as app:
        assert app.read("LICENSE") == license_text
        metadata = normalize_and_validate_fab_format(tomllib.loads(app.read("pyproject.toml").decode()))
    assert metadata.fab_format_version == 1
    assert f"flwr=={metadata.flwr_version_target}\n" in (ROOT / "constraints.txt").read_text(), "the tested release"


@pytest.mark.slow
def test_an_installed_copy_runs_from_another_directory(wheel: Path, tiny: dict, tmp_path: Path) -> None:
    """A new virtual environment with the wheel; the dependencies are those of this environment."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    scripts = tmp_path / "venv" / "bin"
    python = scripts / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    packages = next((tmp_path / "venv" / "lib").glob("python3*")) / "site-packages"
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    for script in Path(sys.executable).parent.glob("fl*"):  # Flower's own: flwr, flower-superlink, flwr-simulation ...
        body = script.read_text().split("\n", 1)[1]
        (scripts / script.name).write_text(f"#!{python}\n{body}")
        (scripts / script.name).chmod(0o755)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = subprocess.run([python, "-c", "import copra_fl; print(copra_fl.__file__)"], cwd=elsewhere,
                           capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert where.startswith(str(packages))
    arguments = ["simulate", *settings(tiny | {"num-rounds": 1}), "--output", str(tmp_path / "run")]
    arguments += ["--workers", "1", "--json"]
    out, _ = RealRun(arguments, elsewhere, script=str(scripts / "copra-fl")).finish()
    assert json.loads(out)["rounds"] == 1
    assert list(elsewhere.iterdir()) == []
