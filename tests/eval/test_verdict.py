import json
import re

import pytest
from scipy import stats

from moa_eval.training.grouping import compare
from moa_eval.training.reading import read_run
from moa_eval.training.verdict import caveats, verdict

MOA = "vit_tiny_patch4_qdmoa"


def report(folders):
    """Return the sentences of the verdict, and the caveats as one text."""
    comparison = compare([read_run(folder) for folder in folders])
    return [" ".join(part.split()) for part in verdict(comparison)], "\n".join(caveats(comparison))


def final(folder, loss="loss_norm"):
    return read_run(folder).validation[loss][-1]


def signed(value):
    return f"{value:+.4f}".replace("-", "−")


def test_one_seed_is_no_evidence(make_run):
    folders = [make_run("a", final=0.5), make_run("b", encoder=MOA, final=0.4)]
    a, b = map(final, folders)
    assert report(folders) == (
        [
            f"qd-MoA is {a - b:.4f} ({100 * (a - b) / a:.2f} %) below SwiGLU in validation reconstruction loss: "
            f"{b:.4f} against {a:.4f} after 2 560 images (normalized space).",
            "One seed: no evidence of a general difference.",
        ],
        "",
    )


def test_other_seeds_are_not_paired(make_run):
    runs = [make_run(f"a{seed}", seed=seed) for seed in (0, 1, 2)]
    runs += [make_run(f"b{seed}", seed=seed, encoder="vit_tiny_patch4_qdmoa") for seed in (3, 4)]
    assert report(runs)[0][1].startswith("The 95 % interval over 2 and 3 unpaired seeds, ")


@pytest.mark.parametrize(
    ("gap", "words"), [(0.1, "excludes zero: in this setting, the lower loss"), (0.0, "includes zero: these seeds")]
)
def test_seeds_give_an_interval(make_run, gap, words):
    folders = [make_run(f"a{seed}", seed=seed, final=0.5) for seed in range(3)]
    folders += [make_run(f"b{seed}", seed=seed, encoder=MOA, final=0.5 - gap) for seed in range(3)]
    sentences, _ = report(folders)
    assert "on average" in sentences[0]
    assert sentences[1].startswith("The 95 % interval over 3 paired seeds, ") and words in sentences[1]


@pytest.mark.parametrize(("loss", "words"), [(0.3, "lowest"), (0.7, "nearest")])
def test_the_interval_of_the_best_of_several_is_widened(make_run, loss, words):
    runs = {
        name: [make_run(f"{name}{seed}", encoder=f"vit_tiny_patch4_{name}", seed=seed, final=own) for seed in range(3)]
        for name, own in (("swiglu", 0.5), ("qdmoa", loss + 0.1), ("moa", loss))
    }
    sentences, notes = report([folder for own in runs.values() for folder in own])
    assert sentences[0].startswith(f"MoA, the {words} of 2 alternatives, is ")
    assert "the best of 2 alternatives" in notes
    finals = {name: [final(folder) for folder in own] for name, own in runs.items()}
    limits = stats.ttest_rel(finals["moa"], finals["swiglu"]).confidence_interval(1 - 0.05 / 2)
    interval = f"over 3 paired seeds, widened for 2 alternatives, {signed(limits.low)} to {signed(limits.high)}, "
    assert interval in sentences[1]


def sweep(make_run, finals):
    """Return folders of one SwiGLU run and of qd-MoA runs by (learning rate, seed)."""
    return [make_run("base", lr=1e-3, final=0.5)] + [
        make_run(f"moa_{rate}_{seed}", encoder=MOA, lr=rate, seed=seed, final=final)
        for (rate, seed), final in finals.items()
    ]


def test_the_best_rate_and_its_selection_are_reported(make_run):
    folders = sweep(make_run, {(1e-3, 0): 0.48, (2e-3, 0): 0.4, (4e-3, 0): 0.45})
    sentences, notes = report(folders)
    assert sentences[0].startswith(
        f"qd-MoA at its best learning rate (2e-3) is {final(folders[0]) - final(folders[2]):.4f} ("
    )
    assert "the one with the lowest reported loss, of 1 to 3 tried." in notes
    assert "At equal learning rates, qd-MoA is below SwiGLU at 1 of 1: −0.0" in notes
    assert "at the edge" not in notes and "Peak learning rates differ" not in notes


@pytest.mark.parametrize(("losses", "words"), [((0.40, 0.45), "1e-3, lowest"), ((0.45, 0.40), "2e-3, highest")])
def test_a_best_rate_at_the_edge_is_reported(make_run, losses, words):
    folders = sweep(make_run, {(rate, 0): loss for rate, loss in zip((1e-3, 2e-3), losses, strict=True)})
    assert f"at the edge of the tried ones: qd-MoA ({words}). A better rate may lie beyond." in report(folders)[1]


def test_an_unfinished_rate_is_not_compared_and_makes_the_verdict_provisional(make_run):
    folders = sweep(make_run, {(2e-3, 0): 0.4})
    folders.append(make_run("short", encoder=MOA, lr=1e-3, final=0.4, steps=30, status=None))
    sentences, notes = report(folders)
    assert sentences[1].startswith("Provisional: 1 of 3 runs are unfinished. One seed: ")
    assert "qd-MoA and SwiGLU have no learning rate in common at which both finished." in notes
    assert "Unfinished: qd-MoA, lr 1e-3 (1 920 images)." in " ".join(notes.split())


def test_a_method_that_diverged_at_all_rates_has_no_difference(make_run):
    folders = [make_run("base", lr=1e-3)]
    folders += [make_run(f"moa{rate}", encoder=MOA, lr=rate, nan_from=20) for rate in (1e-3, 2e-3)]
    sentences, notes = report(folders)
    assert sentences == [
        "No alternative shares a validation with finite losses with SwiGLU: there is no difference to report."
    ]
    assert "qd-MoA has no learning rate at which all runs finished with finite losses." in notes
    assert "left out: qd-MoA, lr 1e-3 (step 20), qd-MoA, lr 2e-3 (step 20)." in notes
    assert report([*folders[1:], folders[0]])[0][0].startswith("qd-MoA has no learning rate at which all runs finished")


def test_a_lower_throughput_is_reported(make_run):
    folders = [make_run("a"), make_run("b", encoder=MOA)]
    path = folders[1] / "summary.json"
    path.write_text(path.read_text().replace('"throughput": 120.0', '"throughput": 60.0'))
    assert "qd-MoA has 0.50× the throughput of SwiGLU: losses are compared after equal images" in report(folders)[1]


def test_other_code_versions_and_devices_are_reported(make_run):
    folders = [make_run("a"), make_run("b", encoder=MOA)]
    environment = {"git_commit": "456789abc" + "0" * 31 + "-dirty", "device": "an accelerator"}
    (folders[1] / "env.json").write_text(json.dumps(environment))
    notes = report(folders)[1]
    assert "Code versions differ: 0123abc (SwiGLU), 456789abc-dirty (qd-MoA)." in notes
    assert "Devices differ, so speed and memory are not comparable: a processor (SwiGLU), an accelerator" in notes


def test_encoder_accuracy_is_reported_with_the_loss(make_run):
    folders = [
        make_run(f"{name}{seed}", encoder=f"vit_tiny_patch4_{name}", seed=seed, probes={"knn": base + 0.01 * seed})
        for name, base in (("swiglu", 0.5), ("qdmoa", 0.54))
        for seed in (0, 1)
    ]
    assert (
        "The encoder of qd-MoA is 4.00 points above that of SwiGLU in accuracy (knn): 54.50 % against 50.50 % "
        "(95 % interval +4.00 to +4.00)."
    ) in report(folders)[1]


def test_incomparable_runs_are_no_evidence(make_run):
    sentences, _ = report([make_run("a"), make_run("b", encoder=MOA, changes={"data.train": "other"})])
    assert sentences[1] == "The runs are not comparable: the difference is no evidence about the FFN."


def test_a_single_run_has_its_loss(make_run):
    folder = make_run("a")
    assert report([folder])[0] == [
        f"SwiGLU has a validation reconstruction loss of {final(folder):.4f} (normalized space). "
        "There is no alternative to compare it with."
    ]


def test_a_run_without_validation_has_no_loss(make_run):
    sentences, notes = report([make_run("a", steps=5, status=None)])
    assert sentences == ["SwiGLU has no validation with finite losses, and there is no alternative to compare it with."]
    assert notes == "Unfinished: SwiGLU (320 images)."


def test_other_differences_are_reported(make_run):
    changes = {"optim.weight_decay": 0.1, "model.encoder_args": {"embed_dim": 96, "depth": 2}}
    folders = [make_run("a"), make_run("b", encoder=MOA, lr=1.2e-3, seed=1, mixing=50_000, changes=changes)]
    notes = report(folders)[1]
    assert "Peak learning rates differ: 3e-4 (SwiGLU, embed_dim 64), 1.2e-3 (qd-MoA, embed_dim 96)." in notes
    assert "(optim.weight_decay, model.encoder_args.embed_dim): the difference may have more than one cause." in notes
    assert "Seeds differ: 0 (SwiGLU, embed_dim 64), 1 (qd-MoA, embed_dim 96)." in notes
    assert "qd-MoA, embed_dim 96 has 1.05× the parameters of SwiGLU, embed_dim 64." in notes


def test_the_verdict_is_on_the_training_objective_and_another_sign_is_reported(make_run):
    pixel = {"model.norm_pix_loss": False}
    folders = [make_run("a", changes=pixel), make_run("b", encoder=MOA, final=0.4, changes=pixel)]
    path = folders[1] / "metrics.jsonl"
    path.write_text(re.sub(r'"loss_norm": [0-9.]+', '"loss_norm": 0.9', path.read_text()))
    sentences, notes = report(folders)
    assert "below SwiGLU" in sentences[0] and "(pixel space)" in sentences[0]
    assert "In normalized space, the difference of qd-MoA has the other sign: +" in notes


def ladder(make_run, gains, seeds):
    """Return folders of language models: SwiGLU and FFNs with these gains, at three sizes."""
    return [
        make_run(
            f"{size}{ffn}{seed}", ffn=ffn, seed=seed, final=final - gain,
            changes={"model.size": size, "optim.lr": rate},
        )
        for size, final, rate in (("dense-0.12b", 3.4, 3e-3), ("dense-0.25b", 3.1, 2e-3), ("dense-0.5b", 2.8, 1e-3))
        for ffn, gain in ({"swiglu": 0.0} | gains).items()
        for seed in range(seeds)
    ]  # fmt: skip


def test_over_sizes_the_difference_at_each_size_is_reported(make_run):
    sentences, notes = report(ladder(make_run, {"qdmoa": 0.1, "onemoa": 0.05}, seeds=1))
    assert re.fullmatch(
        r"qd-MoA, the lowest of 2 alternatives on average, is below SwiGLU at 3 of 3 sizes in validation loss: "
        r"−0\.\d{4} \(dense-0\.12b\), −0\.\d{4} \(dense-0\.25b\), −0\.\d{4} \(dense-0\.5b\)\.",
        sentences[0],
    )
    assert sentences[1] == "One seed: no evidence of a general difference."
    assert "more than one cause" not in notes and "the best of 2 alternatives" in notes


@pytest.mark.parametrize(("gain", "sure"), [(0.5, 3), (0.0, 0)])
def test_over_sizes_intervals_are_widened_for_all_comparisons(make_run, gain, sure):
    sentences, _ = report(ladder(make_run, {"qdmoa": gain}, seeds=4))
    assert sentences[1] == (
        f"The 95 % interval over seeds, widened for 3 comparisons, excludes zero at {sure} of 3 sizes."
    )
