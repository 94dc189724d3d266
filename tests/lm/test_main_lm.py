"""python -m moa_lm: model folders, the table of sizes, the demo's data, and errors."""

import hashlib

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moa_lm.__main__ import COLUMNS, main


def create(*extra, size="dense-tiny"):
    return ["create", "--size", size, "--ffn", "qdmoa", "--set", "num_hidden_layers=1", *map(str, extra)]


def test_create(tokenizer_folder, tmp_path, capsys):
    out = tmp_path / "new" / "model"
    options = ("--tokenizer", tokenizer_folder, "--out", out, "--set", "ffn_mixing_gate=tanh", "--dtype", "bfloat16")
    assert main(create(*options)) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == 128 >= len(tokenizer) == 70
    assert (model.config.ffn_variant, model.config.ffn_mixing_gate) == ("qdmoa", "tanh")
    assert model.config.eos_token_id == tokenizer.eos_token_id == 0
    assert model.dtype == torch.bfloat16
    inputs = tokenizer("w4 w5", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (1, 4)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"{count:,} parameters" in capsys.readouterr().out
    assert list(out.parent.iterdir()) == [out]  # nothing temporary is left


def test_create_does_not_overwrite(tokenizer_folder, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    assert main(create("--tokenizer", tokenizer_folder, "--out", out)) == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert main(create("--tokenizer", tokenizer_folder, "--out", out, "--seed", "9")) == 2
    assert "--out is" in (error := capsys.readouterr().err) and "must be a new or empty folder" in error
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_convert(llama, tokens, tokenizer_folder, tmp_path):
    theirs = llama()
    theirs.save_pretrained(tmp_path / "llama")
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path / "llama")
    for variant in ("swiglu", "qdmoa"):
        assert main(["convert", str(tmp_path / "llama"), "--ffn", variant, "--out", str(tmp_path / variant)]) == 0
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "swiglu")
    assert torch.equal(ours(tokens(1, 7)).logits, theirs(tokens(1, 7)).logits)
    preserved = ["--ffn", "bimoa", "--preserve", "--out", str(tmp_path / "bimoa")]
    assert main(["convert", str(tmp_path / "llama"), *preserved]) == 0
    same = AutoModelForCausalLM.from_pretrained(tmp_path / "bimoa")
    torch.testing.assert_close(same(tokens(1, 7)).logits, theirs(tokens(1, 7)).logits)
    mixed = AutoModelForCausalLM.from_pretrained(tmp_path / "qdmoa")
    assert mixed.config.ffn_variant == "qdmoa" and torch.isfinite(mixed(tokens(1, 7)).logits).all()
    first, second = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("llama", "qdmoa"))
    assert first("w4 w9 w2")["input_ids"] == second("w4 w9 w2")["input_ids"]


def test_user_errors_are_one_line(llama, tokenizer_folder, tmp_path, capsys):
    llama().save_pretrained(tmp_path / "llama")
    (tmp_path / "empty").mkdir()
    out = ("--out", str(tmp_path / "out"))
    tokenizer = ("--tokenizer", str(tokenizer_folder))
    cases = {
        "no such folder": create("--tokenizer", str(tmp_path / "nowhere"), *out),
        "'loud'": create(*tokenizer, *out, "--set", "ffn_mixing_gate=loud"),
        "must be FIELD=VALUE": create(*tokenizer, *out, "--set", "ffn_mixing_gate"),
        "Type-I FFN": ["convert", str(tmp_path / "llama"), "--ffn", "moa", *out],
        "nowhere: no such folder": ["convert", str(tmp_path / "nowhere"), "--ffn", "qdmoa", *out],
        "empty": ["convert", str(tmp_path / "empty"), "--ffn", "qdmoa", *out],
        "unknown setting 'ffn_x'": ["convert", str(tmp_path / "llama"), "--ffn", "qdmoa", *out, "--set", "ffn_x=1"],
    }
    for words, arguments in cases.items():
        assert main(arguments) == 2, words
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
        assert not (tmp_path / "out").exists()


def test_sizes_as_markdown(capsys):
    assert main(["sizes", "--size", "moe-2b", "--ffn", "qdmoa"]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 3
    assert {line.count("|") for line in table} == {len(COLUMNS) + 1}
    assert "| moe-2b | qdmoa | 19 | 1664 | 512 |" in table[2]


def test_tales(tmp_path):
    assert main(["tales", "--out", str(tmp_path / "tales")]) == 0
    shards = (tmp_path / "tales").glob("*/shard-*.safetensors")
    assert {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in shards} == {
        "train": "10a4412bc67e6290",
        "val": "cdf488eec269ce16",
    }
