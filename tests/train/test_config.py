"""YAML and dotted overrides become the dataclasses; whatever is wrong is named in one message, with exit code 2."""

import pytest
import yaml

from moa_train.config import OptimConfig, RunConfig, as_tree, differing_keys, parse_config


@pytest.fixture
def parse(runs):
    def parse(*arguments, default=None):
        return parse_config(runs.toy.ToyConfig, arguments, program="toy", summary="A toy.", default=default)

    return parse


@pytest.fixture
def write(tmp_path):
    def write(text, name="a.yaml"):
        (tmp_path / name).write_text(text)
        return f"--config={tmp_path / name}"

    return write


def test_yaml_types(parse, write):
    config = parse(write("optim: {lr: 3e-4, betas: [0.9, 0.99], eps: 1e-8}\nschedule: {epochs: 800, min_lr: 1E-6}\n"))
    assert (config.optim.lr, config.optim.betas, config.optim.eps) == (3e-4, (0.9, 0.99), 1e-8)
    assert config.schedule.epochs == 800.0 and config.schedule.min_lr == 1e-6
    assert config.loop.trackers == ("tensorboard",)


def test_check_prints_all_values_or_what_is_wrong(parse, write, capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--check", "--optim.lr=1e-5")
    assert stop.value.code == 0
    assert parse(write(capsys.readouterr().out)) == parse("--optim.lr=1e-5")
    with pytest.raises(SystemExit) as stop:
        parse("--check", "--optim.betas=[0.9, 2]")
    assert stop.value.code == 2 and "optim.betas is (0.9, 2.0)" in capsys.readouterr().err


def test_check_may_ask_for_more_than_values(runs, capsys):
    def check(config):
        seen.append(config.seed)
        if config.seed:
            raise ValueError("the seed is taken")

    def parse(*arguments):
        return parse_config(runs.toy.ToyConfig, arguments, program="toy", summary="", check=check)

    seen = []
    assert parse("--seed=1").seed == 1 and not seen, "only where it is asked for"
    for seed, code in ((0, 0), (1, 2)):
        with pytest.raises(SystemExit) as stop:
            parse("--check", f"--seed={seed}")
        assert stop.value.code == code
    assert seen == [0, 1] and "the seed is taken" in capsys.readouterr().err


def test_check_is_no_key_of_the_printed_configuration(parse, capsys):
    with pytest.raises(SystemExit):
        parse("--print_config")
    assert "check:" not in capsys.readouterr().out


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
    assert parse(write("optim: {lr: 0.125}\n"), default=default).model.width == 8


def test_the_resolved_tree_reads_back_equal(parse, write):
    config = parse("--optim.lr=1e-5", "--optim.betas=[0.8, 0.9]", "--loop.val_samples=3", "--loop.trackers=[wandb]")
    assert parse(write(yaml.safe_dump(as_tree(config)))) == config


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("optim: {lrr: 1}", "'lrr'; did you mean optim.lr?"),
        ("config: {lr: 1}", "a.yaml has the key 'config'"),
        ("optimm: {lr: 1}", "'optimm.lr' is not accepted; did you mean optim.lr?"),
        ("optim: {lr: fast}", '"optim.lr"'),
        ("optim: {lr: .nan}", "optim.lr is nan"),
        ("optim: {betas: [0.9]}", '"optim.betas"'),
        ("optim: {fused: 3}", '"optim.fused"'),
        ("loop: {precision: fp16}", '"loop.precision"'),
        ("checkpoint: {keep_latest: 1.5}", '"checkpoint.keep_latest"'),
        ("seed: [1]", '"seed"'),
        ("optim: [1, 2]", "optim is [1, 2]; it must be keys with values"),
        ("optim: null", "optim is None"),
        ("optim: {lr: 1", "line 1"),
        ("- 1", "it holds a list"),
        ("optim: {lr: -1}", "optim.lr is -1.0; it must be above 0"),
        ("optim: {betas: [0.9, 1.0]}", "optim.betas is (0.9, 1.0); it must be two numbers in [0, 1)"),
        ("schedule: {epochs: 2, warmup_epochs: 3}", "schedule.warmup_epochs is 3.0; it must be from 0 to"),
        ("schedule: {min_lr: 1}", "schedule.min_lr is 1.0; it must be at most optim.lr (0.001)"),
        ("loop: {save_every: 10}", "loop.save_every was renamed to checkpoint.interval"),
        ("checkpoint: {interval: 0}", "checkpoint.interval is 0; it must be 1 or above"),
        ("name: ../x", "name is '../x'"),
    ],
)
def test_a_wrong_file_is_refused(parse, write, text, named, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(write(text))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert named in error and "Traceback" not in error and "toy: error:" in error


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--optim.lrr=3", "--optim.lrr=3; did you mean optim.lr?"),
        ("--optim.lr=1" + 400 * "0", "a number is too large"),
        ("--lr=3", "--lr=3; did you mean optim.lr?"),
        ("--optim.lr=x", '"optim.lr"'),
        ("--model.width=2.5", '"model.width"'),
        ("--config=nowhere.yaml", "nowhere.yaml"),
        ("stray", "stray"),
    ],
)
def test_a_wrong_argument_is_refused(parse, argument, named, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(argument)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert named in error and "Traceback" not in error


def test_help(parse, capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "--optim.lr LR Peak learning rate, absolute (no scaling by the batch). (type: float, default: " in text
    assert "--model.width" in text and "Hidden width." in text and "--loop.precision {float32,bf16}" in text


def test_differing_keys():
    old = {"name": "a", "out": "runs", "optim": {"lr": 0.1, "eps": 1}, "model": {"args": {}}}
    new = {"name": "a", "out": "elsewhere", "optim": {"lr": 0.2}, "model": {"args": {"depth": 3}}}
    assert differing_keys(old, new) == [
        "model.args: {} -> 'absent'",
        "model.args.depth: 'absent' -> 3",
        "optim.eps: 1 -> 'absent'",
        "optim.lr: 0.1 -> 0.2",
    ]


def test_fields_that_are_plain_arguments(runs, write, capsys):
    """A field may be a word, or take several words; the rest stay keys, and files may set them all the same."""
    plain = {
        "name": {"type": str, "help": "the run's name"},
        "--resume": {"choices": ["auto", "never"], "default": "auto", "help": "what to do"},
    }

    def parse(*arguments):
        return parse_config(runs.toy.ToyConfig, arguments, program="toy", summary="A toy.", plain=plain)

    config = parse("mine", "--resume", "never", "--optim.lr=0.5")
    assert (config.name, config.resume, config.optim.lr) == ("mine", "never", 0.5)
    assert parse("mine", write("resume: never\n")).resume == "never"
    for arguments, told in (([], "required: name"), (["--help"], "toy NAME [--config FILE]")):
        with pytest.raises(SystemExit):
            parse(*arguments)
        captured = capsys.readouterr()
        assert told in captured.out + captured.err


def test_a_key_cut_short_is_an_error(parse, capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--optim.weight_deca=0.1")
    assert stop.value.code == 2 and "did you mean optim.weight_decay?" in capsys.readouterr().err


@pytest.mark.parametrize(("clip", "offered"), [(None, "1"), (1.0, "0.5"), (4.0, "1"), (0.1, "0.05")])
def test_after_a_loss_that_is_no_number_something_gentler_is_offered(clip, offered):
    options = RunConfig(optim=OptimConfig(lr=1e-3, max_grad_norm=clip)).gentler()
    assert options == ("--optim.lr 0.0005", f"--optim.max_grad_norm {offered}")
