"""The wheel and the editable install bring the `.pth` line and the entry point, and take them away again."""

import configparser
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[2]
LINE = (ROOT / "moa_startup" / "moa_startup.pth").read_text()
KINDS = {"wheel": "standard", "editable": "editable"}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Kind of installation -> the wheel that an installer makes for it, built without network."""
    folder = tmp_path_factory.mktemp("wheels")
    made = {}
    for kind, version in KINDS.items():
        (made[kind],) = WheelBuilder(str(ROOT)).build(directory=str(folder / kind), versions=[version])
    return made


@pytest.fixture
def environment(tmp_path):
    """A virtual environment without pip, its Python a link: (that Python, its site-packages with one file in it)."""
    folder = tmp_path / "environment"
    venv.create(folder, symlinks=True)
    paths = sysconfig.get_paths("venv", vars={"base": str(folder), "platbase": str(folder)})
    (Path(paths["purelib"]) / "neighbour.py").touch()
    return Path(paths["scripts"]) / "python", Path(paths["purelib"])


def pip(python, target, *arguments):
    """Runs this environment's pip for the environment of the interpreter `target`."""
    python("-m", "pip", "--python", target, "--quiet", "--disable-pip-version-check", *arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wheel_has_the_line_and_the_entry_point(wheels, kind):
    with zipfile.ZipFile(wheels[kind]) as wheel:
        names = wheel.namelist()
        points = configparser.ConfigParser()
        points.read_string(wheel.read(next(n for n in names if n.endswith("/entry_points.txt"))).decode())
        assert wheel.read("moa_startup.pth").decode() == LINE
    assert dict(points["lm_eval.models"]) == {"moa": "moa_eval.harness:MoALM"}
    assert sorted(points.sections()) == ["lm_eval.models"]
    packages = {name.split("/")[0] for name in names if name.endswith("/__init__.py")}
    assert packages == (set() if kind == "editable" else {p.parent.name for p in ROOT.glob("moa_*/__init__.py")})
    assert len(names) == len(set(names)) and "moa_startup/moa_startup.pth" not in names
    others = [name for name in names if name.endswith(".pth") and name != "moa_startup.pth"]
    assert all(name < "moa_startup.pth" for name in others), (
        "Python reads .pth files in this order; the path comes first"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_install_use_uninstall(python, wheels, environment, kind):
    target, packages = environment
    pip(python, target, "install", "--no-index", "--no-deps", wheels[kind])
    started = python("-c", "import sys; print('moa_startup' in sys.modules, sys.meta_path[0])", executable=target)
    assert (started.stdout, started.stderr) == ("True <class 'moa_startup._Watch'>\n", "")

    libraries = packages / "libraries.pth"  # lm-eval and the rest, from this test's own environment
    libraries.write_text(sysconfig.get_path("purelib"))
    code = """
import sys, importlib.metadata, lm_eval.models
from lm_eval.api.registry import model_registry
(point,) = {p for p in importlib.metadata.entry_points(group="lm_eval.models") if p.name == "moa"}
print("moa" in model_registry, point.value, sys.modules["moa_startup"].__file__)
"""
    found = python("-W", "error::RuntimeWarning", "-c", code, executable=target).stdout.split()
    home = ROOT if kind == "editable" else packages
    assert found == ["True", "moa_eval.harness:MoALM", str(home / "moa_startup" / "__init__.py")]
    libraries.unlink()

    pip(python, target, "uninstall", "--yes", "mixture-of-activations")
    assert [path.name for path in packages.rglob("*")] == ["neighbour.py"]
    gone = python("-c", "import sys; print('moa_startup' in sys.modules)", executable=target)
    assert (gone.stdout, gone.stderr) == ("False\n", "")


def test_this_environment_is_installed_by_the_present_pyproject():
    """The other tests here see the hook that an installation put beside the packages: it is this tree's."""
    installed = Path(sysconfig.get_path("purelib")) / "moa_startup.pth"
    assert installed.read_text() == LINE, "install again: pip install -e '.[dev]'"
    assert sys.modules["moa_startup"].__file__ == str(ROOT / "moa_startup" / "__init__.py")
