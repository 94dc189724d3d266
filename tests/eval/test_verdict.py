import re

import pytest
from scipy import stats

from moa_eval.training.comparison import compare
from moa_eval.training.reading import read_run
from moa_eval.training.verdict import caveats, verdict

MOA = "vit_tiny_patch4_qdmoa"


def say(folders):
    comparison = compare([read_run(folder) for folder in folders])
    return [" ".join(part.split()) for part in verdict(comparison)], "\n".join(caveats(comparison))


def test_one_seed_is_not_evidence(make_run):
    folders = [make_run("a", final=0.5), make_run("b", encoder=MOA, final=0.4)]
    a, b = (read_run(folder).validation["loss_norm"][-1] for folder in folders)
    sentences, notes = say(folders)
    assert sentences == [
        f"qd-MoA is {a - b:.4f} ({(a - b) / a:.2%}".replace("%", " %") + ") below SwiGLU in validation reconstruction "
        f"loss: {b:.4f} against {a:.4f} after 2 560 images (normalized space).",
        "One seed: not evidence of a general difference.",
    ]
    assert notes == ""


def test_a_worse_ffn_is_called_above(make_run):
    sentences, _ = say([make_run("a", final=0.4), make_run("b", encoder=MOA, final=0.5)])
    assert re.match(r"qd-MoA is 0\.\d{4} \(\d\d\.\d\d %\) above SwiGLU", sentences[0])


@pytest.mark.parametrize(("gap", "words"), [(0.1, "excludes zero"), (0.0, "includes zero")])
def test_seeds_give_an_interval(make_run, gap, words):
    folders = [make_run(f"a{seed}", seed=seed, final=0.5) for seed in range(3)]
    folders += [make_run(f"b{seed}", seed=seed, encoder=MOA, final=0.5 - gap) for seed in range(3)]
    sentences, _ = say(folders)
    assert "on average" in sentences[0]
    assert sentences[1].startswith("The 95 % interval over 3 paired seeds, ")
    assert words in sentences[1]


def test_the_side_with_one_seed_is_named(make_run):
    folders = [make_run("a0"), make_run("b0", encoder=MOA, seed=0), make_run("b1", encoder=MOA, seed=1)]
    assert say(folders)[0][1] == "One seed of SwiGLU: not evidence of a general difference."


@pytest.mark.parametrize(
    ("final", "words"),
    [(0.3, "MoA, the lowest of 2 alternatives, is "), (0.7, "MoA, the nearest of 2 alternatives, is ")],
    ids=["below", "above"],
)
def test_the_best_of_several_is_said_to_be_picked_and_its_interval_widened(make_run, final, words):
    runs = {
        name: [make_run(f"{name}{seed}", encoder=f"vit_tiny_patch4_{name}", seed=seed, final=own) for seed in range(3)]
        for name, own in (("swiglu", 0.5), ("qdmoa", final + 0.1), ("moa", final))
    }
    sentences, notes = say([folder for own in runs.values() for folder in own])
    assert sentences[0].startswith(words)
    assert "the best of 2 alternatives" in notes
    finals = {name: [read_run(folder).validation["loss_norm"][-1] for folder in own] for name, own in runs.items()}
    limits = stats.ttest_rel(finals["moa"], finals["swiglu"]).confidence_interval(1 - 0.05 / 2)
    shown = f"{limits.low:+.4f} to {limits.high:+.4f}".replace("-", "−")
    assert f"over 3 paired seeds, widened for 2 alternatives, {shown}, " in sentences[1]


def sweep(make_run, finals):
    """Folders of one SwiGLU run and of runs by (rate, seed) of qd-MoA."""
    return [make_run("base", lr=1e-3, final=0.5)] + [
        make_run(f"moa_{rate}_{seed}", encoder=MOA, lr=rate, seed=seed, final=final)
        for (rate, seed), final in finals.items()
    ]


def test_the_best_rates_are_said_and_how_they_were_picked(make_run):
    folders = sweep(make_run, {(1e-3, 0): 0.48, (2e-3, 0): 0.4, (4e-3, 0): 0.45})
    a, b = (read_run(folders[index]).validation["loss_norm"][-1] for index in (0, 2))
    sentences, notes = say(folders)
    assert sentences[0].startswith(f"qd-MoA at its best rate (2e-3) is {a - b:.4f} (")
    assert ") below SwiGLU in validation" in sentences[0]
    assert (
        "The best rate is picked by the validation loss that is reported, of 1 (SwiGLU), 3 (qd-MoA) rates: "
        "more rates flatter, and intervals take the pick as given."
    ) in notes
    assert "tried: a" not in notes  # 2e-3 lies inside
    assert "At equal rates qd-MoA is below SwiGLU at 1 of 1: −0.0" in notes
    assert "Peak learning rates differ" not in notes


def test_a_rate_that_is_still_being_trained_is_not_compared(make_run):
    folders = sweep(make_run, {(2e-3, 0): 0.4})
    folders.append(make_run("short", encoder=MOA, lr=1e-3, final=0.4, steps=30, status=None))
    notes = say(folders)[1]
    assert "qd-MoA and SwiGLU have no rate in common at which both came to the end." in notes
    assert "Unfinished: qd-MoA, lr 1e-3 (1 920 images)." in " ".join(notes.split())


def test_a_study_in_progress_is_provisional(make_run):
    folders = sweep(make_run, {(1e-3, 0): 0.4, (2e-3, 0): 0.45})
    assert "Provisional" not in say(folders)[0][1]
    folders.append(make_run("short", encoder=MOA, lr=4e-3, final=0.1, steps=30, status=None))
    assert say(folders)[0][1] == (
        "Provisional: 1 of 4 runs are unfinished. One seed: not evidence of a general difference."
    )


def test_another_speed_is_said(make_run):
    folders = [make_run("a"), make_run("b", encoder=MOA)]
    path = folders[1] / "summary.json"
    path.write_text(path.read_text().replace('"throughput": 120.0', '"throughput": 60.0'))
    assert (
        "qd-MoA sees 0.50× as many images a second as SwiGLU: losses are compared after the same number of images, "
        "not after the same time."
    ) in say(folders)[1]


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ((0.40, 0.45), "The best rate of qd-MoA, 1e-3, is the lowest tried: a lower one may be better."),
        ((0.45, 0.40), "The best rate of qd-MoA, 2e-3, is the highest tried: a higher one may be better."),
    ],
    ids=["lowest", "highest"],
)
def test_a_best_rate_at_the_edge_is_said_to_be(make_run, losses, words):
    folders = sweep(make_run, {(rate, 0): loss for rate, loss in zip((1e-3, 2e-3), losses, strict=True)})
    assert words in say(folders)[1]


def test_rates_with_unequal_seeds_are_named(make_run):
    folders = sweep(make_run, {(1e-3, 0): 0.4, (1e-3, 1): 0.4, (2e-3, 0): 0.5})
    assert "The rates of qd-MoA were tried with 1 to 2 seeds." in say(folders)[1]


def test_a_contender_without_a_good_rate_is_named(make_run):
    folders = [make_run("base", lr=1e-3)]
    folders += [make_run(f"moa{rate}", encoder=MOA, lr=rate, nan_from=20) for rate in (1e-3, 2e-3)]
    sentences, notes = say(folders)
    assert sentences[0].startswith("No other FFN shares a validation of finite loss with SwiGLU")
    assert "qd-MoA has no rate at which every run came to the end with a finite loss." in notes
    assert "left out: qd-MoA, lr 1e-3 (step 20) and qd-MoA, lr 2e-3 (step 20)." in notes
    turned = [*folders[1:], folders[0]]
    assert say(turned)[0] == [
        "qd-MoA has no rate at which every run came to the end with a finite loss: there is nothing to compare with."
    ]


def test_a_language_model_has_a_loss_over_tokens(make_run):
    folders = [make_run("a", ffn="swiglu", final=3.2), make_run("b", ffn="qdmoa", final=3.1)]
    sentences, notes = say(folders)
    assert re.fullmatch(
        r"qd-MoA is 0\.\d{4} \(\d\.\d\d %\) below SwiGLU in validation loss: 3\.\d{4} against 3\.\d{4} "
        r"after 2 560 tokens \(cross-entropy\)\.",
        sentences[0],
    )
    assert notes == ""


def test_what_the_encoders_are_worth_is_said_beside_the_loss(make_run):
    folders = [
        make_run(f"{name}{seed}", encoder=f"vit_tiny_patch4_{name}", seed=seed, probes={"knn": base + 0.01 * seed})
        for name, base in (("swiglu", 0.5), ("qdmoa", 0.54))
        for seed in (0, 1)
    ]
    assert (
        "qd-MoA's encoder is 4.00 points above SwiGLU's in k-nearest-neighbour accuracy (knn): 54.50 % against "
        "50.50 % (95 % interval +4.00 to +4.00)."
    ) in say(folders)[1]
    path = folders[0] / "probe/knn.json"
    path.write_text(path.read_text().replace('{"k": 20}', '{"k": 10}'))
    assert "The runs were not all measured in the same way in knn: settings differ." in say(folders)[1]


def test_incomparable_runs_are_no_evidence(make_run):
    sentences, _ = say([make_run("a"), make_run("b", encoder=MOA, changes={"data.train": "other"})])
    assert sentences[1] == "The runs are not comparable as they stand: this is no evidence about the FFN."


def test_a_diverged_run_is_left_out_and_named(make_run):
    folders = [make_run("a"), make_run("b", encoder=MOA, nan_from=25)]
    sentences, notes = say(folders)
    assert sentences == [
        "No other FFN shares a validation of finite loss with SwiGLU: there is no difference to report."
    ]
    assert "Diverged, with a loss or gradient that is not finite, and left out: qd-MoA (step 25)." in notes


def test_one_run_stands_alone(make_run):
    folder = make_run("a")
    loss = read_run(folder).validation["loss_norm"][-1]
    assert say([folder])[0] == [
        f"SwiGLU has a validation reconstruction loss of {loss:.4f} (normalized space); "
        "there is nothing to compare it with."
    ]


def test_a_run_without_validation_has_nothing_to_say(make_run):
    sentences, notes = say([make_run("a", steps=5, status=None)])
    assert sentences == ["SwiGLU has no validation of finite loss, and there is nothing to compare it with."]
    assert notes == "Unfinished: SwiGLU (320 images)."


def test_what_else_differs_is_said(make_run):
    changes = {"optim.weight_decay": 0.1, "model.encoder_args": {"embed_dim": 96, "depth": 2}}
    folders = [make_run("a"), make_run("b", encoder=MOA, lr=1.2e-3, seed=1, mixing=50_000, changes=changes)]
    notes = say(folders)[1]
    assert "Peak learning rates differ: 3e-4 (SwiGLU, embed_dim 64), 1.2e-3 (qd-MoA, embed_dim 96)." in notes
    assert "(optim.weight_decay and model.encoder_args.embed_dim)" in notes
    assert "Seeds differ: 0 (SwiGLU, embed_dim 64), 1 (qd-MoA, embed_dim 96)." in notes
    assert "qd-MoA, embed_dim 96 has 1.05× the parameters of SwiGLU, embed_dim 64." in notes


def test_the_verdict_follows_the_training_objective_and_names_a_contradiction(make_run):
    pixel = {"model.norm_pix_loss": False}
    folders = [make_run("a", changes=pixel), make_run("b", encoder=MOA, final=0.4, changes=pixel)]
    for folder in folders[1:]:  # better in pixel space, worse in normalized space
        path = folder / "metrics.jsonl"
        path.write_text(re.sub(r'"loss_norm": [0-9.]+', '"loss_norm": 0.9', path.read_text()))
    sentences, notes = say(folders)
    assert "below SwiGLU" in sentences[0]
    assert "(pixel space)" in sentences[0]
    assert "In normalized space qd-MoA has the other sign: +" in notes


def test_a_summary_that_contradicts_the_rows_is_named(make_run):
    folder = make_run("a")
    path = folder / "summary.json"
    path.write_text(re.sub(r'"loss_norm": [0-9.]+', '"loss_norm": 0.1234', path.read_text()))
    assert "summary.json has another final loss than metrics.jsonl" in say([folder])[1]


def ladder(make_run, gains, seeds):
    """Folders of language models: SwiGLU and the FFNs with their gains, at three sizes."""
    return [
        make_run(
            f"{size}{ffn}{seed}", ffn=ffn, seed=seed, final=final - gain,
            changes={"model.size": size, "optim.lr": rate},
        )
        for size, final, rate in (("dense-0.12b", 3.4, 3e-3), ("dense-0.25b", 3.1, 2e-3), ("dense-0.5b", 2.8, 1e-3))
        for ffn, gain in ({"swiglu": 0.0} | gains).items()
        for seed in range(seeds)
    ]  # fmt: skip


def test_over_sizes_differences_are_named_size_by_size(make_run):
    sentences, notes = say(ladder(make_run, {"qdmoa": 0.1, "onemoa": 0.05}, seeds=1))
    assert re.fullmatch(
        r"qd-MoA, the lowest of 2 alternatives on average, is below SwiGLU at 3 of 3 sizes in validation loss: "
        r"−0\.\d{4} \(dense-0\.12b\), −0\.\d{4} \(dense-0\.25b\) and −0\.\d{4} \(dense-0\.5b\)\.",
        sentences[0],
    )
    assert sentences[1] == "One seed: not evidence of a general difference."
    assert "More than FFN" not in notes
    assert "the best of 2 alternatives" in notes


@pytest.mark.parametrize(("gain", "sure"), [(0.5, 3), (0.0, 0)], ids=["large", "none"])
def test_over_sizes_intervals_are_widened_for_all_comparisons(make_run, gain, sure):
    sentences, _ = say(ladder(make_run, {"qdmoa": gain}, seeds=4))
    assert sentences[1] == (
        f"The 95 % interval over seeds, widened for 3 comparisons, excludes zero at {sure} of 3 sizes."
    )


def test_what_parameters_alone_bring_is_said_beside_the_mixture(make_run):
    counts = {
        ("dense-0.12b", "swiglu"): 1_000_000,
        ("llama-large", "swiglu"): 1_000_500,
        ("dense-0.12b", "bimoa"): 1_000_480,
    }
    folders = [
        make_run(f"{size}{ffn}", ffn=ffn, changes={"model.size": size}, parameters={"total": count})
        for (size, ffn), count in counts.items()
    ]
    wide, mixed = (f"{gap:+.4f}".replace("-", "−") for gap in (last(folders[i]) - last(folders[0]) for i in (1, 2)))
    notes = say(folders)[1]
    assert (
        f"Parameters against gain over SwiGLU, dense-0.12b: SwiGLU, llama-large {wide} for +0.05 % parameters and "
        f"bi-MoA {mixed} for +0.05 % parameters."
    ) in notes
    assert "More than FFN" not in notes  # llama-large is a wider FFN and nothing else


def last(folder):
    return read_run(folder).validation["loss"][-1]


def test_schedules_and_optimizers_that_differ_are_named_for_whom_they_concern(make_run):
    wsd = {
        "schedule.decay_fraction": 0.2,
        "schedule.decay_type": "1-sqrt",
        "start_from": "runs/x/checkpoints/step_10",
    }
    folders = [make_run("a", ffn="swiglu"), make_run("b", ffn="moa"), make_run("c", ffn="qdmoa", changes=wsd)]
    notes = say(folders)[1]
    assert (
        "More than FFN and peak rate differs for qd-MoA (start_from, schedule.decay_fraction and schedule.decay_type): "
    ) in notes
    begun = "Begun with a checkpoint of another run: qd-MoA; its rows begin there, tokens, FLOPs and time count from "
    assert f"{begun}the start of that run." in notes


def test_many_best_rates_at_an_edge_are_counted(make_run):
    folders = [
        make_run(f"{ffn}{rate}", ffn=ffn, lr=rate, final=3 - 10 * rate)
        for ffn in ("swiglu", "onemoa", "bimoa", "qdmoa", "gelu")
        for rate in (1e-3, 2e-3, 4e-3)
    ]
    assert (
        "The best rate is at the edge of those tried for 5 of 5 (the highest for 5): a better one may lie beyond."
    ) in say(folders)[1]
