"""Packing: the tokens that transformers gives, the same bytes after a resume, and errors."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moa_lm import encode, token_shards, token_writer
from moa_lm.data import TokenShards
from moa_lm.encode import END_OF_TEXT, train_bpe
from moa_lm.token_shards import TokenSettings, make_tokens
from moa_train.atomic_io import write_bytes
from moa_train.errors import ConfigError, DataError

WORDS = ("the", "river", "Äpfel", "runs", "under", "日本語", "a", "🦉", "bridge", "of", "stones", "1984", "x = 3;")


def texts(count, seed=0):
    """`count` different texts of up to 60 words and a few lines."""
    random = np.random.default_rng(seed)
    lines = [" ".join(random.choice(WORDS, random.integers(1, 60))) for _ in range(count)]
    return [f"Text {i}.\n{line}\n\nEnd" for i, line in enumerate(lines)]


def write_jsonl(path, values):
    path.write_text("".join(json.dumps({"text": value}) + "\n" for value in values))
    return str(path)


def stream(folder):
    """All tokens of a set, read by safetensors alone."""
    return np.concatenate([load_file(path)["tokens"] for path in sorted(Path(folder).glob("*.safetensors"))])


def decoded(folder):
    """The texts of a set."""
    tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "tokenizer")
    *whole, rest = tokenizer.decode(stream(folder)).split(END_OF_TEXT)
    assert not rest
    return whole


def digests(folder):
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def save_word_tokenizer(folder, words, **special):
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    inner.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A folder with a small byte-level BPE."""
    folder = tmp_path_factory.mktemp("bpe")
    train_bpe(texts(50), 400).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def corpus(tmp_path):
    """300 texts as JSONL."""
    return write_jsonl(tmp_path / "corpus.jsonl", texts(300))


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks per set."""
    monkeypatch.setattr(encode, "_CHUNK_DOCUMENTS", 7)


# --- tokens -------------------------------------------------------------------------------------------------------


def test_stream_equals_transformers_tokens(corpus, bpe, tmp_path):
    make_tokens([corpus], tmp_path / "out", TokenSettings(tokenizer=bpe, shard_tokens=3000))
    tokenizer = AutoTokenizer.from_pretrained(bpe)
    expected = [token for text in texts(300) for token in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    assert stream(tmp_path / "out").tolist() == expected
    assert decoded(tmp_path / "out") == texts(300)


def test_manifest_matches_the_shards(corpus, bpe, tmp_path):
    (report,) = make_tokens([corpus], tmp_path / "out", TokenSettings(tokenizer=bpe, shard_tokens=3000))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    size = sum(len(text.encode()) for text in texts(300))
    assert (report.documents, report.tokens, report.bytes) == (300, len(stream(tmp_path / "out")), size)
    assert (manifest["documents"], manifest["tokens"], manifest["bytes"]) == report[1:4]
    assert (manifest["vocab_size"], manifest["end_of_text"], manifest["dtype"]) == (report.vocab_size, 0, "uint16")
    assert len(manifest["shards"]) > 2
    for shard in manifest["shards"]:
        tokens = load_file(tmp_path / "out" / shard["name"])["tokens"]
        assert (shard["tokens"], shard["documents"]) == (len(tokens), (tokens == 0).sum())
        assert tokens[-1] == 0 and len(tokens) - 3000 < 400  # a shard ends with the document that fills it


def test_special_token_in_a_text_is_plain_text(bpe, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [f"one {END_OF_TEXT} text", "another"])
    make_tokens([source], tmp_path / "out", TokenSettings(tokenizer=bpe))
    tokens = stream(tmp_path / "out").tolist()
    assert tokens.count(0) == 2
    assert AutoTokenizer.from_pretrained(bpe).decode(tokens[: tokens.index(0)]) == f"one {END_OF_TEXT} text"


def test_special_tokens_of_a_tokenizer_are_not_added(adding_tokenizer, tmp_path):
    """Llama's tokenizer begins every text with <s>, T5's ends it with </s>."""
    theirs = AutoTokenizer.from_pretrained(adding_tokenizer)
    plain = [theirs(text, add_special_tokens=False)["input_ids"] for text in ("ab a b", "a")]
    assert theirs("ab a b")["input_ids"] != plain[0]
    source = write_jsonl(tmp_path / "in.jsonl", ["ab a b", "a"])
    make_tokens([source], tmp_path / "out", TokenSettings(tokenizer=str(adding_tokenizer)))
    assert stream(tmp_path / "out").tolist() == [*plain[0], 2, *plain[1], 2]
    ours = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    assert ours("ab a b")["input_ids"] == plain[0] and ours.decode(plain[0]) == theirs.decode(plain[0])
    assert ours.bos_token_id == ours.eos_token_id == 2 and ours.get_vocab() == theirs.get_vocab()


def test_end_of_text_option(tmp_path):
    settings = TokenSettings(tokenizer=save_word_tokenizer(tmp_path / "words", ["a", "b", "<end>"]))
    source = write_jsonl(tmp_path / "in.jsonl", ["a b", "b"])
    for token, message in ((None, "no eos_token; set --end-of-text"), ("<eos>", "end_of_text is '<eos>'; it must be")):
        with pytest.raises(ConfigError, match=message):
            make_tokens([source], tmp_path / "out", dataclasses.replace(settings, end_of_text=token))
    make_tokens([source], tmp_path / "out", dataclasses.replace(settings, end_of_text="<end>"))
    assert stream(tmp_path / "out").tolist() == [0, 1, 2, 1, 2]
    ours = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    assert ours.eos_token == ours.bos_token == "<end>" and len(ours) == 3


@pytest.mark.parametrize(("size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_dtype_is_the_smallest_that_fits(tmp_path, size, dtype):
    tokenizer = save_word_tokenizer(tmp_path / "words", [f"w{i}" for i in range(size)], eos_token="w0")
    source = write_jsonl(tmp_path / "in.jsonl", [f"w3 w{size - 1}"])
    make_tokens([source], tmp_path / "out", TokenSettings(tokenizer=tokenizer))
    assert stream(tmp_path / "out").dtype == dtype
    assert TokenShards(tmp_path / "out").window(0, 2).tolist() == [3, size - 1, 0]


def test_trained_bpe_round_trips_any_text():
    tokenizer = train_bpe(texts(50), 350)
    assert len(tokenizer) == 350 and tokenizer.bos_token == tokenizer.eos_token == END_OF_TEXT
    anything = "".join(map(chr, range(1, 3000))) + "🦉\n\t  \r\n"
    assert tokenizer.decode(tokenizer(anything)["input_ids"]) == anything
    with pytest.raises(ConfigError, match="train_bpe is 256; it must be 257 or above"):
        train_bpe([], 256)


def test_bpe_is_trained_on_training_documents_only(corpus, tmp_path):
    train, val = make_tokens([corpus], tmp_path / "out", TokenSettings(train_bpe=350, val_fraction=0.2))
    held_out = decoded(val.folder)
    expected = train_bpe([text for text in texts(300) if text not in held_out], 350)
    assert AutoTokenizer.from_pretrained(train.folder / "tokenizer").get_vocab() == expected.get_vocab()


def test_held_out_documents_depend_on_their_text_only(bpe, tmp_path):
    settings = TokenSettings(tokenizer=bpe, val_fraction=0.2)
    a = write_jsonl(tmp_path / "a.jsonl", texts(300))
    b = write_jsonl(tmp_path / "b.jsonl", [*texts(300)[::-1], *texts(20, seed=1)])
    _, val_a = make_tokens([a], tmp_path / "a", settings)
    train_b, val_b = make_tokens([b], tmp_path / "b", settings)
    assert set(decoded(val_a.folder)) <= set(decoded(val_b.folder))
    assert sorted(decoded(train_b.folder) + decoded(val_b.folder)) == sorted(texts(300) + texts(20, seed=1))
    assert 35 <= val_a.documents <= 85  # 60 expected, four standard deviations


# --- settings and sources -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "tokenizer is None and train_bpe None; set one"),
        ({"tokenizer": "x", "val_fraction": 1.0}, r"val_fraction is 1\.0; it must be 0 or above"),
        ({"tokenizer": "x", "max_tokens": 0}, "max_tokens is 0"),
        ({"train_bpe": 300, "max_tokens": 9}, "max_tokens is 9 with train_bpe, which reads all texts"),
    ],
)
def test_invalid_settings(options, message):
    with pytest.raises(ConfigError, match=message):
        TokenSettings(**options)


def test_set_without_documents_is_an_error(corpus, bpe, tmp_path):
    (tmp_path / "blank.txt").write_text(" \n\n")
    with pytest.raises(DataError, match=r"blank\.txt: no usable document \(1 empty, 0 unreadable\)"):
        make_tokens([f"{tmp_path}/blank.txt"], tmp_path / "out", TokenSettings(tokenizer=bpe))
    with pytest.raises(DataError, match=r"none of the 300 documents of .* is left for .*val; change val_fraction"):
        make_tokens([corpus], tmp_path / "out", TokenSettings(tokenizer=bpe, val_fraction=1e-9))
    assert not list(tmp_path.glob("out/**/manifest.json"))


# --- resuming -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held_out", ["none", "fraction", "source"])
def test_max_tokens(corpus, bpe, tmp_path, small_chunks, held_out):
    """A limited set is the beginning of the whole one, in whole documents, and is resumed like it."""
    source = write_jsonl(tmp_path / "in.jsonl", [value for text in texts(300) for value in (text, "")])
    given = {"val_sources": [corpus]} if held_out == "source" else {}
    settings = TokenSettings(tokenizer=bpe, val_fraction=0.1 * (held_out == "fraction"), shard_tokens=1500)
    limited = dataclasses.replace(settings, max_tokens=4000)
    whole = make_tokens([source], tmp_path / "whole", settings, **given)
    reports = make_tokens([source], tmp_path / "out", limited, **given)
    for full, report in zip(whole, reports, strict=True):
        tokens = stream(report.folder).tolist()
        assert tokens == stream(full.folder)[: len(tokens)].tolist() and tokens[-1] == 0
    train, *val = reports
    last = np.flatnonzero(stream(train.folder)[:-1] == 0)[-1] + 1  # tokens of all documents but the last
    assert last < 4000 <= train.tokens < whole[0].tokens
    assert [report.tokens == full.tokens for report, full in zip(val, whole[1:], strict=True)] == (
        {"none": [], "fraction": [False], "source": [True]}[held_out]
    )
    read = json.loads((train.folder / "manifest.json").read_text())["source"]
    assert read["documents"] == read["empty"] + 1 == sum(r.documents for r in (reports[: 2 - len(given)]))
    before = digests(tmp_path / "out")
    for report in reports:
        sorted(report.folder.glob("*.safetensors"))[-1].write_bytes(b"")
        again = make_tokens([source], tmp_path / "out", limited, **given)
        assert digests(tmp_path / "out") == before
        assert sum(r.kept_shards for r in again) == sum(r.shards for r in again) - 1


def test_killed_run_is_resumed(corpus, tmp_path, monkeypatch, small_chunks):
    settings = TokenSettings(train_bpe=350, val_fraction=0.1, shard_tokens=2000)
    make_tokens([corpus], tmp_path / "whole", settings)
    calls = []

    def kill_at_the_fourth(path, content):
        calls.append(path)
        if len(calls) == 4:
            path.with_name(f".{path.name}.tmp").write_bytes(content[:100])
            os.kill(os.getpid(), signal.SIGKILL)
        write_bytes(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(token_writer, "write_bytes", kill_at_the_fourth)
        run = multiprocessing.get_context("fork").Process(
            target=make_tokens, args=([corpus], tmp_path / "out", settings)
        )
        run.start()
        run.join(600)
    assert run.exitcode == -signal.SIGKILL
    assert not list(tmp_path.glob("out/*/manifest.json")) and len(list(tmp_path.glob("out/*/*.safetensors"))) == 3
    with pytest.raises(DataError, match=r"manifest\.json does not exist; pack it with scripts/make_tokens\.py"):
        TokenShards(tmp_path / "out" / "train")
    with pytest.raises(ConfigError, match=r"made with other settings .*shard_tokens: 2000 -> 999"):
        make_tokens([corpus], tmp_path / "out", dataclasses.replace(settings, shard_tokens=999))
    monkeypatch.setattr(token_shards, "train_bpe", None)  # the trained tokenizer is kept
    reports = make_tokens([corpus], tmp_path / "out", settings)
    assert sum(report.kept_shards for report in reports) == 3
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_damaged_shard_of_a_finished_set_is_repaired(corpus, bpe, tmp_path):
    settings = TokenSettings(tokenizer=bpe, shard_tokens=2000)
    (first,) = make_tokens([corpus], tmp_path / "out", settings)
    before = digests(tmp_path / "out")
    (again,) = make_tokens([corpus], tmp_path / "out", settings)
    assert again.kept_shards == again.shards == first.shards > 3 and digests(tmp_path / "out") == before
    path = tmp_path / "out" / "shard-000002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    (repaired,) = make_tokens([corpus], tmp_path / "out", settings)
    assert repaired.kept_shards == 2 and digests(tmp_path / "out") == before


def test_changed_texts_are_refused(bpe, tmp_path):
    values, out = texts(300), tmp_path / "out"
    settings = TokenSettings(tokenizer=bpe, shard_tokens=2000)
    make_tokens([write_jsonl(tmp_path / "in.jsonl", values)], out, settings)
    before = digests(out)
    for changed in (["new", *values[1:]], [*values, "more"], values[:-1], [*values[:-1], "last"]):
        with pytest.raises(DataError, match=r"was made from other texts than .*in\.jsonl holds now"):
            make_tokens([write_jsonl(tmp_path / "in.jsonl", changed)], out, settings)
        assert digests(out) == before


def test_other_data_sets_are_not_overwritten(corpus, bpe, tmp_path):
    settings = TokenSettings(tokenizer=bpe)
    make_tokens([corpus], tmp_path / "out", settings)
    before = digests(tmp_path / "out")
    with pytest.raises(ConfigError, match="train_bpe: None -> 300"):
        make_tokens([corpus], tmp_path / "out", TokenSettings(train_bpe=300))
    with pytest.raises(DataError, match="out already holds a data set"):
        make_tokens([corpus], tmp_path / "out", dataclasses.replace(settings, val_fraction=0.5))
    assert digests(tmp_path / "out") == before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(DataError, match="holds shards without a manifest"):
        make_tokens([corpus], tmp_path / "foreign", settings)
    assert (tmp_path / "foreign" / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_damaged_folder_is_repaired_or_refused(fuzz, fuzzing, tmp_path, monkeypatch, finished):
    monkeypatch.setattr("os.fsync", lambda file: None)
    settings, out = TokenSettings(train_bpe=300, shard_tokens=80), tmp_path / "set"
    source = write_jsonl(
        tmp_path / "in.jsonl", [" ".join(f"w{1 + (i * 7 + k) % 69}" for k in range(20)) for i in range(12)]
    )
    with pytest.MonkeyPatch.context() as patch:
        if not finished:
            patch.setattr(token_writer.TokenSetWriter, "publish", lambda *_: None)
        make_tokens([source], out, settings)
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert len(names) > 5

    def attempt(example):
        name, content = example
        again = shutil.copytree(out, tmp_path / "again")
        try:
            (again / name).write_bytes(content)
            error = fuzzing.refusal(lambda: make_tokens([source], again, settings), ConfigError, DataError)
        finally:
            shutil.rmtree(again)
        assert error is None or str(again) in str(error), error

    fuzz(fuzzing.damage(out, names), attempt, examples=5)


# --- the command --------------------------------------------------------------------------------------------------


def test_command(script, corpus, tmp_path, capsys):
    command = script("make_tokens")
    held_out, out = write_jsonl(tmp_path / "val.jsonl", ["held out", ""]), tmp_path / "out"
    arguments = ["--source", corpus, "--out", str(out), "--val-source", held_out, "--train-bpe", "300"]
    assert command(arguments) == 0
    text = capsys.readouterr().out
    assert f"{out}/train: 300 documents, {len(stream(out / 'train')):,} tokens" in text
    assert f"{out}/val: 1 documents" in text and "skipped 1 empty and 0 unreadable documents" in text
    assert f"python scripts/pretrain_lm.py --data.train {out}/train --data.val {out}/val --name NAME" in text
    TokenShards(out / "train").require_same_tokenizer(TokenShards(out / "val"))
    assert command([*arguments[:4], "--train-bpe", "100"]) == 2
    assert capsys.readouterr().err.startswith("make_tokens: error: ")
