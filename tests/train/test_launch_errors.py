"""Errors of one rank under real launchers: exit codes and messages."""

import json
import os
import subprocess
import sys

import pytest
from torch.utils.data import DataLoader, Dataset

from moa_train.errors import ConfigError, DataError, message, report

MULTIPLE = {"loop__micro_batch_size": 3}


def torchrun(runs, trouble="", on=1, **changed):
    error_file = runs.out / "error.json"
    environment = {"TROUBLE": trouble, "RANK_IN_TROUBLE": str(on), "TORCHELASTIC_ERROR_FILE": str(error_file)}
    environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(runs.script)]
    return subprocess.run(
        [*command, *runs.arguments("run", **changed)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_torchrun_reports_the_traceback_of_the_first_bug(runs):
    done = torchrun(runs, "bug")
    assert done.returncode == 1
    root_cause = done.stderr.partition("Root Cause")[2]
    assert "rank      : 1" in root_cause and "RuntimeError: a bug in the loss" in root_cause, done.stderr
    assert "a bug in the loss" in json.loads((runs.out / "error.json").read_text())["message"]["message"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "error"),
    [
        (MULTIPLE, "error: schedule.batch_size is 8"),
        ({"loop__micro_batch_size": "three"}, "toy: error: "),
    ],
    ids=["plan", "parser"],
)
def test_config_error_of_all_ranks_is_printed_once(ranks, changed, error):
    assert ranks(**changed) == [2, 2]
    assert ranks.stderr.startswith(error) and ranks.stderr.count("error: ") == 1, ranks.stderr


def test_data_error_of_one_rank_exits_with_2(ranks):
    codes = ranks("data", 1)
    assert codes[1] == 2 and codes[0] != 0
    assert ranks.stderr.count("error: sample 17 cannot be read\n") == 1, ranks.stderr


@pytest.mark.slow
def test_killed_rank_ends_the_other_and_the_run_continues(runs, ranks):
    codes = ranks("SIGKILL", 1)
    assert codes[1] == -9 and codes[0] == 1
    assert ranks() == [0, 0]
    assert [row["step"] for row in runs.rows("run", "train")] == list(range(1, 16))


class Damaged(Dataset):
    def __getitem__(self, index):
        raise DataError("sample 7: DataError in a message, on one line")


def test_message_of_an_error_in_a_data_worker():
    with pytest.raises(DataError) as caught:
        list(DataLoader(Damaged(), sampler=[0], num_workers=1))
    assert "Original Traceback" in str(caught.value)
    assert message(caught.value) == "sample 7: DataError in a message, on one line"


def test_report_prints_one_line_and_returns_the_exit_code(capsys, monkeypatch):
    assert report(DataError("a shard is missing")) == 2
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("moa_train.errors.wait_for_local_rank_0", lambda: None)
    assert report(ConfigError("printed by local rank 0")) == 2
    assert report(DataError("of this rank")) == 2
    assert capsys.readouterr().err == "error: a shard is missing\nerror: of this rank\n"
