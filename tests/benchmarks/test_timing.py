"""How cases are measured and written, with clocks that return known numbers."""

import csv

import pytest
import torch

from benchmarks import tables, timing
from benchmarks.options import in_mode, with_baselines
from benchmarks.timing import Case

CPU = torch.device("cpu")


def returned(call, device):
    """A clock that shows what the run returns."""
    return call()


def test_cases_alternate_and_the_warmup_does_not_count():
    order = []
    cases = [Case({}, lambda name=name: order.append(name) or float(len(order))) for name in "ab"]
    timing.measure(cases, CPU, 3, clock=returned, memory=False, warmup=2)
    assert "".join(order) == "ab" * 5
    assert [case.seconds for case in cases] == [[5, 7, 9], [6, 8, 10]]


def test_preparation_is_not_timed():
    events = []

    def clock(call, device):
        events.append("start")
        return call()

    case = Case({}, lambda value: events.append("run") or value, prepare=lambda: events.append("prepare") or 7.0)
    timing.measure([case], CPU, 1, clock=clock, memory=False, warmup=0)
    assert (case.seconds, events) == ([7], ["prepare", "start", "run"])


def test_ratios_are_per_round_and_item():
    base = Case({}, iter([1.0, 2.0, 4.0]).__next__, items=10)
    twice = Case({}, lambda: 3.0, items=20, baseline=base)
    timing.measure([base, twice], CPU, 3, clock=returned, memory=False, warmup=0)
    assert base.time_ratios() == [1, 1, 1]
    assert twice.time_ratios() == [1.5, 0.75, 0.375]
    assert next(text(twice) for _, text in tables.speed_ratio()) == "1.333"


def test_peak_memory():
    def run():
        for mib in (3, 5, 2):
            torch.empty(mib * 2**20, dtype=torch.uint8)  # freed at once
        kept = [torch.empty(2 * 2**20, dtype=torch.uint8) for _ in range(3)]
        return len(kept)

    case = Case({}, run, held_bytes=lambda: 5 * 2**20)
    timing.measure([case], CPU, 1)
    assert case.peak_mib == pytest.approx(6 + 5, abs=0.01)


def test_table_and_file(tmp_path, capsys):
    base = Case({"name": "one"}, lambda: None, items=3000, seconds=[1.0, 1.0, 2.0], peak_mib=2000.0)
    other = Case({"name": "two"}, lambda: None, items=3000, baseline=base, seconds=[2.0, 3.0, 3.0], peak_mib=1000.0)
    other.notes["more"] = "1,234"
    columns = [*tables.times("ms"), tables.rate("rows"), *tables.time_ratio(), *tables.memory(), tables.note("more")]
    tables.report("Some-thing: a title", [base, other], columns, CPU, tmp_path / "out", "A remark")
    printed = capsys.readouterr().out
    assert "### Some-thing: a title" in printed and "A remark" in printed and torch.__version__ in printed
    assert "| two | 3000 | 2400 | 3000 | 1,000 | 2.000 | 1.700-2.600 | 1,000.0 | 0.500 | 1,234 |" in printed
    heading, first, second = csv.reader((tmp_path / "out/some-thing.csv").read_text(encoding="utf-8").splitlines())
    assert heading[:5] == ["name", "median ms", "p20", "p80", "rows/s"]
    assert first == ["one", "1000", "1000", "1600", "3000", "1.000", "1.000-1.000", "2000.0", "1.000", ""]
    assert second == ["two", "3000", "2400", "3000", "1000", "2.000", "1.700-2.600", "1000.0", "0.500", "1234"]


def test_copy_and_product_count_their_work():
    copy = timing.copy_case(CPU, {}, 2)
    assert copy.items == 4 * 2**20 and copy.run().eq(1).all()
    product = timing.product_case(CPU, torch.float32, {}, 8)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counted:
        product.run()
    assert product.items == counted.get_total_flops() == 2 * 8**3


def test_many_models_of_one_class_compile_without_recompilation():
    layers = [torch.nn.Linear(3, width) for width in range(2, 14)]  # more than torch.compile's limit
    calls = [in_mode(layer, "compiled", "eager") for layer in layers]
    x = torch.randn(5, 3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for layer, call in zip(layers, calls, strict=True):
            torch.testing.assert_close(call(x), layer(x))


@pytest.mark.parametrize(
    ("variants", "type_one", "groups"),
    [
        (["qdmoa", "moa", "swiglu"], "relu2", {"relu2": ["relu2", "moa"], "swiglu": ["swiglu", "qdmoa"]}),
        (["gelu"], "gelu", {"gelu": ["gelu"]}),
        (["bimoa"], "gelu", {"swiglu": ["swiglu", "bimoa"]}),
    ],
)
def test_baselines_head_their_groups(variants, type_one, groups):
    assert with_baselines(variants, type_one) == groups
