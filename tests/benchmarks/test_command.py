"""Every benchmark at its smallest, by its command line."""

import pytest

from benchmarks.__main__ import main

TINY_LM = ("--size", "dense-tiny", "--layers", 1)
TINY_VIT = ("--vit-size", "tiny", "--image-size", 32)
FFN = ("ffn", "--rounds", 1, "--tokens", 4, "--dim", 6, "--copy-mib", 1)
OVERHEAD = ("overhead", "--rounds", 1, "--batch", 1, "--sequence", 4, "--images", 2, *TINY_LM, *TINY_VIT)
INFER = ("infer", "--rounds", 1, "--batches", 1, "--prompt", 3, "--new-tokens", 2, *TINY_LM, *TINY_VIT)
UNCOMPILED = ("--modes", "uncompiled")
COMPILED = ("--modes", "uncompiled", "compiled", "--compiler", "eager")


def column(rows, *names):
    return [tuple(row[name] for name in names) for row in rows]


def assert_baselines_are_one(rows, baselines):
    own = [row for row in rows if row["variant"] in baselines and row.get("implementation", "auto") == "auto"]
    assert {row["variant"] for row in own} == set(baselines)
    assert all(row.get(f"{kind} ratio", "1.000") == "1.000" for row in own for kind in ("time", "speed", "memory"))


def test_ffn(tables):
    found = tables(*FFN, "--variants", "moa", "qdmoa", *UNCOMPILED)
    for which in ("forward", "backward", "both"):
        rows = found.pop(f"ffn-layer-{which}")
        assert column(rows, "variant", "implementation") == [
            (variant, name) for variant in ("gelu", "moa", "swiglu", "qdmoa") for name in ("auto", "naive")
        ]
        assert ("peak MiB" in rows[0]) == (which != "backward")
        assert_baselines_are_one(rows, ("gelu", "swiglu"))
    assert set(found) == {"ffn-mixture-forward", "ffn-mixture-backward"}
    for copy, *rows in found.values():
        assert (copy["variant"], copy["MiB moved"], copy["x of the copy"]) == ("large copy", "2.0", "1.000")
        assert {("moa", "eager"), ("moa", "naive"), ("qdmoa", "cpu")} <= set(column(rows, "variant", "implementation"))


@pytest.mark.slow
def test_overhead(tables):
    found = tables(*OVERHEAD, "--variants", "moa", "qdmoa", *UNCOMPILED)
    for model, type_one in (("lm", "relu2"), ("mae", "gelu")):
        rows = found[f"overhead-{model}"]
        assert column(rows, "type", "variant") == [("I", type_one), ("I", "moa"), ("II", "swiglu"), ("II", "qdmoa")]
        assert_baselines_are_one(rows, (type_one, "swiglu"))
    assert column(found["overhead-lm"], "variant", "paper ms", "paper ratio", "paper MiB") == [
        ("relu2", "190", "1.00", "26571"),  # the table of arXiv:2605.26647
        ("moa", "196", "1.03", "26627"),
        ("swiglu", "196", "1.00", "28759"),
        ("qdmoa", "222", "1.13", "28873"),
    ]


@pytest.mark.slow
def test_infer(tables):
    found = tables(*INFER, "--batches", 1, 2, "--variants", "moa", "qdmoa", *UNCOMPILED)
    for task, type_one in (("vit", "gelu"), ("prefill", "relu2"), ("decode", "relu2")):
        rows = found[f"infer-{task}"]
        assert column(rows, "variant", "batch") == [
            (variant, batch)
            for variants in ((type_one, "moa"), ("swiglu", "qdmoa"))
            for batch in ("1", "2")
            for variant in variants
        ]
        assert_baselines_are_one(rows, (type_one, "swiglu"))


def test_lm(tables):
    words = ("lm", "--rounds", 1, "--batch", 2, "--tokens", 4, "--vocab", 64, *TINY_LM, *UNCOMPILED)
    found = tables(*words, "--expert-sizes", "moe-tiny", "--expert-tokens", 3)
    names = ["transformers.LlamaForCausalLM", "moa_lm, swiglu", "moa_lm, qdmoa"]
    assert [row["model"] for row in found["lm"]] == names
    assert found["lm"][0]["speed ratio"] == found["lm"][0]["memory ratio"] == "1.000"
    rows = found["lm-experts"]
    theirs = [f"transformers, {name}" for name in ("eager", "grouped_mm", "batched_mm")]
    assert [row["layer"] for row in rows] == ["dense FFN", "moa_lm.MoE", *theirs]
    assert rows[0]["time ratio"] == rows[0]["memory ratio"] == "1.000"
    assert max(float(row["speed over transformers' best"]) for row in rows[2:]) == 1


@pytest.mark.slow
def test_recipe(tables, small_shards):
    config = "configs/mae/laptop_qdmoa.yaml"
    words = ("recipe", "--rounds", 2, "--config", config, "--batch", 2, "--product-size", 16, "--batches", 1)
    product, *steps = tables(*words, "--shards", small_shards, *COMPILED)["recipe"]
    assert product["utilization"] == "1.000"
    assert column(steps, "recipe", "mode") == [("laptop_qdmoa", "uncompiled"), ("laptop_qdmoa", "compiled")]
    assert all(float(row["loader / step"]) > 0 for row in steps)


@pytest.mark.slow
def test_mae(tables):
    (rows,) = tables("mae", "--rounds", 1, "--batch", 1, "--layers", 1).values()
    assert [row["model"] for row in rows] == ["transformers.ViTMAEForPreTraining", "moa_vision, gelu"]
    assert rows[0]["speed ratio"] == rows[0]["memory ratio"] == "1.000"


def test_loader(tables, small_shards):
    (rows,) = tables("loader", "--rounds", 1, "--batches", 1, "--size", 32, "--shards", small_shards).values()
    assert len(rows) == 3 and rows[0]["speed ratio"] == "1.000"


@pytest.mark.slow
def test_saving(tables, tmp_path):
    words = ["--rounds", 1, "--batch", 1, "--layers", 1, "--steps", 1, "--folder", tmp_path, "--device", "cpu"]
    (rows,) = tables("saving", *words).values()
    assert len(rows) == 4 and rows[0]["time ratio"] == "1.000"
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.slow
def test_eval(tables):
    words = ("--size", "dense-micro", "--tasks", "openbookqa", "--limit", 3, "--shots", 0, "--batch-sizes", "1,4")
    (rows,) = tables("eval", "--rounds", 1, *words).values()
    assert column(rows, "task", "shots", "model") == [("openbookqa", "0", "hf"), ("openbookqa", "0", "moa")]
    assert rows[0]["speed ratio"] == "1.000" and rows[0]["batch"] in ("1", "4")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ffn", "--device", "nonsense"], "'nonsense' is not available"),
        (["ffn", "--rounds", "0"], "0 is below 1"),
        (["ffn", "--variants", "mish"], "mish"),
        (["ffn", "--implementations", "liger", "--device", "cpu"], "--implementations liger"),
        (["lm", "--size", "moe-tiny", "--tables", "lm"], "a dense size"),
        (["lm", "--expert-sizes", "dense-tiny", "--tables", "lm-experts"], "a size with experts"),
        (["recipe", "--batches", "1", "--config", "none.yaml"], "none.yaml"),
    ],
)
def test_wrong_options(capsys, words, message):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert message in capsys.readouterr().err
