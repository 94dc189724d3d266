"""Every benchmark at its smallest, by its command line: the tables' lines and columns, ratios of baselines, sums."""

import pytest

from moa_ffn import VARIANTS

TINY_LM = ("--size", "dense-tiny", "--layers", 1)
TINY_VIT = ("--vit-size", "tiny", "--image-size", 32)
COMPILED = ("--modes", "uncompiled", "compiled", "--compiler", "eager")


def column(lines, *names):
    return [tuple(line[name] for name in names) for line in lines]


def ratios_of_baselines_are_one(lines, baselines):
    own = [line for line in lines if line["variant"] in baselines and line.get("implementation", "auto") == "auto"]
    assert {line["variant"] for line in own} == set(baselines)
    for line in own:
        assert all(line.get(head, "1.000") == "1.000" for head in ("time ratio", "speed ratio", "memory ratio")), line


def test_ffn(tables):
    words = ("ffn", "--rounds", 1, "--tokens", 4, "--dim", 6, "--copy-mib", 1, "--variants", "moa", "qdmoa")
    found = tables(*words, "--modes", "uncompiled")
    assert set(found) == {f"ffn-layer-{p}" for p in ("forward", "backward", "both")} | {
        "ffn-mixture-forward",
        "ffn-mixture-backward",
    }
    for which in ("forward", "backward", "both"):
        lines = found[f"ffn-layer-{which}"]
        assert column(lines, "variant", "implementation") == [
            (variant, name) for variant in ("gelu", "moa", "swiglu", "qdmoa") for name in ("auto", "naive")
        ]
        assert ("peak MiB" in lines[0]) == (which != "backward")
        ratios_of_baselines_are_one(lines, ("gelu", "swiglu"))
    for which in ("forward", "backward"):
        copy, *lines = found[f"ffn-mixture-{which}"]
        assert (copy["variant"], copy["MiB moved"], copy["x of the copy floor"]) == ("large copy", "2.0", "1.000")
        for variant in ("moa", "qdmoa"):
            assert {line["implementation"] for line in lines if line["variant"] == variant} >= {"eager", "naive"}


@pytest.mark.slow
def test_ffn_compiled(tables):
    words = ("ffn", "--rounds", 1, "--tokens", 4, "--dim", 6, "--copy-mib", 1, "--variants", "qdmoa", *COMPILED)
    found = tables(*words, "--passes", "backward")
    lines = found["ffn-layer-backward"]
    assert column(lines, "mode", "variant", "implementation") == [
        (mode, variant, name)
        for mode in ("uncompiled", "compiled")
        for variant in ("swiglu", "qdmoa")
        for name in ("auto", "naive")
    ]
    ratios_of_baselines_are_one(lines, ("swiglu",))
    described = column(found["ffn-mixture-backward"], "implementation", "mode", "hidden", "hidden tensor")
    for mode in ("uncompiled", "compiled"):
        assert ("eager", mode, "16", "recomputed") in described and ("naive", mode, "16", "stored") in described


@pytest.mark.slow
def test_every_variant_has_a_line(tables):
    words = (
        "ffn",
        "--rounds",
        1,
        "--tokens",
        2,
        "--dim",
        6,
        "--modes",
        "uncompiled",
        "--parts",
        "layer",
        "--passes",
        "both",
    )
    lines = tables(*words, "--implementations", "eager")["ffn-layer-both"]
    assert {line["variant"] for line in lines} == set(VARIANTS)
    assert {line["implementation"] for line in lines} == {"auto", "eager"}
    assert {line["hidden"] for line in lines} == {"16", "24"}
    ratios_of_baselines_are_one(lines, ("gelu", "swiglu"))


@pytest.mark.slow
def test_overhead(tables):
    words = ("overhead", "--rounds", 1, "--batch", 1, "--sequence", 4, "--images", 2, *TINY_LM, *TINY_VIT)
    found = tables(*words, "--variants", "moa", "qdmoa", "--modes", "uncompiled")
    for model, type_one in (("lm", "relu2"), ("mae", "gelu")):
        lines = found[f"overhead-{model}"]
        expected = [("I", type_one), ("I", "moa"), ("II", "swiglu"), ("II", "qdmoa")]
        assert column(lines, "type", "variant") == expected
        ratios_of_baselines_are_one(lines, (type_one, "swiglu"))
    paper = column(found["overhead-lm"], "variant", "paper ms", "paper ratio", "paper MiB")
    assert paper == [  # the table of arXiv:2605.26647
        ("relu2", "190", "1.00", "26571"),
        ("moa", "196", "1.03", "26627"),
        ("swiglu", "196", "1.00", "28759"),
        ("qdmoa", "222", "1.13", "28873"),
    ]
    assert "paper ms" not in found["overhead-mae"][0]


@pytest.mark.slow
def test_overhead_in_both_modes(tables):
    words = ("overhead", "--rounds", 1, "--batch", 1, "--sequence", 4, "--images", 2, *TINY_LM, *TINY_VIT, *COMPILED)
    found = tables(*words, "--variants", "swiglu")
    for lines in found.values():
        assert column(lines, "variant", "mode", "time ratio", "memory ratio") == [
            ("swiglu", mode, "1.000", "1.000") for mode in ("uncompiled", "compiled")
        ]


@pytest.mark.slow
def test_infer(tables):
    words = ("infer", "--rounds", 1, "--batches", 1, 2, "--prompt", 3, "--new-tokens", 2, *TINY_LM, *TINY_VIT)
    found = tables(*words, "--variants", "moa", "qdmoa", "--modes", "uncompiled")
    for task, type_one in (("vit", "gelu"), ("prefill", "relu2"), ("decode", "relu2")):
        lines = found[f"infer-{task}"]
        assert column(lines, "variant", "batch") == [
            (variant, batch)
            for variants in ((type_one, "moa"), ("swiglu", "qdmoa"))
            for batch in ("1", "2")
            for variant in variants
        ]
        ratios_of_baselines_are_one(lines, (type_one, "swiglu"))
    assert "images/s" in found["infer-vit"][0] and "median ms/token" in found["infer-decode"][0]


@pytest.mark.slow
def test_infer_compiled(tables):
    words = ("infer", "--rounds", 1, "--batches", 1, "--prompt", 3, "--new-tokens", 2, *TINY_LM, *TINY_VIT)
    found = tables(*words, "--variants", "swiglu", "--modes", "compiled", "--compiler", "eager")
    assert len(found) == 3
    assert all(column(lines, "variant", "mode") == [("swiglu", "compiled")] for lines in found.values())


@pytest.mark.slow
def test_recipe(tables, small_shards):
    config = "configs/mae/laptop_qdmoa.yaml"
    words = ("recipe", "--rounds", 2, "--config", config, "--batch", 2, "--product-size", 16, "--batches", 1)
    found = tables(*words, "--shards", small_shards, *COMPILED)
    product, *steps = found["recipe"]
    assert product["utilization"] == "1.000"
    assert column(steps, "recipe", "mode") == [("laptop_qdmoa", "uncompiled"), ("laptop_qdmoa", "compiled")]
    assert all(float(line["loader / step"]) > 0 for line in steps)
    parts = {line["part"]: line for line in found["recipe-parts"]}
    assert list(parts)[-3:] == ["optimizer", "remainder", "step"] and len(parts) == 12
    shares = {name: float(line["share"].removesuffix("%")) for name, line in parts.items()}
    assert shares.pop("step") == 100
    assert sum(shares.values()) == pytest.approx(100, abs=0.05 * len(shares) + 1e-9)  # each is rounded
    work = [float(parts[name]["GFLOP"]) for name in ("encoder attention", "encoder FFN", "step")]
    assert work[0] + work[1] < work[2]


@pytest.mark.slow
def test_mae(tables):
    (found,) = tables("mae", "--rounds", 1, "--batch", 1, "--layers", 1).values()
    assert [line["model"] for line in found] == ["transformers.ViTMAEForPreTraining", "moa_vision, gelu"]
    assert found[0]["speed ratio"] == found[0]["memory ratio"] == "1.000"


def test_lm(tables):
    words = ("lm", "--rounds", 1, "--batch", 2, "--tokens", 4, "--vocab", 64, *TINY_LM, "--modes", "uncompiled")
    found = tables(*words, "--expert-sizes", "moe-tiny", "--expert-tokens", 3)
    assert set(found) == {"lm", "lm-experts"}
    assert column(found["lm"], "model") == [
        ("transformers.LlamaForCausalLM",),
        ("moa_lm, swiglu",),
        ("moa_lm, qdmoa",),
    ]
    assert found["lm"][0]["speed ratio"] == found["lm"][0]["memory ratio"] == "1.000"
    names = [
        ("dense FFN",),
        ("moa_lm.MoE",),
        *((f"transformers, {n}",) for n in ("eager", "grouped_mm", "batched_mm")),
    ]
    lines = found["lm-experts"]
    assert column(lines, "layer") == names and {line["size"] for line in lines} == {"moe-tiny"}
    assert lines[0]["time ratio"] == lines[0]["memory ratio"] == "1.000"
    against = [float(line["speed over transformers' best"]) for line in lines[2:]]
    assert max(against) == 1


@pytest.mark.slow
def test_lm_in_both_modes(tables):
    words = ("lm", "--rounds", 1, "--batch", 1, "--tokens", 4, "--vocab", 64, *TINY_LM, *COMPILED)
    found = tables(*words, "--variants", "swiglu", "--tables", "lm")
    assert column(found["lm"], "model", "mode") == [
        (model, mode)
        for model in ("transformers.LlamaForCausalLM", "moa_lm, swiglu")
        for mode in ("uncompiled", "compiled")
    ]
    assert [line["speed ratio"] for line in found["lm"][:2]] == ["1.000", "1.000"]


def test_loader(tables, small_shards):
    (found,) = tables("loader", "--rounds", 1, "--batches", 1, "--size", 32, "--shards", small_shards).values()
    assert len(found) == 3 and found[0]["speed ratio"] == "1.000"


@pytest.mark.slow
def test_saving(tables, tmp_path):
    words = ["--rounds", 1, "--batch", 1, "--layers", 1, "--steps", 1, "--folder", tmp_path, "--device", "cpu"]
    (found,) = tables("saving", *words).values()
    assert [line["what"].rpartition(" ")[2] for line in found] == ["steps", "them", "them", "alone"]
    assert found[0]["time ratio"] == "1.000" and not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_startup(tables):
    (found,) = tables("startup", "--rounds", 1).values()
    assert [line["what"].split(",")[0] for line in found] == ["python -c pass", "python -c pass", "the line alone"]


@pytest.mark.parametrize(
    "name", ["ffn", "overhead", "infer", "lm", "mae", "recipe", "loader", "saving", "startup", "eval", "all"]
)
def test_each_benchmark_explains_itself(script, capsys, name):
    with pytest.raises(SystemExit) as stop:
        script.main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"{name} [-h]" in text and "--rounds" in text
    assert ("--prompt" in text) == (name == "infer") and ("--hub" in text) == (name == "eval")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ffn", "--device", "nonsense"], "nonsense"),
        (["ffn", "--rounds", "0"], "0 is below 1"),
        (["ffn", "--variants", "swish"], "swish"),
        (["ffn", "--implementations", "liger", "--device", "cpu", "--tokens", "2", "--dim", "6"], "liger"),
        (["overhead", "--size", "huge", "--device", "cpu"], "size='huge' is not one of"),
        (["lm", "--size", "moe-tiny", "--tables", "lm"], "--size moe-tiny has experts"),
        (["lm", "--expert-sizes", "dense-tiny", "--tables", "lm-experts"], "--expert-sizes dense-tiny is dense"),
        (["recipe", "--batches", "1", "--config", "none.yaml"], "none.yaml"),
    ],
)
def test_what_cannot_be_is_said(script, capsys, words, said):
    with pytest.raises(SystemExit) as stop:
        script.main(words)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_all_runs_everything_with_what_it_was_given(script, monkeypatch, tmp_path):
    seen = {}
    for name, module in script.BENCHMARKS.items():
        monkeypatch.setattr(module, "run", lambda args, name=name: seen.update({name: args}))
    script.main(["all", "--rounds", "3", "--device", "cpu", "--out", str(tmp_path)])
    assert list(seen) == list(script.BENCHMARKS)
    assert {seen[name].rounds for name in seen if name != "eval"} == {3} and seen["eval"].rounds == 2
    assert all(args.out == tmp_path for name, args in seen.items() if name != "eval")
    assert seen["overhead"].modes == ("uncompiled", "compiled") and seen["overhead"].sequence == 256
