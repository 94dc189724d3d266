"""Sweeps: what they expand to, and what becomes of them when runs fail, diverge, are stopped or killed."""

import fcntl
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from moa_train.config import RESUME_MUTABLE_KEYS
from moa_train.signals import EXIT_STOPPED
from moa_train.sweep.board import Board, LiveBoard, one_line
from moa_train.sweep.command import main
from moa_train.sweep.grid import PlannedRun, expand, parse_seeds, parse_settings, short, split_values
from moa_train.sweep.local import open_log, slot_environments
from moa_train.sweep.slurm import stop_signal
from moa_train.sweep.state import Job, Progress, observe, time_left_s

ROOT = Path(__file__).parents[2]

STAND_IN = '''
"""A training script whose runs cost nothing: two steps an epoch, a row a step, everything that can go wrong."""

import json, os, signal, sys, time
from dataclasses import dataclass, field

import yaml

from moa_train.config import EpochSchedule, RunConfig, as_tree, parse_config
from moa_train.errors import require
from moa_train.signals import EXIT_STOPPED, StopRequests


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """A run.

    Args:
        schedule: How long.
        trouble: What happens in the second step, or after the first.
        step_s: Seconds that a step lasts.
        words: Any text.
    """

    schedule: EpochSchedule = field(default_factory=EpochSchedule)
    trouble: str = "none"
    step_s: float = 0.0
    words: str = ""

    def __post_init__(self):
        super().__post_init__()
        require("step_s", self.step_s, self.step_s >= 0, "0 or above")


def wait_for_a_stop(stop):
    deadline = time.monotonic() + 600
    while not stop.received and time.monotonic() < deadline:
        time.sleep(0.01)


def main(arguments):
    config = parse_config(Config, arguments, program="train.py", summary="A stand-in.")
    steps = int(2 * config.schedule.epochs)
    config.folder.mkdir(parents=True, exist_ok=True)
    (config.folder / "config.yaml").write_text(yaml.safe_dump(as_tree(config)))
    (config.folder / "env.json").write_text(json.dumps({"total_steps": steps}))
    metrics = config.folder / "metrics.jsonl"
    begin = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    print(f"begins at {begin}, threads {os.environ.get('OMP_NUM_THREADS')}", flush=True)

    def write(step, loss):
        row = {"kind": "train", "step": step, "epoch": step / 2, "samples": 600 * step, "wall_s": 60.0 * step}
        with metrics.open("a") as file:
            file.write(json.dumps({**row, "loss": loss, "grad_norm": 1.0, "throughput": 10.0}) + "\\n")

    def end(status):
        (config.folder / "summary.json").write_text(json.dumps({"status": status}))

    with StopRequests() as stop:
        for step in range(begin, steps):
            time.sleep(config.step_s)
            if stop.received:
                end("stopped")
                return EXIT_STOPPED
            if step == 1 and config.trouble == "diverges":
                write(2, None)
                end("stopped")
                return 1
            if step == 1 and config.trouble == "fails":
                raise RuntimeError("the disk is full")
            if step == 1 and config.trouble == "is killed" and begin == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            write(step + 1, 1 / (step + 1))
            if step == 1 and config.trouble == "stops the sweep":
                os.kill(os.getppid(), signal.SIGTERM)
                wait_for_a_stop(stop)
            if step == 0 and config.trouble == "waits" and begin == 0:
                wait_for_a_stop(stop)
        end("finished")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
'''

REPORT = """
import json, sys
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
(out / "report.json").write_text(json.dumps(sys.argv[1:]))
"""

ENTRY = """
import sys
from pathlib import Path
from moa_train.config import RESUME_MUTABLE_KEYS
from moa_train.sweep.command import main
here = Path(__file__).parent
report = [sys.executable, str(here / "report.py")]
sys.exit(main(sys.argv[1:], script=here / "train.py", report=report, mutable_keys=lambda: RESUME_MUTABLE_KEYS))
"""


class Sweeps:
    """Sweeps of two configs, "one" and "two", in a folder of their own, which is the working directory."""

    def __init__(self, folder):
        self.folder = folder
        for name, text in {"train.py": STAND_IN, "report.py": REPORT, "sweep.py": ENTRY}.items():
            (folder / name).write_text(text)
        for name in ("one", "two"):
            (folder / f"{name}.yaml").write_text(f"name: {name}\nschedule: {{epochs: 2}}\n")

    def __call__(self, *arguments, configs=("one", "two")):
        """Run a sweep in this process; return its exit code."""
        return main(
            [*self.configs(configs), *arguments],
            script=self.folder / "train.py",
            report=[sys.executable, str(self.folder / "report.py")],
            mutable_keys=lambda: RESUME_MUTABLE_KEYS,
        )

    def configs(self, names):
        return ["--config", *(f"{name}.yaml" for name in names), "--out", "runs"]

    def log(self, name):
        return (self.folder / "runs" / "logs" / f"{name}.log").read_text()

    def steps(self, name):
        lines = (self.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["step"] for line in lines]

    def reported(self):
        """Return the arguments of the last report."""
        return json.loads((self.folder / "reports" / "runs" / "report.json").read_text())


@pytest.fixture
def sweeps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return Sweeps(tmp_path)


# What a sweep expands to

NUMBERS = st.floats(1e-9, 1e9, allow_nan=False).map(repr)
TEXTS = st.text(
    st.characters(codec="utf-8", exclude_characters=",'\"[]{}()=\n\r", exclude_categories=["Z", "C"]), min_size=1
)
KEYS = st.lists(st.from_regex(r"\A[a-z]{1,3}(\.[a-z]{1,3}){0,2}\Z"), min_size=0, max_size=3, unique=True)


@pytest.fixture(scope="module")
def two_configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    paths = [folder / "a.yaml", folder / "b.yaml"]
    for path in paths:
        path.write_text("")
    return paths


@settings(max_examples=50, deadline=None)
@given(data=st.data(), keys=KEYS, seeds=st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True))
def test_expansion_is_the_product_with_names_of_their_own(two_configs, data, keys, seeds):
    keys = [key for key in keys if key not in ("name", "seed", "out", "config")]
    given_values = {}
    for key in keys:
        values = data.draw(st.lists(st.one_of(NUMBERS, TEXTS), min_size=1, max_size=3))
        given_values[key] = list({short(value) or value: value for value in values}.values())
    parsed = parse_settings(f"{key}={','.join(values)}" for key, values in given_values.items())
    assert {key: list(values) for key, values in parsed.items()} == given_values
    runs = expand(two_configs, parsed, seeds, out=Path("runs"))

    sizes = [len(values) for values in given_values.values()]
    expected = 2 * len(seeds)
    for size in sizes:
        expected *= size
    assert len(runs) == expected
    assert len({(run.config, *run.settings.values(), run.seed) for run in runs}) == expected
    assert len({run.name for run in runs}) == expected
    assert all(re.fullmatch(r"[A-Za-z0-9_.+-]+", run.name) for run in runs)
    assert [run.seed for run in runs] == sorted((run.seed for run in runs), key=seeds.index)  # seed outermost
    assert [run.config for run in runs] == two_configs * (expected // 2)  # config innermost


def test_names_and_arguments(sweeps):
    parsed = parse_settings(["optim.lr=0.0003,1.2E-3", "words=[a, b],'c,d'"])
    runs = expand([Path("one.yaml")], parsed, (0, 5), out=Path("runs/x"), extra=["--schedule.epochs", "3"])
    assert [run.name for run in runs[:4]] == [
        "one_lr3e-4_wordsa-b_s0",
        "one_lr3e-4_wordsc-d_s0",
        "one_lr1.2e-3_wordsa-b_s0",
        "one_lr1.2e-3_wordsc-d_s0",
    ]
    assert runs[1].folder == Path("runs/x/one_lr3e-4_wordsc-d_s0")
    assert runs[1].arguments == [
        *("--config", "one.yaml", "--schedule.epochs", "3", "--optim.lr=0.0003", "--words=c,d"),
        *("--name=one_lr3e-4_wordsc-d_s0", "--seed=0", "--out=runs/x"),
    ]


@pytest.mark.parametrize(
    ("given_text", "label"),
    {
        "0.0003": "3e-4",
        "3.0E-4": "3e-4",
        "1.2e-3": "1.2e-3",
        "0.05": "0.05",
        "5e-2": "0.05",
        "64": "64",
        "1000": "1000",
        "1e7": "1e7",
        "-2.5e-5": "-2.5e-5",
        "0.0": "0",
        "true": "",
        "": "",
    }.items(),
)
def test_numbers_have_one_short_form(given_text, label):
    assert short(given_text) == label
    assert not label or float(label) == float(given_text)


def test_values_that_would_look_alike_are_told_apart(sweeps):
    names = [run.name for run in expand([Path("one.yaml")], {"words": ("a/b", "a b", "c")}, (0,))]
    assert len(set(names)) == 3 and names[2] == "one_wordsc_s0"
    assert all(re.fullmatch(r"one_wordsa-b-[0-9a-f]{6}_s0", name) for name in names[:2])


def test_runs_that_would_share_a_name_are_told_apart(sweeps):
    runs = expand([Path("one.yaml")], {"x": ("1", "1_y2"), "y": ("3", "2_y3")}, (0,))
    names = [run.name for run in runs]
    assert names[0] == "one_x1_y3_s0" and names[3] == "one_x1_y2_y2_y3_s0"
    assert names[1] != names[2] and all(name.startswith("one_x1_y2_y3_s0-") for name in names[1:3])


def test_keys_with_the_same_last_part_are_told_apart(sweeps):
    values = {"model.encoder.gate": ("tanh",), "model.decoder.gate": ("relu",), "optim.lr": ("1",)}
    assert expand([Path("one.yaml")], values, (0,))[0].name == "one_encoder-gatetanh_decoder-gaterelu_lr1_s0"


def test_configs_with_the_same_name_go_by_their_files(sweeps):
    Path("sub").mkdir()
    for path in ("other.yaml", "sub/two.yaml"):
        Path(path).write_text("name: one\n")
    runs = expand([Path("one.yaml"), Path("other.yaml")], {}, (0,))
    assert [run.name for run in runs] == ["one_s0", "other_s0"]
    Path("sub/one.yaml").write_text("name: one\n")
    with pytest.raises(ValueError, match=r"one.yaml, sub/one.yaml would all be called 'one'"):
        expand([Path("one.yaml"), Path("sub/one.yaml")], {}, (0,))


def test_default_folder_follows_from_the_names(sweeps):
    for name in ("vit_swiglu", "vit_qdmoa"):
        Path(f"{name}.yaml").write_text(f"name: {name}\n")
    assert expand([Path("vit_swiglu.yaml"), Path("vit_qdmoa.yaml")], {}, (0,))[0].out == Path("runs/sweep_vit")
    assert expand([Path("one.yaml"), Path("two.yaml")], {}, (0,))[0].out == Path("runs/sweep_one")


@pytest.mark.parametrize(
    ("text", "seeds"), [("3", (0, 1, 2)), ("1", (0,)), ("0,5,1", (0, 5, 1)), ("7,", (7,))], ids=lambda v: str(v)
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["0", "", "-1", "1,1", "a", "1,,2", ","])
def test_seeds_that_cannot_be(text):
    with pytest.raises(ValueError, match="--seeds"):
        parse_seeds(text)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["optim.lr"], "must be KEY=VALUE"),
        (["optim.lr="], "must be KEY=VALUE"),
        (["optim.lr=1,,2"], "must be KEY=VALUE"),
        (["optim.lr=1e-3,0.001"], "gives '1e-3' twice"),
        (["optim.lr=1", "optim.lr=2"], "names 'optim.lr' twice"),
        (["seed=1,2"], "use --seeds"),
    ],
    ids=["no value", "empty", "gap", "same number", "same key", "own key"],
)
def test_settings_that_cannot_be(texts, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_settings(texts)


def test_commas_inside_brackets_and_quotes_do_not_separate():
    text = """[0.9,0.95],{a: 1, b: (2, 3)},'g,s,r2',"x,'y",z"""
    assert split_values(text) == ["[0.9,0.95]", "{a: 1, b: (2, 3)}", "g,s,r2", "x,'y", "z"]
    assert yaml.safe_load(split_values(text)[0]) == [0.9, 0.95]


# Checks before the first run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "optim.lrr=1e-3"], "did you mean optim.lr?"),
        (["--set", "optim.lr=1e-3,-1"], "one_lr-1_s0: optim.lr is -1.0; it must be above 0"),
        (["--set", "optim.lr=fast"], "optim.lr"),
        (["--set", "step_s=1,-1"], "one_step_s-1_s0: step_s is -1.0; it must be 0 or above"),
        (["--", "--schedule.epochs", "0"], "schedule.epochs is 0.0; it must be above 0"),
        (["--", "--seed=3"], "--seed stands after --, which cannot be: use --seeds"),
        (["--set", "optim.lr=1", "--", "--optim.lr", "2"], "it is among --set"),
        (["--script", "missing.py"], "--script is 'missing.py'; it must be a Python file"),
        (["--script", "report_only.py"], "has no function main(arguments)"),
        (["--script", "deaf.py"], "does not print its configuration when asked to --check it"),
        (["--launch", "acelerate launch"], "--launch begins with 'acelerate'"),
        (["--config", "missing.yaml"], "missing.yaml cannot be read"),
        (["--config", "one.yaml", "one.yaml"], "--config gives 'one.yaml' twice"),
    ],
    ids=[
        "key",
        "range",
        "type",
        "range of the script's own key",
        "extra",
        "extra seed",
        "extra swept",
        "script",
        "no main",
        "no check",
        "launch",
        "config",
        "config twice",
    ],
)
def test_a_typo_costs_nothing(sweeps, capsys, arguments, message):
    Path("report_only.py").write_text("")
    Path("deaf.py").write_text("def main(arguments): ...")
    assert sweeps(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_folder_with_another_run_is_refused_before_the_first_starts(sweeps, capsys):
    assert sweeps("--no-report", configs=["two"]) == 0
    assert sweeps("--no-report", "--", "--schedule.epochs", "3") == 2
    error = capsys.readouterr().err
    assert "two_s0 holds a run with another configuration" in error and "schedule.epochs: 2.0 -> 3.0" in error
    assert not Path("runs/one_s0").exists()


def test_dry_run_prints_commands_that_work(sweeps, capsys):
    assert sweeps("--no-report", configs=["two"]) == 0
    capsys.readouterr()
    assert sweeps("--dry-run", "--launch", "nice -n 1", "--", "--words", "a b") == 2  # "two" has other words
    assert sweeps("--dry-run", "--launch", "nice -n 1") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "nice -n 1 train.py --config one.yaml --name=one_s0 --seed=0 --out=runs"
    assert second.startswith("# done: nice -n 1 train.py --config two.yaml")
    assert not Path("runs/one_s0").exists()


# Running here


def test_runs_all_marks_the_diverged_goes_on_after_a_failure_and_reports(sweeps, capsys):
    arguments = ("--set", "trouble=none,diverges,fails", "--jobs", "2", "--title", "T", "--baseline", "two")
    assert sweeps(*arguments) == 1
    out = capsys.readouterr().out
    assert "finished    one_troublenone_s0, step 4/4, loss 0.2500" in out
    assert "diverged    two_troublediverges_s0" in out and "diverged    one_troublefails" not in out
    assert "failed      one_troublefails_s0" in out and "RuntimeError: the disk is full" in out
    assert "4 of 6 done (2 diverged), 2 failed" in out
    done = [f"runs/{name}_trouble{trouble}_s0" for trouble in ("none", "diverges") for name in ("one", "two")]
    assert sweeps.reported() == [*done, "--out", "reports/runs", "--title", "T", "--baseline", "two"]

    before = {path: path.stat().st_mtime_ns for path in Path("runs").glob("*_*/*") if "fails" not in str(path)}
    assert before
    assert sweeps(*arguments) == 1  # the same command: only what failed is tried again
    assert "6 runs in runs, 4 of them done before" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert sweeps.log("one_troublefails_s0").count("begins at 1") == 1
    assert sweeps.log("one_troublenone_s0").count("begins at") == 1


def test_a_stop_is_passed_on_waited_for_and_continued(sweeps, capfd):
    name = "one_troublestops-the-sweep_s0"
    arguments = ("--set", "trouble=stops the sweep")
    assert sweeps(*arguments) == EXIT_STOPPED
    out = capfd.readouterr().out
    assert "SIGTERM: waiting for 1 run(s) to save" in out and f"stopped     {name}, step 2/4" in out
    assert "the same command continues" in out
    assert not Path("runs/two_troublestops-the-sweep_s0").exists() and not Path("reports").exists()
    assert sweeps(*arguments, configs=["one"]) == 0
    assert sweeps.steps(name) == [1, 2, 3, 4] and "begins at 2" in sweeps.log(name)


@pytest.mark.slow
def test_a_killed_sweep_leaves_its_run_alone_and_the_next_one_waits_for_it(sweeps, capsys):
    """kill -9 of the sweep: its child goes on. The next sweep must not run the same folder a second time."""
    extra = ["--", "--step_s", "1", "--schedule.epochs", "3"]
    command = [sys.executable, "sweep.py", *sweeps.configs(["one"]), *extra]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    wait_for(lambda: Path("runs/one_s0/metrics.jsonl").exists(), process)
    process.kill()
    process.wait()
    assert open_log(PlannedRun("one_s0", Path(), {}, 0, Path("runs"))) is None
    assert sweeps(*extra, configs=["one"]) == 0
    assert sweeps.steps("one_s0") == list(range(1, 7)) and sweeps.log("one_s0").count("begins at") == 1
    assert "elsewhere" in capsys.readouterr().out


def test_a_run_that_is_killed_is_continued(sweeps, capsys):
    arguments = ("--set", "trouble=is killed")
    assert sweeps(*arguments, configs=["one"]) == 1
    assert "failed      one_troubleis-killed_s0, step 1/4" in capsys.readouterr().out
    assert sweeps(*arguments, configs=["one"]) == 0
    assert sweeps.steps("one_troubleis-killed_s0") == [1, 2, 3, 4]
    assert "begins at 1" in sweeps.log("one_troubleis-killed_s0")


def test_a_run_that_another_process_is_at_is_waited_for(sweeps, capsys):
    Path("runs/logs").mkdir(parents=True)
    log = open_log(PlannedRun("one_s0", Path(), {}, 0, Path("runs")))
    assert log is not None
    with log:

        def release_once_the_other_is_done():
            try:
                wait_for(lambda: Path("runs/two_s0/summary.json").exists())
            finally:
                fcntl.flock(log, fcntl.LOCK_UN)

        thread = threading.Thread(target=release_once_the_other_is_done)
        thread.start()
        assert sweeps("--no-report") == 0
        thread.join()
    out = capsys.readouterr().out
    assert out.index("started     two_s0") < out.index("started     one_s0")


def test_force_runs_a_diverged_run_again(sweeps):
    name = "one_troublediverges_s0"
    assert sweeps("--set", "trouble=diverges", configs=["one"]) == 0
    assert observe(Path("runs") / name).state == "diverged"
    assert (
        sweeps("--set", "trouble=diverges", "--", "--resume", "force", "--optim.max_grad_norm", "1", configs=["one"])
        == 0
    )
    assert sweeps.steps(name) == [1, 2, 3, 4]


def test_a_failed_report_is_told(sweeps):
    Path("report.py").write_text("raise SystemExit(2)")
    assert sweeps(configs=["one"]) == 1
    assert sweeps("--no-report", configs=["one"]) == 0
    assert sweeps("--only-report", configs=["one"]) == 2


def test_only_report_runs_nothing(sweeps):
    assert sweeps(configs=["two"]) == 0
    assert sweeps("--only-report", "--report", "elsewhere") == 0
    assert json.loads(Path("elsewhere/report.json").read_text()) == ["runs/two_s0", "--out", "elsewhere"]
    assert not Path("runs/one_s0").exists()


def test_each_of_several_at_a_time_gets_its_part_of_the_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    four = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    assert slot_environments(1, four) == [{}]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slot_environments(2, four)] == ["4,5", "6,7"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slot_environments(6, four)] == ["4", "5", "6", "7", "4", "5"]
    assert slot_environments(3, {"CUDA_VISIBLE_DEVICES": ""}) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert slot_environments(16, {"CUDA_VISIBLE_DEVICES": "3"}) == [{"OMP_NUM_THREADS": "1"}] * 16
    assert slot_environments(2, {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "5"}) == [{}, {}]


# What is shown


def test_time_left():
    def job(state, step, wall_s):
        run = PlannedRun("run", Path(), {}, 0, Path("runs"))
        speed = {"throughput": step / wall_s, "seen": step}
        return Job(run, state, Progress("begun", step=step, total=100, wall_s=wall_s, **speed))

    # One took 400 s, one will take 100 s: another is taken for 250 s.
    done, half = job("finished", 100, 400.0), job("running", 50, 50.0)
    waiting = Job(done.run)
    assert time_left_s([waiting], 1) is None
    assert time_left_s([done, half, waiting], 1) == 50.0 + 250.0
    assert time_left_s([done, half, waiting, waiting], 2) == (50.0 + 2 * 250.0) / 2
    assert time_left_s([done, half, waiting], 8) == 250.0
    assert time_left_s([done, job("failed", 10, 5.0)], 1) == 0.0


def test_progress_of_a_folder(tmp_path):
    assert observe(tmp_path) == Progress()
    (tmp_path / "env.json").write_text('{"total_steps": 100}')
    rows = [{"kind": "train", "step": n, "epoch": n / 40, "wall_s": n / 2, "loss": 1 / n} for n in range(1, 3001)]
    rows.insert(-2, {"kind": "val", "step": 2999, "epoch": 1.0, "loss": 0.5, "loss_norm": 0.4})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tr')
    assert observe(tmp_path) == Progress("begun", 3000, 100, 1 / 3000, 0.4, wall_s=1500.0)
    (tmp_path / "metrics.jsonl").write_text(
        '{"kind": "train", "step": 7, "tokens": 70, "wall_s": 100, "loss": 0.5, "throughput": 7}\n'
    )
    seen = observe(tmp_path)
    assert (seen.total, seen.duration_s, seen.left_s) == (100, 100 + 10 * 93 / 7, 10 * 93 / 7), "compilation is over"
    assert "step 7/100, loss 0.5000, speed 7 tokens/s" in one_line(
        Job(PlannedRun("r", Path(), {}, 0, Path()), progress=seen)
    )
    (tmp_path / "env.json").unlink()  # of a run of an earlier version
    assert observe(tmp_path).total == 0


def test_progress_of_what_the_loop_writes(runs):
    """The folders of the real loop, in every state that it can leave them in."""
    assert runs("finished") == 0
    assert runs("stopped", model__stop_at=6) == EXIT_STOPPED
    assert runs("diverged", model__nan_at=8) == 1
    seen = {name: observe(runs.out / name) for name in ("finished", "stopped", "diverged")}
    assert {name: (p.state, p.step, p.total) for name, p in seen.items()} == {
        "finished": ("finished", 15, 15),
        "stopped": ("begun", 7, 15),
        "diverged": ("diverged", 9, 15),
    }
    assert seen["finished"].val_loss == runs.json("finished", "summary.json")["final"]["loss_norm"]
    assert seen["diverged"].loss is None and seen["diverged"].left_s == 0.0


def jobs_in_all_states():
    progress = Progress("begun", 1200, 4800, 0.61234, 0.598, 390.2, 60.0, seen=23_412)
    states = ["finished", "diverged", "running", "failed", *["waiting"] * 20]
    return [
        Job(
            PlannedRun(f"swiglu_s{i}", Path(), {}, i, Path("runs")),
            state,
            Progress() if state == "waiting" else progress,
        )
        for i, state in enumerate(states)
    ]


def test_the_live_table_shows_what_matters_where_not_all_fits():
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=12, color_system=None)
    jobs = jobs_in_all_states()
    with LiveBoard(console) as board:
        board.show(jobs, 1)
        board.ended(jobs[3], "RuntimeError: [red]the disk is full[/red]")
    text = console.file.getvalue()
    assert "swiglu_s2 running 1,200/4,800 0.6123 0.5980 390.2 samples/s 3 min 00 s" in re.sub(" +", " ", text)
    assert "swiglu_s3" in text and "swiglu_s0" not in text and "and 18 more" in text
    assert "2 of 24 done (1 diverged), 1 running, 1 failed, 20 waiting; about" in text
    assert "[red]the disk is full[/red]" in text  # a log's brackets are no markup


def test_a_loss_that_has_gone_astray_is_told_in_short():
    run = PlannedRun("run", Path(), {}, 0, Path("runs"))
    assert (
        one_line(Job(run, "diverged", Progress("diverged", 2, 14, 4620213895036928.0)))
        == "run, step 2/14, loss 4.62e+15"
    )


def test_without_a_terminal_there_are_lines_at_most_once_a_minute(capsys, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    board = Board()
    board.due()
    clock[0] += 59
    assert not board.due()
    clock[0] += 1
    assert board.due() and not board.due()
    board.show(jobs_in_all_states(), 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "running     swiglu_s2, step 1,200/4,800, loss 0.6123, val 0.5980, speed 390.2 samples/s, left"
    )
    assert len(lines) == 2 and lines[1].startswith("all         2 of 24 done")


# On a cluster

SBATCH = r"""#!/bin/bash
# Runs an array's tasks, or a single job, at once; keeps its arguments; says its number.
echo "$@" >>"$CLUSTER/sbatch"
number=$(($(wc -l <"$CLUSTER/sbatch") + 40))
script="${@: -1}"
tasks=$(sed -n 's/^#SBATCH --array=\([0-9,]*\).*/\1/p' "$script")
for task in ${tasks//,/ }; do
    SLURM_ARRAY_JOB_ID=$number SLURM_ARRAY_TASK_ID=$task bash "$script" >>"$CLUSTER/out" 2>&1
done
[ -n "$tasks" ] || bash "$script" >>"$CLUSTER/out" 2>&1
echo "$number;cluster"
"""


@pytest.fixture
def cluster(sweeps, monkeypatch):
    """A folder of Slurm's commands, first on PATH, with what they are told; `squeue` prints the file queue."""
    folder = sweeps.folder / "cluster"
    folder.mkdir()
    commands = {
        "sbatch": SBATCH,
        "squeue": '#!/bin/bash\ncat "$CLUSTER/queue"\n',
        "scontrol": '#!/bin/bash\necho "$@" >>"$CLUSTER/scontrol"\n',
    }
    for name, text in commands.items():
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    (folder / "queue").write_text("")
    monkeypatch.setenv("CLUSTER", str(folder))
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sys, "argv", [str(sweeps.folder / "sweep.py")])
    return folder


@pytest.mark.slow
def test_an_array_job_and_a_report_after_it(sweeps, cluster, capsys):
    arguments = (
        "--set",
        "trouble=none,fails",
        "--slurm",
        "--slurm-args",
        "--gres=gpu:8",
        "--slurm-report-args=--mem=8G",
        "--jobs",
        "2",
    )
    assert sweeps(*arguments) == 0
    out = capsys.readouterr().out
    assert "submitted   4 runs as job 41 (runs/sweep.sbatch)" in out and "report as job 42" in out
    script = Path("runs/sweep.sbatch").read_text()
    for line in ("--array=0,1,2,3%2", "--gres=gpu:8", "--signal=B:USR1@120", "--requeue"):
        assert f"#SBATCH {line}\n" in script
    assert "#SBATCH --mem=8G\n" in Path("runs/report.sbatch").read_text()
    first, second = (cluster / "sbatch").read_text().splitlines()
    assert first == "--parsable runs/sweep.sbatch"
    assert second == "--parsable --dependency=afterany:41 runs/report.sbatch"
    assert sweeps.steps("one_troublenone_s0") == [1, 2, 3, 4]
    assert sweeps.reported() == ["runs/one_troublenone_s0", "runs/two_troublenone_s0", "--out", "reports/runs"]

    # The same again while one of the two that failed is queued once more: only the other is submitted.
    (cluster / "queue").write_text("41 2 PENDING\n41 0 COMPLETED\n7 1 RUNNING\n")
    assert sweeps(*arguments, "--no-report") == 0
    out = capsys.readouterr().out
    assert "2 of 4 done, 1 queued, 1 waiting" in out and "submitted   1 runs as job 43" in out
    assert "#SBATCH --array=3%2\n" in Path("runs/sweep.sbatch").read_text()
    assert "begins at 1" not in sweeps.log("one_troublefails_s0")
    assert "begins at 1" in sweeps.log("two_troublefails_s0")

    # While both are there, nothing is.
    (cluster / "queue").write_text("41 2 RUNNING\n43 3 PENDING\n")
    calls = (cluster / "sbatch").read_text()
    assert sweeps(*arguments) == 0
    assert "2 of 4 done, 1 running, 1 queued" in capsys.readouterr().out
    assert (cluster / "sbatch").read_text() == calls


@pytest.mark.parametrize(
    ("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)], ids=["time", "cancel"]
)
def test_a_task_out_of_time_saves_and_is_queued_again(sweeps, cluster, capsys, number, requeued):
    extra = ("--slurm", "--slurm-args", "-p x", "--dry-run", "--", "--trouble", "waits")
    assert sweeps(*extra, configs=["one"]) == 0
    script = capsys.readouterr().out
    assert not Path("runs").exists()
    Path("runs/logs").mkdir(parents=True)
    task = ["bash", "-c", script]
    environment = os.environ | {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "0"}
    process = subprocess.Popen(task, env=environment)
    wait_for(lambda: Path("runs/one_s0/metrics.jsonl").exists(), process)
    process.send_signal(number)
    assert process.wait(600) == (0 if requeued else EXIT_STOPPED)
    assert json.loads(Path("runs/one_s0/summary.json").read_text()) == {"status": "stopped"}
    assert requeued == (cluster / "scontrol").exists()
    if requeued:
        assert (cluster / "scontrol").read_text() == "requeue 5_0\n"
    assert subprocess.run(task, env=environment, check=False).returncode == 0
    assert sweeps.steps("one_s0") == [1, 2, 3, 4]


def test_without_slurm_it_says_so(sweeps, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert sweeps("--slurm") == 1
    assert "sbatch was not found; --slurm needs a machine that can submit to Slurm" in capsys.readouterr().err


# The real thing


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.mask_ratio=2", "model.mask_ratio is 2.0; it must be between 0 and 1"),
        ("model.encoder=vit_tiny_patch16_qdmao", "did you mean vit_tiny_patch16_qdmoa"),
        ("model.encoder_args={ffn_gat: tanh}", "unknown 'ffn_gat' for vit_tiny_patch16_swiglu"),
        ("data.train=nowhere", "'nowhere' does not exist"),
        ("data.train=damaged.tar", "damaged.tar"),
        ("schedule.batch_size=100", "schedule.batch_size is 100; it must be a multiple of"),
        ("loop.trackers=[tensorbord]", "loop.trackers names 'tensorbord'"),
    ],
    ids=["model", "encoder", "its argument", "no data", "damaged data", "batch", "tracker"],
)
def test_what_pretraining_would_refuse_is_refused_before_the_first_run(sweeps, monkeypatch, capsys, setting, message):
    monkeypatch.setenv("XDG_CACHE_HOME", str(sweeps.folder / "cache"))
    write_tar(Path("tiny.tar"))
    Path("damaged.tar").write_text("no tar")
    arguments = ["--config", str(ROOT / "configs/mae/laptop_swiglu.yaml"), "--set", setting, "--out", "runs"]
    extra = ["--", "--data.val=null", *(() if "data.train" in setting else ("--data.train=tiny.tar",))]
    options = {"script": ROOT / "scripts/pretrain_mae.py", "report": ["false"]}
    assert main([*arguments, *extra], **options, mutable_keys=lambda: RESUME_MUTABLE_KEYS) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not Path("runs").exists()


def write_tar(path):
    """Write a tar of one picture."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = len(picture.getvalue())
        tar.addfile(info, io.BytesIO(picture.getvalue()))


@pytest.fixture
def entry(monkeypatch):
    """scripts/sweep.py, imported."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("sweep")


@pytest.mark.parametrize(
    ("content", "script"),
    [
        ("model: {encoder: vit}", "pretrain_mae.py"),
        ("model: {size: dense-micro}", "pretrain_lm.py"),
        ("model: [encoder]", "pretrain_mae.py"),
        ("- 1", "pretrain_mae.py"),
        ("model: !!bool x", "pretrain_mae.py"),
        (f"a: {'[' * 99}{']' * 99}", "pretrain_mae.py"),
    ],
    ids=["vision", "language", "no keys", "list", "wrong tag", "deep"],
)
def test_the_script_is_told_by_the_first_configuration(sweeps, entry, content, script):
    Path("first.yml").write_text(content)
    for words in (["--config", "first.yml", "one.yaml"], ["--set", "seed=1", "--config=first.yml"]):
        assert entry.script_of(words) == ROOT / "scripts" / script
    assert entry.script_of(["--config", "absent.yaml", "first.yml"]) == ROOT / "scripts" / script
    assert entry.script_of(["--help"]) == ROOT / "scripts/pretrain_mae.py"


@pytest.mark.parametrize("content", ["model: !!bool x", "- 1", "a: [1,"], ids=["wrong tag", "list", "broken"])
def test_a_configuration_that_cannot_be_read_is_told_in_one_message(sweeps, entry, capsys, content):
    Path("one.yaml").write_text(content)
    arguments = ["--config", "one.yaml", "--out", "runs"]
    assert (
        main(arguments, script=entry.script_of(arguments), report=["false"], mutable_keys=lambda: RESUME_MUTABLE_KEYS)
        == 2
    )
    told = capsys.readouterr().err
    assert told.startswith("error: one.yaml cannot be read (") and told.count("\n") == 1


@pytest.mark.slow
def test_pretraining(sweeps, monkeypatch, capsys):
    """scripts/sweep.py's own defaults, but for the report, on a model of one block and images of 16 pixels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(sweeps.folder / "cache"))
    text = (ROOT / "configs/mae/laptop_swiglu.yaml").read_text()
    Path("mae.yaml").write_text(text)
    small = {"model.img_size": 16, "model.encoder_args.depth": 1, "model.decoder_depth": 1, "loop.trackers": "[]"}
    small |= {
        "schedule.epochs": 0.14,
        "schedule.warmup_epochs": 0,
        "loop.num_diagnostic_samples": 0,
        "loop.val_samples": 4,
    }
    extra = ["--", *(f"--{key}={value}" for key, value in small.items())]
    arguments = ["--config", "mae.yaml", "--set", "optim.lr=2e-3", "--out", "runs", *extra]
    options = {"script": ROOT / "scripts/pretrain_mae.py", "report": [sys.executable, "report.py"]}
    assert main(arguments, **options, mutable_keys=lambda: RESUME_MUTABLE_KEYS) == 0
    seen = observe(Path("runs/laptop_swiglu_lr2e-3_s0"))
    assert (seen.state, seen.step, seen.total) == ("finished", 2, 2) and seen.val_loss is not None
    assert sweeps.reported()[0] == "runs/laptop_swiglu_lr2e-3_s0"
    capsys.readouterr()
    assert main(arguments, **options, mutable_keys=lambda: RESUME_MUTABLE_KEYS) == 0
    assert "1 runs in runs, 1 of them done before" in capsys.readouterr().out


def wait_for(condition, process=None, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("srun --ntasks=8 scripts/pretrain_mae.py", "USR1"),
        ("/usr/bin/srun python x.py", "USR1"),
        ("accelerate launch x.py", "TERM"),
        ("python scripts/srun.py", "TERM"),
    ],
)
def test_the_signal_that_a_launcher_passes_on(command, expected):
    assert stop_signal(command.split()) == expected
