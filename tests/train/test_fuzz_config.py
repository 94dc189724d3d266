"""Configurations that nobody would write: every one is a configuration or one message and exit code 2."""

import contextlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from hypothesis import strategies as st
from PIL import Image

import moa_lm.pretrain
import moa_vision.pretrain
from moa_lm.pretrain import LMConfig
from moa_lm.token_shards import TokenSettings, make_tokens
from moa_train.config import RunConfig, as_tree, parse_config
from moa_vision.pretrain import MAEConfig

ROOT = Path(__file__).parents[2]
KINDS = {"mae": MAEConfig, "lm": LMConfig}
WORDS = (
    "--",
    "--config",
    "--check=1",
    "--help=1",
    "=",
    "--optim",
    "--=1",
    "-",
    "@x",
    "--optim.",
    "--.lr=1",
    "--config=/",
)
VALUES = (
    "",
    "null",
    "nan",
    "[",
    "{",
    "}{",
    "&a [*a]",
    "!!python/object:os.system {}",
    "1" * 5000,
    "\0",
    "\ud800",
    "[" * 5000,
)


ENCODER = {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 8, "mlp_ratio": 2.0, "norm_layer": None}
ENCODER |= {
    "class_token": True,
    "reg_tokens": 1,
    "qkv_bias": True,
    "drop_path_rate": 0.1,
    "ffn_mixing_gate": "sigmoid",
}
MODELS = {
    "mae": {"encoder": "vit_tiny_patch16_qdmoa", "img_size": [16, 24], "encoder_args": ENCODER}
    | {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, "decoder_ffn": None, "mask_ratio": 0.75},
    "lm": {"size": "moe-micro", "ffn": "qdmoa", "gradient_checkpointing": True}
    | {"args": {"num_hidden_layers": 1, "rms_norm_eps": 1e-5, "id2label": None, "dtype": "float32"}},
}
MAINS = {"mae": moa_vision.pretrain.main, "lm": moa_lm.pretrain.main}
HUGE = (10**5, 10**6, 10**9, 2**31)


def bomb(levels):
    """Ten references to ten references to ...: 10^levels nodes, if anyone walks through them."""
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels + 1))]
    return "\n".join(lines) + "\n"


def outcome(fuzzing, kind, arguments):
    """Parse; return the configuration, or the message of what ended in exit code 2."""
    found, err, out = [], io.StringIO(), io.StringIO()

    def parse():
        found.append(parse_config(kind, arguments, program="train", summary="A run."))

    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO())  # "--config -" reads it
        stopped = fuzzing.refusal(parse, SystemExit)
    if stopped is None:
        return found[0]
    assert stopped.code == 2, (stopped.code, err.getvalue(), out.getvalue())
    assert err.getvalue().startswith("train: error: ") and "Traceback" not in err.getvalue()
    return err.getvalue()


@pytest.mark.parametrize("half", KINDS)
def test_files(fuzz, fuzzing, half, tmp_path):
    files = sorted((ROOT / "configs" / half).glob("*.yaml"))
    path = tmp_path / "a.yaml"

    def attempt(content):
        path.write_bytes(content)
        found = outcome(fuzzing, KINDS[half], [f"--config={path}"])
        if not isinstance(found, str):
            yaml.safe_dump(as_tree(found))  # what the run folder keeps can be written

    contents = [file.read_bytes() for file in files]
    fuzz(st.sampled_from(contents).flatmap(fuzzing.yaml_file), attempt, examples=8)


@pytest.mark.parametrize("half", KINDS)
def test_command_lines(fuzz, fuzzing, half, tmp_path):
    config = next((ROOT / "configs" / half).glob("*.yaml"))
    tree = yaml.safe_load(config.read_text())
    keys = [".".join(path) for path in fuzzing.paths(tree) if path and all(isinstance(part, str) for part in path)]
    texts = st.sampled_from(VALUES) | st.sampled_from(fuzzing.ODD).map(str) | st.text(max_size=9)
    options = st.builds("--{}={}".format, st.sampled_from(keys), texts)
    words = options | st.sampled_from(WORDS) | st.text(max_size=9)
    unfair = ("-h", "--help", "--print_config", "--check")  # these end with code 0

    def attempt(arguments):
        outcome(fuzzing, KINDS[half], [f"--config={config}", *arguments])

    lists = st.lists(words, min_size=1, max_size=3)
    fuzz(lists.filter(lambda given: not any(word.startswith(unfair) for word in given)), attempt, examples=12)


@pytest.fixture(scope="module")
def checked(tmp_path_factory, fuzzing):
    """checked(half, tree) is what `main(... --check)` of a configuration with data that are there says on stderr."""
    folder = tmp_path_factory.mktemp("data")
    image, text = io.BytesIO(), folder / "text.jsonl"
    Image.new("RGB", (24, 24)).save(image, "JPEG")
    with tarfile.open(folder / "images.tar", "w") as tar:
        for number in range(8):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = len(image.getvalue())
            tar.addfile(info, io.BytesIO(image.getvalue()))
    text.write_text("".join(json.dumps({"text": f"the {n} kings had {n} daughters"}) + "\n" for n in range(99)))
    make_tokens([str(text)], folder / "tokens", TokenSettings(train_bpe=300))
    data = {
        "mae": {"train": str(folder / "images.tar"), "cache_dir": str(folder / "cache"), "workers": 0},
        "lm": {"train": str(folder / "tokens"), "sequence_length": 16},
    }
    budget = {"mae": {"epochs": 1, "warmup_epochs": 0}, "lm": {"epochs": 1}}

    def checked(half, tree):
        whole = {"name": "run", "schedule": {**budget[half], "batch_size": 8}, "loop": {"micro_batch_size": 8}}
        whole |= {**tree, "data": {**data[half], **tree.get("data", {})}}
        file, out, err = folder / "config.yaml", io.StringIO(), io.StringIO()
        file.write_text(yaml.safe_dump(whole))
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
            stopped = fuzzing.refusal(lambda: MAINS[half]([f"--config={file}", "--check"]), SystemExit, seconds=30)
        assert stopped.code in (0, 2) and "Traceback" not in err.getvalue()
        assert stopped.code == 2 or yaml.safe_load(out.getvalue())["name"] == "run"
        return err.getvalue()

    return checked


EMPTY = "ignore:Initializing zero-element tensors"


@pytest.mark.filterwarnings(EMPTY)
@pytest.mark.parametrize("half", MODELS)
def test_what_parses_is_also_built(fuzz, fuzzing, checked, half):
    assert not checked(half, {"model": MODELS[half]})
    models = fuzzing.mutated(MODELS[half], odd=(*fuzzing.ODD, *HUGE), most=2)
    fuzz(models, lambda model: checked(half, {"model": model}), examples=16)


@pytest.mark.filterwarnings(EMPTY)
@pytest.mark.parametrize(
    ("half", "key", "value", "named"),
    [
        *(("mae", f"model.encoder_args.{key}", 0, "encoder_args") for key in ("embed_dim", "num_heads", "patch_size")),
        ("mae", "model.encoder_args.patch_size", [8, 8, 8], "patch_size=(8, 8, 8) must be square"),
        ("mae", "model.encoder_args.norm_layer", "x", "encoder_args"),
        ("mae", "model.encoder_args.class_token", "x", "encoder_args"),
        ("mae", "model.encoder_args.mlp_ratio", 1e308, "encoder_args"),
        ("mae", "model.encoder_args.reg_tokens", -1, "encoder_args"),
        ("mae", "model.encoder_args.depth", -1, "encoder_args.depth=-1: must be an integer from 1 to"),
        ("mae", "model.encoder_args.depth", 2**31, "encoder_args.depth=2147483648: must be an integer from 1 to"),
        ("mae", "model.decoder_depth", 10**9, "decoder_depth=1000000000: must be an integer from 1 to"),
        ("mae", "model.img_size", 10**6, "img_size=1000000: a side must be from 1 to"),
        ("lm", "model.args.id2label", 3, "model.args {'id2label': 3}: "),
        ("lm", "model.args.dtype", "x", "model.args {'dtype': 'x'}"),
        ("lm", "model.args.rms_norm_eps", "x", "rms_norm_eps"),
        ("lm", "data.sequence_length", 10**9, "at most the training set's 0 samples"),
        *((half, "data.train", "~nobody here/x", "data.train is '~nobody here/x'") for half in MODELS),
        ("mae", "data.train", "x" * 5000, "data.train is 'xxx"),
        ("mae", "data.cache_dir", "~nobody here/x", "data.cache_dir '~nobody here/x'"),
    ],
    ids=str,
)
def test_what_cannot_be_built(checked, half, key, value, named):
    tree = {"model": {name: of for name, of in MODELS[half].items() if name != "args"}}
    *groups, last = key.split(".")
    place = tree = json.loads(json.dumps(tree))
    for group in groups:
        place = place.setdefault(group, {})
    place[last] = value
    assert named in checked(half, tree)


@pytest.mark.parametrize("text", ["optim: {lr: null}", "name: null", "loop: {log_every: null}", "optim: null"])
def test_null_where_there_must_be_a_value(fuzzing, text, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    key = text.partition(":")[0]
    assert f"{key}" in outcome(fuzzing, RunConfig, [f"--config={tmp_path / 'a.yaml'}"])


LIMITED = """
import contextlib, io, resource, sys
from moa_train.config import RunConfig, parse_config
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
for argument in sys.argv[1:]:
    err = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(err):
        parse_config(RunConfig, [argument], program="train", summary="A run.")
    print(repr(err.getvalue()))
"""


def test_attacks_on_the_parser(tmp_path):
    """A billion laughs, and depths at which PyYAML's parser in C ends the interpreter; in a process of its own."""
    bombs, deep = bomb(12), [unit * 20_000 for unit in ("- ", "[", "{a: ", "? ")]
    values = ["--loop.trackers={" + bombs.replace("\n", ", ") + "}", *(f"--loop.trackers={text}" for text in deep)]
    files = []
    for number, text in enumerate([bombs, *(text * 3 for text in deep)]):
        (tmp_path / f"{number}.yaml").write_text(text)
        files.append(f"--config={tmp_path / str(number)}.yaml")
    command = [sys.executable, "-c", LIMITED, *values, *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    messages = done.stdout.splitlines()
    assert (done.returncode, len(messages)) == (0, 10), done.stderr[-2000:]
    for number, message in enumerate(messages):
        reason = "nested more than 50 levels" if number % 5 else "its aliases followed"
        culprit = f"{number - 5}.yaml" if number >= 5 else "--loop.trackers"
        assert reason in message and culprit in message and len(message) < 1000


def test_aliases_are_fine(fuzzing, tmp_path):
    (tmp_path / "a.yaml").write_text("optim: &a {lr: 0.5, eps: 1e-6}\nloop: {val_every: &n 7, log_every: *n}\n")
    config = outcome(fuzzing, RunConfig, [f"--config={tmp_path / 'a.yaml'}"])
    assert (config.optim.lr, config.loop.val_every, config.loop.log_every) == (0.5, 7, 7)
