"""How experts are used: what is read, said, tabulated and drawn."""

import json

import numpy as np
import pytest

from moa_eval.training.comparison import compare
from moa_eval.training.expert_figures import expert_load, router_entropy
from moa_eval.training.experts import expert_rows, load_rows, read_all, read_experts, sentence
from moa_eval.training.reading import RunFolderError, read_run

EVEN = [0.25] * 4
UNEVEN = [0.55, 0.24, 0.2, 0.01]  # 2.2, 0.96, 0.8 and 0.04 times an even share


@pytest.fixture
def folder(make_run):
    return make_run("moe", ffn="qdmoa", experts=[EVEN, UNEVEN])


def test_what_was_recorded_is_read(folder):
    experts = read_experts(folder / "experts")
    assert list(experts.steps) == [20, 40]
    assert [layer.layer for layer in experts.last] == ["model.0", "model.1"]
    np.testing.assert_allclose(experts.last[1].relative, [2.2, 0.96, 0.8, 0.04])
    assert [layer.entropy for layer in experts.last] == [0.5, 0.5]
    assert (experts.last[1].dead, experts.last[1].overloaded) == ([3], [0])
    assert (experts.last[0].dead, experts.last[0].overloaded) == ([], [])


def test_a_dense_model_has_none(make_run):
    comparison = compare([read_run(make_run("a", ffn="swiglu")), read_run(make_run("b", ffn="moa", experts=[EVEN]))])
    assert list(read_all(comparison)) == [1]


def test_dead_and_overloaded_experts_are_named_with_the_limits(folder):
    text = sentence("X", read_experts(folder / "experts"))
    assert text == (
        "X: of 8 experts in 2 layers 1 is dead (below a tenth of an even share: model.1 expert 3), 1 is overloaded "
        "(above twice an even share: model.1 expert 0); router entropy 0.50 to 0.50 of the largest; "
        "no token was dropped."
    )


def test_an_even_load_and_dropped_tokens_are_said(make_run):
    folder = make_run("moe", ffn="qdmoa", experts=[EVEN])
    edit(folder, lambda content: content["layers"][0].update(dropped=7))
    text = sentence("X", read_experts(folder / "experts"))
    assert "none is dead (below a tenth of an even share), none is overloaded" in text
    assert text.replace("\u202f", "").endswith("; 7 of 4000 assignments were dropped.")


def test_tables_have_every_layer_and_every_expert(folder):
    comparison = compare([read_run(folder)])
    records = read_all(comparison)
    rows = expert_rows(comparison, records)
    assert [(row["step"], row["layer"]) for row in rows] == [
        (step, f"model.{layer}") for step in (20, 40) for layer in (0, 1)
    ]
    last = rows[-1]
    assert (last["lowest_load"], last["highest_load"]) == pytest.approx((0.04, 2.2))
    assert (last["experts"], last["dead"], last["overloaded"], last["dropped"]) == (4, 1, 1, 0)
    loads = load_rows(comparison, records)
    assert [row["expert"] for row in loads] == [0, 1, 2, 3] * 2
    assert [row["load"] for row in loads[4:]] == pytest.approx([4 * load for load in UNEVEN])


def test_figures_order_the_loads_and_follow_the_entropy(folder):
    comparison = compare([read_run(folder)])
    (experts,) = read_all(comparison).values()
    loads = rows(expert_load(comparison, 0, experts), "rank")
    for layer, load in (("model.0", EVEN), ("model.1", UNEVEN)):
        own = [row["load"] for row in loads if row["layer"] == layer]
        assert own == pytest.approx(sorted((4 * share for share in load), reverse=True))
    entropy = rows(router_entropy(comparison, 0, experts), "entropy")
    assert {(row["seen"], row["entropy"]) for row in entropy} == {(20 * 64, 1.0), (40 * 64, 0.5)}


def rows(chart, column):
    return [row for values in chart.spec["datasets"].values() for row in values if column in row]


def edit(folder, change):
    path = folder / "experts/step_00000040.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


FAULTS = {
    "no layers": lambda content: content.pop("layers"),
    "no entropy": lambda content: content["layers"][0].pop("entropy"),
    "no shares": lambda content: content["layers"][0].update(load=[4, 4, 2]),
    "no list": lambda content: content["layers"][0].update(load="even"),
    "no largest entropy": lambda content: content["layers"][0].update(max_entropy=0.0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_record_is_named_in_one_line(folder, fault):
    edit(folder, FAULTS[fault])
    with pytest.raises(RunFolderError) as caught:
        read_experts(folder / "experts")
    message = str(caught.value)
    assert message.startswith(f"{folder}/experts/step_00000040.json: not a record of experts")
    assert message.endswith("; delete the folder or leave this run out") and "\n" not in message


def test_a_single_expert_has_no_choice_to_report(folder):
    path = max((folder / "experts").glob("step_*.json"))
    content = json.loads(path.read_text())
    lone = {**content["layers"][0], "layer": "model.9", "load": [1.0], "entropy": 0.0, "max_entropy": 0.0}
    path.write_text(json.dumps({**content, "layers": [*content["layers"], lone]}))
    read = read_experts(folder / "experts")
    assert read is not None and "model.9" not in [layer.layer for layer in read.last]
