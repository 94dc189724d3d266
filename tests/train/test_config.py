"""Config files and command-line overrides; every mistake is one message with exit code 2."""

import pytest

from moa_train.config import parse_config, read_config
from moa_train.errors import ConfigError
from moa_train.reading import differing_keys


@pytest.fixture
def parse(runs):
    def parse(*arguments, **options):
        return parse_config(runs.toy.ToyConfig, arguments, program="toy", summary="A toy.", **options)

    return parse


@pytest.fixture
def write(tmp_path):
    def write(text, name="a.yaml"):
        (tmp_path / name).write_text(text)
        return f"--config={tmp_path / name}"

    return write


def refused(parse, *arguments, **options):
    with pytest.raises(SystemExit) as stop:
        parse(*arguments, **options)
    return stop.value.code


def test_yaml_types(parse, write):
    config = parse(write("optim: {lr: 3e-4, betas: [0.9, 0.99], eps: 1e-8}\nschedule: {epochs: 800, min_lr: 1E-6}\n"))
    assert (config.optim.lr, config.optim.betas, config.optim.eps) == (3e-4, (0.9, 0.99), 1e-8)
    assert config.schedule.epochs == 800.0 and config.schedule.min_lr == 1e-6
    assert config.loop.trackers == ("tensorboard",)


def test_later_arguments_win(parse, write):
    first = write("optim: {lr: 1e-2, eps: 1e-7}\nmodel: {width: 16}\n", "1.yaml")
    second = write("optim: {lr: 2e-2}\n", "2.yaml")
    config = parse(first, second, "--model.width", "32", "--loop.trackers=[]", "--optim.max_grad_norm=null")
    assert (config.optim.lr, config.optim.eps, config.model.width, config.loop.trackers) == (2e-2, 1e-7, 32, ())


def test_default_file_is_read_only_without_config(parse, write, tmp_path):
    write("model: {width: 64}\noptim: {lr: 0.5}\n", "default.yaml")
    default = tmp_path / "default.yaml"
    config = parse("--optim.lr=0.25", default=default)
    assert (config.model.width, config.optim.lr) == (64, 0.25)
    assert parse("--config", write("").removeprefix("--config="), default=default).model.width == 8


def test_base_files_are_merged(parse, write, tmp_path):
    write("model: {width: 64, dropout: 0.5}\noptim: {lr: 0.5}\n", "base.yaml")
    delta = write("base: base.yaml\nmodel: {width: 16}\n")
    config = parse(delta)
    assert (config.model.width, config.model.dropout, config.optim.lr) == (16, 0.5, 0.5)
    write("base: [a.yaml]\n", "base.yaml")
    with pytest.raises(ConfigError, match="base leads back to this file"):
        read_config(tmp_path / "a.yaml")


@pytest.mark.parametrize("base", ["3", "[a.yaml, {}]", '"\\0"', '"\\uD800"'])
def test_a_base_is_a_file_name(write, tmp_path, base):
    write(f"base: {base}\n", "a.yaml")
    with pytest.raises(ConfigError, match="must be a file name or a list of file names"):
        read_config(tmp_path / "a.yaml")


def test_check_prints_the_resolved_config(parse, write, capsys):
    assert refused(parse, "--check", "--optim.lr=1e-5") == 0
    assert parse(write(capsys.readouterr().out)) == parse("--optim.lr=1e-5")
    assert refused(parse, "--print_config") == 0
    assert "check:" not in capsys.readouterr().out


def test_check_calls_further_checks(parse, capsys):
    def check(config):
        if config.seed:
            raise ConfigError("the seed is taken")

    assert parse("--seed=1", check=check).seed == 1
    assert refused(parse, "--check", "--seed=0", check=check) == 0
    assert refused(parse, "--check", "--seed=1", check=check) == 2
    assert "the seed is taken" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrr: 1}", "'lrr'; did you mean optim.lr?"),
        ("optim: {lr: fast}", '"optim.lr"'),
        ("optim: {betas: [0.9]}", '"optim.betas"'),
        ("optim: [1, 2]", "optim is [1, 2]; it must be keys with values"),
        ("optim: {lr: null}", "optim.lr is None"),
        ("optim: {lr: 1", "a.yaml cannot be read (while parsing"),
        ("optim: &a {lr: *a}", "a.yaml cannot be read (Circular reference"),
        ("optim: {lr: -1}", "optim.lr is -1.0; it must be above 0"),
        ("schedule: {min_lr: 1}", "schedule.min_lr is 1.0; it must be at most optim.lr (0.001)"),
        ("loop: {save_every: 10}", "a.yaml: loop.save_every was renamed to checkpoint.interval"),
        ("checkpoint: {interval: 4, keep_interval: 6}", "a multiple of checkpoint.interval (4), or null"),
    ],
)
def test_mistake_in_a_file(parse, write, text, message, capsys):
    assert refused(parse, write(text)) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("toy: error:")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--optim.lrr=3", "--optim.lrr=3; did you mean optim.lr?"),
        ("--lr=3", "--lr=3; did you mean optim.lr?"),
        ("--optim.clip_grad=1", "the command line: optim.clip_grad was renamed to optim.max_grad_norm"),
        ("--config=nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_mistake_on_the_command_line(parse, argument, message, capsys):
    assert refused(parse, argument) == 2
    assert message in capsys.readouterr().err


def test_help_shows_keys_types_and_descriptions(parse, capsys):
    assert refused(parse, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--optim.lr LR Peak learning rate, absolute (no scaling by the batch). (type: float, default: " in text
    assert "--model.width" in text and "Hidden width." in text and "--loop.precision {float32,bf16}" in text


def test_fields_as_plain_arguments(parse, write, capsys):
    plain = {
        "name": {"type": str, "help": "the run's name"},
        "--resume": {"choices": ["auto", "never"], "default": "auto", "help": "what to do"},
    }
    config = parse("mine", "--resume", "never", "--optim.lr=0.5", plain=plain)
    assert (config.name, config.resume, config.optim.lr) == ("mine", "never", 0.5)
    assert parse("mine", write("resume: never\n"), plain=plain).resume == "never"
    for arguments, text in (([], "required: name"), (["--help"], "toy NAME [--config FILE]")):
        refused(parse, *arguments, plain=plain)
        captured = capsys.readouterr()
        assert text in captured.out + captured.err


def test_differing_keys():
    old = {"out": "runs", "optim": {"lr": 0.1, "eps": 1}, "model": {"args": {}}}
    new = {"out": "elsewhere", "optim": {"lr": 0.2}, "model": {"args": {"depth": 3}}}
    assert differing_keys(old, new, mutable_keys=frozenset({"out"})) == [
        "model.args: {} -> 'absent'",
        "model.args.depth: 'absent' -> 3",
        "optim.eps: 1 -> 'absent'",
        "optim.lr: 0.1 -> 0.2",
    ]
