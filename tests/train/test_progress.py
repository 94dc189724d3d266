"""Progress: one live line on a terminal, few lines elsewhere, nothing from other ranks."""

import io
import sys

import pytest

from moa_train import progress
from moa_train.progress import LINE_EVERY_S, WARMUP_STEPS, CountBar, Progress, StepTimer, count, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(shown, steps=20):
    for step in range(1, steps + 1):
        shown.update(step, step / 10, 0.5, 1e-3, "1234 img/s, 41.0% of peak, 9 s left")
    shown.print("a message")
    shown.close()


def test_terminal_has_one_live_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    run(Progress(visible=True, step=0, total_steps=20))
    written = sys.stderr.getvalue()
    assert "20/20, loss 0.5000, lr 1.00e-03, 1234 img/s, 41.0% of peak, 9 s left" in written.rstrip().split("\r")[-1]
    assert written.rstrip().count("\n") == 0
    assert capsys.readouterr().out == "a message\n"


def test_log_has_few_lines(monkeypatch, capsys):
    run(Progress(visible=True, step=0, total_steps=20))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["step 1/20", "step 20/20", "a message"]
    assert lines[0] == "step 1/20, epoch 0.10: loss 0.5000, lr 1.00e-03, 1234 img/s, 41.0% of peak, 9 s left"
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    run(Progress(visible=True, step=0, total_steps=20))
    assert len(capsys.readouterr().out.splitlines()) == 21


def test_warmup_steps_are_not_timed():
    timer = StepTimer()
    for _ in range(WARMUP_STEPS):
        timer.add(100.0)
    for _ in range(8):  # 2 s
        assert timer.step_s() is None
        timer.add(0.25)
    assert timer.step_s() == 0.25
    for _ in range(1000):
        timer.add(0.5)
    assert timer.step_s() == 0.5


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (320, "5 min 20 s"), (11_100, "3 h 05 min"), (187_200, "2 d 04 h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(12, "12"), (5_359_104, "5.36 M"), (1.88e22, "18.8 Z")])
def test_count(number, text):
    assert count(number) == text


def test_count_bar_prints_occasional_lines_in_a_log(capsys, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    with CountBar(total=600, title="features", unit="img") as bar:
        for _ in range(6):
            clock[0] += LINE_EVERY_S / 2 + 1
            bar.update(100)
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "features: 200/600,  6.25img/s, 01:03 left",
        "features: 400/600,  6.25img/s, 00:32 left",
        "features: 600/600,  6.25img/s, 00:00 left",
    ]
    assert not captured.err
