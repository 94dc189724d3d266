import json

import pytest

from moa_eval.training.experts import read_experts, sentence
from moa_eval.training.grouping import compare
from moa_eval.training.reading import read_run
from moa_eval.training.tables import make_tables
from moa_train.errors import DataError

EVEN = [0.25] * 4
UNEVEN = [0.55, 0.24, 0.2, 0.01]  # 2.2, 0.96, 0.8 and 0.04 times an even share


@pytest.fixture
def folder(make_run):
    return make_run("moe", ffn="qdmoa", experts=[EVEN, UNEVEN])


def edit(folder, change):
    path = folder / "experts/step_00000040.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["layers"][0].pop("entropy"),
        lambda content: content["layers"][0].update(load=[4, 4, 2]),
        lambda content: content["layers"][0].update(max_entropy=0.0),
    ],
    ids=["no entropy", "no shares", "no maximum"],
)
def test_an_unusable_record_is_named_in_one_line(folder, change):
    edit(folder, change)
    with pytest.raises(DataError) as caught:
        read_experts(folder / "experts")
    message = str(caught.value)
    assert message.startswith(f"{folder}/experts/step_00000040.json") and "\n" not in message


def test_a_row_has_loads_and_entropy_of_a_layer(folder):
    lone = {"layer": "model.9", "load": [1.0], "entropy": 0.0, "max_entropy": 0.0}
    edit(folder, lambda content: content["layers"].append(content["layers"][0] | lone))  # is not routed
    tables = make_tables(compare([read_run(folder)]))
    rows = tables["experts"]
    assert [(row["step"], row["layer"]) for row in rows] == [
        (20, "model.0"), (20, "model.1"), (40, "model.0"), (40, "model.1"),
    ]  # fmt: skip
    assert (rows[3]["lowest_load"], rows[3]["highest_load"], rows[3]["entropy"]) == pytest.approx((0.04, 2.2, 0.5))
    assert (rows[3]["experts"], rows[3]["dead"], rows[3]["overloaded"], rows[3]["dropped"]) == (4, 1, 1, 0)
    assert [row["load"] for row in tables["expert_load"][4:8]] == pytest.approx([4 * load for load in UNEVEN])


def test_the_sentence_counts_dead_and_overloaded_experts(folder):
    edit(folder, lambda content: content["layers"][0].update(dropped=7))
    assert sentence("X", read_experts(folder / "experts")).replace("\u202f", "") == (
        "X, 8 experts in 2 layers: dead (below a tenth of an even share): 1; overloaded (above twice an even share): "
        "1; router entropy 0.50 to 0.50 of the maximum; dropped assignments: 7 of 8000."
    )
