"""How cases are measured and written: turns, preparation, ratios, memory; with clocks of our own, so exactly."""

import csv

import numpy as np
import pytest
import torch

CPU = torch.device("cpu")


def told(call, device):
    """A clock that shows what the run returns."""
    return call()


@pytest.fixture
def measure(part):
    return part("measure")


def sequence(values):
    remaining = iter(values)
    return lambda: next(remaining)


def test_cases_take_turns_and_the_warmup_does_not_count(measure):
    order = []
    cases = [measure.Case({}, lambda name=name: order.append(name) or float(len(order))) for name in "ab"]
    measure.measure(cases, CPU, 3, clock=told, memory=False, warmup=2)
    assert "".join(order) == "ab" * 5
    assert [case.seconds for case in cases] == [[5, 7, 9], [6, 8, 10]]


def test_preparation_is_not_timed_and_its_result_is_passed_on(measure):
    timing = []

    def clock(call, device):
        timing.append(True)
        value = call()
        timing.pop()
        return value

    def prepare():
        assert not timing
        return 7.0

    def run(value):
        assert timing
        return value

    case = measure.Case({}, run, prepare=prepare)
    measure.measure([case], CPU, 2, clock=clock, memory=False)
    assert case.seconds == [7, 7]


def test_ratios_are_taken_by_round_and_by_item(measure):
    base = measure.Case({}, sequence([1.0, 2.0, 4.0]), items=10)
    twice = measure.Case({}, sequence([3.0, 3.0, 3.0]), items=20, baseline=base)
    measure.measure([base, twice], CPU, 3, clock=told, memory=False, warmup=0)
    assert base.time_ratios() == [1, 1, 1]
    assert twice.time_ratios() == [1.5, 0.75, 0.375]
    assert twice.median_s == 3


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_percentiles_are_numpys(measure, count):
    values = np.random.default_rng(count).random(count)
    for percent in (20, 50, 80):
        assert measure.percentile(values.tolist(), percent) == pytest.approx(np.percentile(values, percent))


def test_peak_memory_is_the_most_held_at_a_time(measure):
    def run():
        for mib in (3, 5, 2):
            torch.empty(mib * 2**20, dtype=torch.uint8)  # freed at once
        kept = [torch.empty(2 * 2**20, dtype=torch.uint8) for _ in range(3)]
        return len(kept)

    assert measure.peak_memory_mib(run, CPU) == pytest.approx(6, abs=0.01)
    case = measure.Case({}, run, held_bytes=lambda: 5 * 2**20)
    measure.measure([case], CPU, 1)
    assert case.peak_mib == pytest.approx(11, abs=0.01)


def test_clocks_of_the_host_agree_on_a_cpu(measure):
    slept = measure.device_seconds(lambda: __import__("time").sleep(0.02), CPU)
    assert slept >= 0.02


def test_table_and_file_say_the_same(measure, part, tmp_path, capsys):
    table = part("table")
    base = measure.Case({"name": "one"}, lambda: None, items=3000, seconds=[1.0, 1.0, 2.0], peak_mib=2000.0)
    other = measure.Case({"name": "two"}, lambda: None, items=3000, baseline=base, seconds=[2.0, 3.0, 3.0])
    other.peak_mib, other.notes["more"] = 1000.0, "1,234"
    columns = [*table.times("ms"), table.rate("rows"), *table.time_ratio(), *table.memory(), table.note("more")]
    table.report("Some-thing: a title", [base, other], columns, CPU, tmp_path / "out", "A remark")
    printed = capsys.readouterr().out
    assert "### Some-thing: a title" in printed and "A remark" in printed and torch.__version__ in printed
    assert "| two | 3000 | 2400 | 3000 | 1,000 | 2.000 | 1.700-2.600 | 1,000.0 | 0.500 | 1,234 |" in printed
    head, first, second = csv.reader((tmp_path / "out/some-thing.csv").read_text(encoding="utf-8").splitlines())
    assert head[:5] == ["name", "median ms", "p20", "p80", "rows/s"]
    assert first == ["one", "1000", "1000", "1600", "3000", "1.000", "1.000-1.000", "2000.0", "1.000", ""]
    assert second == ["two", "3000", "2400", "3000", "1000", "2.000", "1.700-2.600", "1000.0", "0.500", "1234"]


def test_speed_ratio_is_the_inverse_and_steps_share_a_run(measure, part):
    table = part("table")
    base = measure.Case({}, lambda: None, seconds=[8.0])
    fast = measure.Case({}, lambda: None, seconds=[2.0], baseline=base, notes={"token": "4"})
    assert [text(fast) for _, text in table.speed_ratio()] == ["4.000", "4.000-4.000"]
    assert next((head, text(fast)) for head, text in table.times("ms", per="token")) == ("median ms/token", "500")


def test_yardsticks_count_what_they_do(part):
    yardsticks = part("yardsticks")
    copy = yardsticks.copy_case(CPU, {}, 2)
    assert copy.items == 4 * 2**20
    assert copy.run().eq(1).all()
    product = yardsticks.product_case(CPU, torch.float32, {}, 8)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counted:
        product.run()
    assert product.items == counted.get_total_flops() == 2 * 8**3


def test_many_models_of_one_class_are_compiled_without_recompiling(part):
    in_mode = part("options").in_mode
    layers = [torch.nn.Linear(3, width) for width in range(2, 14)]  # more than torch.compile's limit
    calls = [in_mode(layer, "compiled", "eager") for layer in layers]
    x = torch.randn(5, 3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for layer, call in zip(layers, calls, strict=True):
            torch.testing.assert_close(call(x), layer(x))
    assert in_mode(layers[0], "uncompiled", "eager") is layers[0]


def test_baselines_come_first_and_once(part):
    with_baselines = part("options").with_baselines
    assert with_baselines(["qdmoa", "moa", "swiglu"], "relu2") == {
        "relu2": ["relu2", "moa"],
        "swiglu": ["swiglu", "qdmoa"],
    }
    assert with_baselines(["gelu"], "gelu") == {"gelu": ["gelu"]}
    assert with_baselines(["bimoa"], "gelu") == {"swiglu": ["swiglu", "bimoa"]}


def test_state_is_weights_and_two_moments(part):
    training = part("training")
    model = torch.nn.Linear(7, 5)
    model.register_buffer("more", torch.zeros(3, dtype=torch.float64))
    optimizer = training.adamw(model)
    weights = 4 * (7 * 5 + 5)
    assert training.held_bytes(model) == training.held_bytes(model, optimizer) == weights + 24
    before = model.weight.detach().clone()
    training.train_step(lambda: model(torch.ones(2, 7)).sum(), optimizer, training.autocast(CPU))
    assert not model.weight.equal(before) and model.weight.grad is None
    steps = 2 * 4  # one float32 counter a tensor
    assert training.held_bytes(model, optimizer) == 3 * weights + 24 + steps
