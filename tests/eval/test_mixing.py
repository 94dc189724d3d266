import base64
import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save_file

from moa_eval.training.grouping import compare
from moa_eval.training.mixing import read_mixing, sentences
from moa_eval.training.mixing_maps import mixing_content, overlay
from moa_eval.training.reading import read_run
from moa_train.errors import DataError

MOA = "vit_tiny_patch4_qdmoa"
COLOURS = ["#ff0000", "#00ff00", "#0000ff"]


def test_records_are_read(make_run):
    mixing = read_mixing(make_run(encoder=MOA, spread=0.1) / "mixing")
    assert list(mixing.steps) == [20, 40]
    assert [(layer.name, layer.part, layer.terms) for layer in mixing.last] == [
        (f"encoder.{i}", "encoder", ("g·id", "s·id", "r2·id")) for i in range(2)
    ]
    np.testing.assert_allclose(mixing.maps["encoder"].shares.sum(-1), 1, atol=2e-3)
    assert (mixing.grid, mixing.keys) == ((2, 2), ("images/b", "images/a"))


@pytest.mark.parametrize(
    ("spread", "words"),
    [
        (0.1, "Static blends: 1 of 6 coefficients (encoder.1 g·id)."),
        (0.0, "Static blends: 6 of 6 coefficients (encoder.0 g·id, encoder.0 s·id, "),
    ],
    ids=["one", "all"],
)  # fmt: skip
def test_static_blends_are_named(make_run, spread, words):
    (sentence,) = sentences("qd-MoA", read_mixing(make_run(encoder=MOA, spread=spread) / "mixing"))
    assert sentence.startswith(f"qd-MoA, encoder: {words}")
    assert sentence.endswith("Largest share: g·id in 2 of 2 layers.")


def edit(folder, name, change):
    path = folder / "mixing" / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_varying_and_constant_coefficients_are_distinguished(make_run):
    folder = make_run(encoder=MOA, spread=0.1)
    edit(folder, "step_00000040.json", lambda content: content["layers"][1].update(std=[0.2, 0.3, 0.4]))
    (sentence,) = sentences("X", read_mixing(folder / "mixing"))
    assert "No static blend; standard deviations over tokens: 0.1 to 0.4." in sentence
    edit(folder, "step_00000040.json", lambda content: [row.update(token_adaptive=False) for row in content["layers"]])
    (sentence,) = sentences("X", read_mixing(folder / "mixing"))
    assert "The coefficients are learned constants." in sentence


def retype(path, other):
    """Give the float16 tensors of a safetensors file another type of the same size."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end].replace(b"F16", other)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])


FAULTS = {
    "step without layers": (lambda f: edit(f, "step_00000040.json", lambda c: c.pop("layers")), "step_00000040.json"),
    "too few values": (
        lambda f: edit(f, "step_00000040.json", lambda c: c["layers"][0].update(std=[1.0])), "step_00000040.json",
    ),
    "no grid": (lambda f: edit(f, "index.json", lambda c: c.pop("grid")), "index.json"),
    "grid of one": (lambda f: edit(f, "index.json", lambda c: c.update(grid=[2])), "index.json"),
    "no maps": (lambda f: (f / "mixing/maps.safetensors").unlink(), "maps.safetensors"),
    "cut maps": (lambda f: (f / "mixing/maps.safetensors").write_bytes(b"x" * 40), "maps.safetensors"),
    "other shape": (
        lambda f: save_file({"encoder.shares": np.zeros((1, 2), np.float16)}, f / "mixing/maps.safetensors"),
        "maps.safetensors",
    ),
    "bfloat16": (lambda f: retype(f / "mixing/maps.safetensors", b"BF16"), "maps.safetensors"),
    "integers": (lambda f: retype(f / "mixing/maps.safetensors", b"I16"), "maps.safetensors"),
    "other part": (
        lambda f: edit(f, "index.json", lambda c: c["parts"].update(decoder=c["parts"]["encoder"])),
        "maps.safetensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_an_unusable_file_is_named_in_one_line(make_run, fault):
    change, file = FAULTS[fault]
    folder = make_run(encoder=MOA, spread=0.1)
    change(folder)
    with pytest.raises(DataError) as caught:
        read_mixing(folder / "mixing")
    assert str(caught.value).startswith(f"{folder / 'mixing' / file}: ")
    assert "delete the folder or leave this run out" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_maps_of_all_methods_share_colours_and_images(make_run):
    folders = [
        make_run("a"),
        make_run("b", encoder=MOA, spread=0.1),
        make_run("c", encoder="vit_tiny_patch4_moa", spread=0.1),
    ]
    comparison = compare([read_run(folder) for folder in folders])
    shown = mixing_content(comparison)
    assert [(own["run"], own["label"]) for own in shown] == [(1, "qd-MoA"), (2, "MoA")]
    assert shown[0]["legend"] == shown[1]["legend"]
    assert len({entry["colour"] for entry in shown[0]["legend"]}) == 3
    for own in shown:
        assert own["layers"] == ["encoder.0", "encoder.1"]
        assert [image["key"] for image in own["images"]] == ["images/b", "images/a"]
        for image in own["images"]:
            assert len(image["cells"]) == 2
            for uri in (image["original"], *image["cells"]):
                data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
                with Image.open(io.BytesIO(data)) as picture:
                    assert picture.size == (16, 16)


def test_language_models_have_sentences_and_no_maps(make_run):
    comparison = compare([read_run(make_run("a", ffn="qdmoa", spread=0.1))])
    (shown,) = mixing_content(comparison)
    assert (shown["images"], shown["layers"]) == ([], [])
    assert shown["sentences"][0].startswith("qd-MoA, model: Static blends: 1 of 6 coefficients (model.1 g·id).")


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(0, 1000))
def test_each_patch_has_the_colour_of_its_largest_share(rows, columns, scale, seed):
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(3), rows * columns)
    unknown = rng.random(rows * columns) < 0.2
    shares[unknown] = np.nan
    tinted = np.asarray(overlay(Image.new("RGB", (columns * scale, rows * scale)), shares, (rows, columns), COLOURS))
    assert tinted.shape == (rows * scale, columns * scale, 3)
    for patch in range(rows * columns):
        y, x = divmod(patch, columns)
        block = tinted[y * scale : (y + 1) * scale, x * scale : (x + 1) * scale].reshape(-1, 3)
        assert (block == block[0]).all()
        # On black the tint is the colour times its opacity: 0.3 for a tie, 0.85 for a term alone.
        expected = np.zeros(3)
        if not unknown[patch]:
            ordered = np.sort(shares[patch])
            expected[np.argmax(shares[patch])] = 255 * (0.3 + 0.55 * (ordered[-1] - ordered[-2]))
        np.testing.assert_allclose(block[0], expected, atol=0.5001)


def test_unknown_patches_are_grey_and_pictures_are_at_most_96_pixels_wide():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 200, 3), dtype=np.uint8))
    small = picture.convert("L").convert("RGB")
    small.thumbnail((96, 96))
    result = overlay(picture, np.full((4, 3), np.nan), (2, 2), COLOURS)
    assert result.size == (96, 24)
    np.testing.assert_array_equal(np.asarray(result), np.asarray(small))
