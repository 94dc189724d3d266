"""How experts are used: what is read, said, tabulated and drawn."""

import json

import numpy as np
import pytest

from moa_eval.training.experts import read_experts, sentence
from moa_eval.training.grouping import compare
from moa_eval.training.layer_figures import expert_load, router_entropy
from moa_eval.training.reading import read_run
from moa_eval.training.tables import expert_load_rows, expert_rows
from moa_train.errors import DataError

EVEN = [0.25] * 4
UNEVEN = [0.55, 0.24, 0.2, 0.01]  # 2.2, 0.96, 0.8 and 0.04 times an even share


@pytest.fixture
def folder(make_run):
    return make_run("moe", ffn="qdmoa", experts=[EVEN, UNEVEN])


def test_records_are_read(folder):
    experts = read_experts(folder / "experts")
    assert list(experts.steps) == [20, 40]
    assert [layer.layer for layer in experts.last] == ["model.0", "model.1"]
    np.testing.assert_allclose(experts.last[1].relative, [2.2, 0.96, 0.8, 0.04])
    assert [layer.entropy for layer in experts.last] == [0.5, 0.5]
    assert (experts.last[1].dead, experts.last[1].overloaded) == (["model.1 expert 3"], ["model.1 expert 0"])
    assert (experts.last[0].dead, experts.last[0].overloaded) == ([], [])


def test_the_sentence_names_dead_and_overloaded_experts(folder):
    assert sentence("X", read_experts(folder / "experts")) == (
        "X, 8 experts in 2 layers: dead (below a tenth of an even share): model.1 expert 3; overloaded (above twice an "
        "even share): model.1 expert 0; router entropy 0.50 to 0.50 of the maximum; dropped assignments: none."
    )


def test_the_sentence_counts_dropped_assignments(make_run):
    folder = make_run("moe", ffn="qdmoa", experts=[EVEN])
    edit(folder, lambda content: content["layers"][0].update(dropped=7))
    text = sentence("X", read_experts(folder / "experts"))
    assert text.replace("\u202f", "").endswith("dropped assignments: 7 of 4000.")


def test_tables_have_all_layers_and_experts(folder):
    comparison = compare([read_run(folder)])
    rows = expert_rows(comparison)
    assert [(row["step"], row["layer"]) for row in rows] == [
        (step, f"model.{layer}") for step in (20, 40) for layer in (0, 1)
    ]
    last = rows[-1]
    assert (last["lowest_load"], last["highest_load"]) == pytest.approx((0.04, 2.2))
    assert (last["experts"], last["dead"], last["overloaded"], last["dropped"]) == (4, 1, 1, 0)
    loads = expert_load_rows(comparison)
    assert [row["expert"] for row in loads] == [0, 1, 2, 3] * 2
    assert [row["load"] for row in loads[4:]] == pytest.approx([4 * load for load in UNEVEN])


def test_figures_show_sorted_loads_and_entropy(folder):
    run = read_run(folder)
    loads = rows(expert_load(run, run.experts), "rank")
    for layer, load in (("model.0", EVEN), ("model.1", UNEVEN)):
        own = [row["load"] for row in loads if row["layer"] == layer]
        assert own == pytest.approx(sorted((4 * share for share in load), reverse=True))
    entropy = rows(router_entropy(run, run.experts), "entropy")
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
def test_an_unusable_record_is_named_in_one_line(folder, fault):
    edit(folder, FAULTS[fault])
    with pytest.raises(DataError) as caught:
        read_experts(folder / "experts")
    message = str(caught.value)
    assert message.startswith(f"{folder}/experts/step_00000040.json: ")
    assert message.endswith("; delete the folder or leave this run out") and "\n" not in message


def test_layers_with_a_single_expert_are_ignored(folder):
    path = max((folder / "experts").glob("step_*.json"))
    content = json.loads(path.read_text())
    lone = {**content["layers"][0], "layer": "model.9", "load": [1.0], "entropy": 0.0, "max_entropy": 0.0}
    path.write_text(json.dumps({**content, "layers": [*content["layers"], lone]}))
    read = read_experts(folder / "experts")
    assert read is not None and "model.9" not in [layer.layer for layer in read.last]
