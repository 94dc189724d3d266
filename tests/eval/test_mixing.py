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


def edit(folder, name, change):
    path = folder / "mixing" / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_records_are_read(make_run):
    mixing = read_mixing(make_run(encoder=MOA, spread=0.1) / "mixing")
    assert [row["step"] for row in mixing.rows] == [20] * 6 + [40] * 6
    assert [(row["layer"], row["coefficient"]) for row in mixing.last] == [
        (f"encoder.{i}", term) for i in range(2) for term in ("g·id", "s·id", "r2·id")
    ]
    np.testing.assert_allclose(mixing.maps["encoder"].shares.sum(-1), 1, atol=2e-3)
    assert (mixing.grid, mixing.keys) == ((2, 2), ("images/b", "images/a"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "1 of 6 coefficients static (encoder.1 g·id)."),
        ({"std": [0.2, 0.3, 0.4]}, "no static coefficient, standard deviations over tokens 0.1 to 0.4."),
        ({"std": [0, 0, 0]}, "3 of 6 coefficients static (encoder.1 g·id, encoder.1 s·id, encoder.1 r2·id)."),
    ],
)
def test_static_coefficients_are_named(make_run, changes, words):
    folder = make_run(encoder=MOA, spread=0.1)
    edit(folder, "step_00000040.json", lambda content: content["layers"][1].update(changes))
    assert sentences("X", read_mixing(folder / "mixing")) == [
        f"X, encoder: {words} Largest share: g·id in 2 of 2 layers."
    ]


FAULTS = {
    "no layers": (lambda f: edit(f, "step_00000040.json", lambda c: c.pop("layers")), "step_00000040.json"),
    "values": (lambda f: edit(f, "step_00000040.json", lambda c: c["layers"][0].update(std=[1])), "step_00000040.json"),
    "other part": (
        lambda f: edit(f, "index.json", lambda c: c["parts"].update(decoder=c["parts"]["encoder"])),
        "maps.safetensors",
    ),
    "no maps": (lambda f: (f / "mixing/maps.safetensors").unlink(), "maps.safetensors"),
    "shape": (
        lambda f: save_file({"encoder.shares": np.zeros((1, 2), np.float16)}, f / "mixing/maps.safetensors"),
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
    assert str(caught.value).startswith(str(folder / "mixing" / file)) and "\n" not in str(caught.value)


def test_maps_of_all_methods_share_colours_and_images(make_run):
    folders = [make_run("a")] + [make_run(ffn, encoder=f"vit_tiny_patch4_{ffn}", spread=0.1) for ffn in ("moa", "la")]
    shown = mixing_content(compare([read_run(folder) for folder in folders]))
    assert [(own["run"], own["label"]) for own in shown] == [(1, "MoA"), (2, "LA")]
    assert shown[0]["legend"] == shown[1]["legend"]
    for own in shown:
        assert own["layers"] == ["encoder.0", "encoder.1"]
        assert [image["key"] for image in own["images"]] == ["images/b", "images/a"]
        for uri in (uri for image in own["images"] for uri in (image["original"], *image["cells"])):
            data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
            assert Image.open(io.BytesIO(data)).size == (16, 16)


def test_language_models_have_no_maps(make_run):
    (shown,) = mixing_content(compare([read_run(make_run("a", ffn="qdmoa", spread=0.1))]))
    assert (shown["images"], shown["layers"]) == ([], []) and shown["sentences"]


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(0, 1000))
def test_each_patch_has_the_colour_of_its_largest_share(rows, columns, scale, seed):
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(3), rows * columns)
    unknown = rng.random(rows * columns) < 0.2
    shares[unknown] = np.nan
    tinted = np.asarray(overlay(Image.new("RGB", (columns * scale, rows * scale)), shares, (rows, columns), COLOURS))
    for patch in range(rows * columns):
        y, x = divmod(patch, columns)
        block = tinted[y * scale : (y + 1) * scale, x * scale : (x + 1) * scale].reshape(-1, 3)
        expected = np.zeros(3)  # black where unknown; else the colour times its opacity, 0.3 to 0.85
        if not unknown[patch]:
            ordered = np.sort(shares[patch])
            expected[np.argmax(shares[patch])] = 255 * (0.3 + 0.55 * (ordered[-1] - ordered[-2]))
        np.testing.assert_allclose(block, np.broadcast_to(expected, block.shape), atol=0.5001)
