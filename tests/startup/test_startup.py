"""The hook itself: its cost, what it leaves alone, how it fails. Stand-ins for lm-eval and timm keep this fast."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINE = (ROOT / "moa_startup" / "moa_startup.pth").read_text()
REGISTRY = """
class Registry(dict):
    def register(self, name, target):
        assert name not in self
        self[name] = target

model_registry = Registry()
"""
MODELS = "from lm_eval.api.registry import model_registry\nmodel_registry.register('hf', target='lm_eval:HFLM')\n"


@pytest.fixture
def stand_ins(tmp_path):
    """A folder with an `lm_eval` whose registry is a dictionary, an empty `timm` and an empty `moa_vision`."""
    files = {
        "lm_eval/__init__.py": "",
        "lm_eval/api/__init__.py": "",
        "lm_eval/api/registry.py": REGISTRY,
        "lm_eval/models/__init__.py": MODELS,
        "timm/__init__.py": "value = 1\n",
        "moa_vision/__init__.py": "",
        "moa_vision/vit.py": "",
    }
    for name, text in files.items():
        (tmp_path / "stand_ins" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "stand_ins" / name).write_text(text)
    return tmp_path / "stand_ins"


SHOW = "\nfrom lm_eval.api.registry import model_registry; print(sorted(model_registry.items()))"
THEIRS = "[('hf', 'lm_eval:HFLM')]\n"
BOTH = "[('hf', 'lm_eval:HFLM'), ('moa', 'moa_eval.harness:MoALM')]\n"


def test_a_start_loads_one_small_module(python):
    code = "import sys, json; print(json.dumps([list(sys.modules), sys.path, len(sys.meta_path)]))"
    modules, path, finders = json.loads(python("-c", code).stdout)
    off_modules, off_path, off_finders = json.loads(python("-c", code, MOA_STARTUP="0").stdout)
    ours = {name for name in modules if name.split(".")[0].startswith("moa_")}
    assert ours == {"moa_startup"}
    assert (modules, path, finders) == (off_modules, off_path, off_finders + 1)
    assert not {"torch", "timm", "transformers", "lm_eval", "numpy", "typing"} & set(modules)


def test_names_are_registered_once_and_the_loader_is_restored(python, stand_ins):
    code = """
import importlib.machinery, sys
import lm_eval.models
loader = lm_eval.models.__loader__
assert type(loader) is importlib.machinery.SourceFileLoader and loader is lm_eval.models.__spec__.loader
assert set(vars(loader)) == {"name", "path"}
assert lm_eval.models.__spec__ == importlib.machinery.PathFinder.find_spec("lm_eval.models", lm_eval.__path__)
assert "moa_eval" not in sys.modules
"""
    assert python("-W", "error", "-c", code + SHOW, path=stand_ins).stdout == BOTH


WAYS = {
    "installed-twice": """
import moa_startup, lm_eval.models, sys
moa_startup.install()
assert sys.meta_path.count(moa_startup._Watch) == 1""",
    "reloaded": """
import importlib, lm_eval.models
from lm_eval.api.registry import model_registry
del model_registry["hf"]
assert importlib.reload(lm_eval.models) is lm_eval.models""",
    "threads": """
import importlib, concurrent.futures
with concurrent.futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(importlib.import_module, ["lm_eval.models", "timm", "wave", "cmd"] * 8))""",
}


@pytest.mark.parametrize("way", WAYS)
def test_it_works_in_every_way_of_importing(python, stand_ins, way):
    process = python("-W", "error", "-c", WAYS[way] + SHOW, path=stand_ins)
    assert (process.stdout, process.stderr) == (BOTH, "")


def test_modules_imported_before_the_hook_are_served(python, stand_ins):
    code = """
import lm_eval.models, sys
assert "moa_startup" not in sys.modules
import moa_startup
moa_startup.install()"""
    assert python("-S", "-c", code + SHOW, path=f"{stand_ins}:{ROOT}").stdout == BOTH


def test_a_name_that_is_taken_stays(python, stand_ins):
    (stand_ins / "lm_eval/models/__init__.py").write_text(MODELS.replace("'hf'", "'moa'"))
    process = python("-W", "error", "-c", "import lm_eval.models" + SHOW, path=stand_ins)
    assert (process.stdout, process.stderr) == ("[('moa', 'lm_eval:HFLM')]\n", "")


def test_lm_eval_that_reads_entry_points_is_not_patched(python, stand_ins):
    registry = stand_ins / "lm_eval/api/registry.py"
    registry.write_text(REGISTRY + "def load_plugins(group, registry): ...\n")
    assert python("-c", "import lm_eval.models" + SHOW, path=stand_ins).stdout == THEIRS


@pytest.mark.parametrize("off", ["-S", "MOA_STARTUP"])
def test_switched_off(python, stand_ins, off):
    arguments, variables = (["-S"], {}) if off == "-S" else ([], {"MOA_STARTUP": "0"})
    process = python(*arguments, "-c", "import timm, lm_eval.models" + SHOW, path=stand_ins, **variables)
    assert (process.stdout, process.stderr) == (THEIRS, "")


@pytest.mark.parametrize("flags", [[], ["-W", "error"]], ids=["warned", "warnings-are-errors"])
def test_failed_registration_is_a_warning(python, stand_ins, flags):
    (stand_ins / "moa_vision/vit.py").write_text("raise OSError('half a file')")
    process = python(*flags, "-c", "import timm; print(timm.value)", path=stand_ins)
    assert process.stdout == "1\n"
    assert re.search("RuntimeWarning: .*not registered with timm: .*half a file.*MOA_STARTUP=0", process.stderr)
    assert "Traceback" not in process.stderr


def test_error_of_the_library_is_raised_unchanged(python, stand_ins):
    """The import raises what it raises without the hook, and can be tried again."""
    models = stand_ins / "lm_eval/models/__init__.py"
    models.write_text(f"import sys\nif not hasattr(sys, 'again'):\n    raise OSError('no disk')\n{MODELS}")
    code = "import sys\ntry:\n    import lm_eval.models\nexcept OSError as error:\n    sys.again = str(error)\n"
    assert python("-c", code + "import lm_eval.models" + SHOW, path=stand_ins).stdout == BOTH


def test_a_package_that_is_gone_or_broken_is_silent(python, tmp_path):
    """What is left of it must not put an error on every start of Python."""
    for broken in (None, "raise RuntimeError('half a file'", "def install():\n    raise OSError\n"):
        folder = tmp_path / f"broken{len(broken or '')}" / "moa_startup"
        if broken:
            folder.mkdir(parents=True)
            (folder / "__init__.py").write_text(broken)
        line = (
            f"import sys; sys.path[:0] = [{str(folder.parent)!r}] if {bool(broken)} else []; exec({LINE!r}); print(1)"
        )
        process = python("-S", "-c", line)
        assert (process.stdout, process.stderr) == ("1\n", "")
