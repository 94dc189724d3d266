"""Packing: the tokens that transformers gives, the same bytes however it is run, and runs that break off."""

import dataclasses
import gzip
import hashlib
import importlib.util
import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from moa_lm import documents, encode, token_shards
from moa_lm.bpe import END_OF_TEXT, train_bpe
from moa_lm.data import TokenShards
from moa_lm.documents import Corpus
from moa_lm.token_shards import TokenSettings, make_tokens
from moa_train.atomic_io import write_bytes
from moa_train.errors import DataError

ROOT = Path(__file__).parents[2]
WORDS = ("the", "river", "Äpfel", "runs", "under", "日本語", "a", "🦉", "bridge", "of", "stones", "1984", "x = 3;")


def texts(count, seed=0):
    """`count` different texts of up to 60 words and a few lines."""
    random = np.random.default_rng(seed)
    lines = [" ".join(random.choice(WORDS, random.integers(1, 60))) for _ in range(count)]
    return [f"Text {i}.\n{line}\n\nEnd" for i, line in enumerate(lines)]


def write_jsonl(path, values, **fields):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": value, **fields}) + "\n" for value in values))
    return path


def stream(folder):
    """All tokens of a set, by safetensors alone."""
    return np.concatenate([load_file(path)["tokens"] for path in sorted(Path(folder).glob("*.safetensors"))])


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A folder with a small byte-level BPE."""
    folder = tmp_path_factory.mktemp("bpe")
    train_bpe(texts(50), 400).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def corpus(tmp_path):
    """300 texts as JSONL."""
    return str(write_jsonl(tmp_path / "corpus.jsonl", texts(300)))


# --- tokens -------------------------------------------------------------------------------------------------------


def test_stream_is_what_transformers_gives(corpus, bpe, tmp_path):
    (report,) = make_tokens([corpus], tmp_path / "out", TokenSettings(tokenizer=bpe, shard_tokens=3000))
    tokenizer = AutoTokenizer.from_pretrained(bpe)
    expected = [token for text in texts(300) for token in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    assert stream(tmp_path / "out").tolist() == expected
    assert stream(tmp_path / "out").dtype == np.uint16

    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert report[1:7] == (
        300,
        len(expected),
        sum(len(t.encode()) for t in texts(300)),
        len(manifest["shards"]),
        0,
        len(tokenizer),
    )
    assert (manifest["documents"], manifest["tokens"], manifest["bytes"]) == report[1:4]
    assert (manifest["vocab_size"], manifest["end_of_text"], manifest["dtype"]) == (len(tokenizer), 0, "uint16")
    paths = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(paths) > 2 and [shard["name"] for shard in manifest["shards"]] == [path.name for path in paths]
    for shard, path in zip(manifest["shards"], paths, strict=True):
        tokens = load_file(path)["tokens"]
        assert (shard["tokens"], shard["documents"]) == (len(tokens), (tokens == 0).sum())
        assert (shard["bytes"], shard["sha256"]) == (
            path.stat().st_size,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        assert tokens[-1] == 0 and shard["tokens"] - 3000 < 400  # it ends with the document that filled it
    tokenizer_json = (tmp_path / "out" / "tokenizer" / "tokenizer.json").read_bytes()
    assert manifest["tokenizer"]["sha256"] == hashlib.sha256(tokenizer_json).hexdigest()


def test_stream_decodes_to_the_texts(corpus, bpe, tmp_path):
    make_tokens([corpus], tmp_path / "out", TokenSettings(tokenizer=bpe))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    assert tokenizer.decode(stream(tmp_path / "out")).split(END_OF_TEXT) == [*texts(300), ""]


def test_the_name_of_a_special_token_is_text(bpe, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [f"one {END_OF_TEXT} text", "another"])
    make_tokens([str(source)], tmp_path / "out", TokenSettings(tokenizer=bpe))
    tokens = stream(tmp_path / "out")
    assert (tokens == 0).sum() == 2
    assert AutoTokenizer.from_pretrained(bpe).decode(tokens[: tokens.tolist().index(0)]) == f"one {END_OF_TEXT} text"


def test_a_tokenizer_that_adds_tokens_adds_none(adding_tokenizer, tmp_path):
    """Llama's begins every text with <s>, T5's ends it with </s>; shards have no <s>, so what they train has none."""
    theirs = AutoTokenizer.from_pretrained(adding_tokenizer)
    assert theirs("ab a b") != theirs("ab a b", add_special_tokens=False)
    source = write_jsonl(tmp_path / "in.jsonl", ["ab a b", "a"])
    make_tokens([str(source)], tmp_path / "out", TokenSettings(tokenizer=str(adding_tokenizer)))
    expected = [theirs(text, add_special_tokens=False)["input_ids"] for text in ("ab a b", "a")]
    assert stream(tmp_path / "out").tolist() == [*expected[0], 2, *expected[1], 2]
    ours = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    assert ours("ab a b")["input_ids"] == expected[0] and ours.decode(expected[0]) == theirs.decode(expected[0])
    assert ours("ab", "a")["input_ids"] == theirs("ab", "a", add_special_tokens=False)["input_ids"]
    assert ours.bos_token_id == ours.eos_token_id == 2 and ours.get_vocab() == theirs.get_vocab()
    make_tokens([str(source)], tmp_path / "again", TokenSettings(tokenizer=str(tmp_path / "out" / "tokenizer")))
    TokenShards(tmp_path / "again").require_same_tokenizer(TokenShards(tmp_path / "out"))


def test_a_tokenizer_that_adds_nothing_is_not_changed(bpe, tmp_path):
    encode.save_tokenizer(bpe, tmp_path / "saved")
    AutoTokenizer.from_pretrained(bpe).save_pretrained(tmp_path / "plain")
    assert digests(tmp_path / "saved") == digests(tmp_path / "plain")


def test_end_of_text_of_a_tokenizer_that_has_none(tmp_path):
    inner = Tokenizer(WordLevel({"a": 0, "b": 1, "<end>": 2}, unk_token="a"))
    inner.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path / "none")
    source, settings = write_jsonl(tmp_path / "in.jsonl", ["a b", "b"]), TokenSettings(tokenizer=f"{tmp_path}/none")
    for token, message in (
        (None, "name one of its tokens with --end-of-text"),
        ("<eos>", "'<eos>', which is no token"),
    ):
        with pytest.raises(ValueError, match=message):
            make_tokens([str(source)], tmp_path / "out", dataclasses.replace(settings, end_of_text=token))
    make_tokens([str(source)], tmp_path / "out", dataclasses.replace(settings, end_of_text="<end>"))
    assert stream(tmp_path / "out").tolist() == [0, 1, 2, 1, 2]
    ours = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    assert ours.eos_token == ours.bos_token == "<end>" and len(ours) == 3
    assert ours.decode(stream(tmp_path / "out"), skip_special_tokens=True) == "a b b"
    with pytest.raises(ValueError, match="end_of_text: '<end>' -> 'b'"):
        make_tokens([str(source)], tmp_path / "out", dataclasses.replace(settings, end_of_text="b"))


def test_a_tokenizer_in_python_is_refused(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path / "bytes")
    with pytest.raises(ValueError, match="is a ByT5Tokenizer in Python, which has no"):
        encode.save_tokenizer(str(tmp_path / "bytes"), tmp_path / "out")


@pytest.mark.parametrize(("size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)], ids=["two", "four"])
def test_tokens_take_the_fewest_bytes(tmp_path, size, dtype):
    inner = Tokenizer(WordLevel({f"w{i}": i for i in range(size)}, unk_token="w1"))
    inner.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w0").save_pretrained(tmp_path / "tokenizer")
    source = write_jsonl(tmp_path / "in.jsonl", [f"w3 w{size - 1}"])
    make_tokens([str(source)], tmp_path / "out", TokenSettings(tokenizer=str(tmp_path / "tokenizer")))
    assert stream(tmp_path / "out").dtype == dtype and stream(tmp_path / "out").tolist() == [3, size - 1, 0]
    assert TokenShards(tmp_path / "out").window(0, 2).tolist() == [3, size - 1, 0]


def test_trained_bpe(corpus, tmp_path):
    train, val = make_tokens([corpus], tmp_path / "out", TokenSettings(train_bpe=350, val_fraction=0.2))
    tokenizer = AutoTokenizer.from_pretrained(train.folder / "tokenizer")
    assert len(tokenizer) == train.vocab_size == 350
    assert tokenizer.bos_token == tokenizer.eos_token == END_OF_TEXT and tokenizer.eos_token_id == 0
    assert 0 not in tokenizer("nothing is added")["input_ids"]
    anything = "".join(map(chr, range(1, 3000))) + "🦉\n\t  \r\n"
    assert tokenizer.decode(tokenizer(anything)["input_ids"]) == anything
    held_out = set(tokenizer.decode(stream(val.folder)).split(END_OF_TEXT)) - {""}
    same = train_bpe([text for text in texts(300) if text not in held_out], 350)
    assert same.get_vocab() == tokenizer.get_vocab()  # of the training documents alone
    make_tokens([corpus], tmp_path / "again", TokenSettings(train_bpe=350, val_fraction=0.2), workers=2)
    assert digests(tmp_path / "again") == digests(tmp_path / "out")
    with pytest.raises(ValueError, match="train_bpe is 256; allowed: 257 or more"):
        train_bpe([], 256)


def test_held_out_documents_depend_on_their_texts_alone(bpe, tmp_path):
    settings = TokenSettings(tokenizer=bpe, val_fraction=0.2)
    a = write_jsonl(tmp_path / "a.jsonl", texts(300))
    b = write_jsonl(tmp_path / "b.jsonl", [*texts(300)[::-1], *texts(20, seed=1)])
    (_, val_a), (train_b, val_b) = (make_tokens([str(s)], tmp_path / s.stem, settings) for s in (a, b))
    tokenizer = AutoTokenizer.from_pretrained(bpe)
    of_a, of_train_b, of_b = (
        set(tokenizer.decode(stream(r.folder)).split(END_OF_TEXT)) for r in (val_a, train_b, val_b)
    )
    assert of_a <= of_b and not (of_train_b & of_b) - {""}
    assert 35 <= val_a.documents <= 85  # 60 expected; four standard deviations
    assert len(of_train_b | of_b) == 321


# --- sources ------------------------------------------------------------------------------------------------------


@pytest.fixture
def every_kind(tmp_path, monkeypatch):
    """The same 20 texts in every form, {name: (sources, options)}."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    values = texts(20)
    jsonl = write_jsonl(tmp_path / "rows" / "a.jsonl", values[:10])
    packed = tmp_path / "packed" / "a.jsonl.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(jsonl.read_bytes()))
    write_jsonl(tmp_path / "rows" / "b.jsonl", values[10:])
    write_jsonl(tmp_path / "packed" / "b.jsonl", values[10:])
    write_jsonl(tmp_path / "b.jsonl", values[10:])
    for i, value in enumerate(values):
        path = tmp_path / "files" / "deeper" / f"{i:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value.replace("\n", "\r\n").encode("utf-8-sig"))  # as Windows and Gutenberg write it
    (tmp_path / "files" / "notes.md").write_text("not read")
    (tmp_path / "one.txt.gz").write_bytes(gzip.compress("".join(v + "\n" for v in values).encode()))
    (tmp_path / "set").mkdir()
    table = datasets.Dataset.from_dict({"body": values, "id": list(range(20))})
    table.to_parquet(tmp_path / "set" / "train.parquet")
    return {
        "jsonl": ([f"{tmp_path}/rows"], {}),
        "packed": ([f"{tmp_path}/packed/*"], {}),
        "several": ([str(packed), f"{tmp_path}/b.jsonl"], {}),
        "files": ([f"{tmp_path}/files"], {}),
        "split": ([f"{tmp_path}/one.txt.gz"], {"split_on": r"^Text \d+\.$"}),
        "parquet": ([f"{tmp_path}/set/train.parquet"], {"field": "body"}),
        "hub": ([f"hf:{tmp_path}/set:split=train"], {"field": "body"}),
    }


def test_every_kind_of_source_gives_the_same_documents(every_kind):
    for name, (sources, options) in every_kind.items():
        corpus = Corpus(sources, **options)
        for _ in range(2):  # it can be read again
            documents = list(corpus)
            assert not any(document.problem for document in documents), name
            assert [document.text.removesuffix("\n") for document in documents] == texts(20), name
            assert name == "hub" or corpus.done == (corpus.size or -1)


def test_what_cannot_be_used_is_named(tmp_path, bpe):
    lines = [b'{"text": "good"}', b"", b"{", b'{"body": 1}', b'{"text": null}', b'{"text": " \\n"}', b"[1]"]
    lines += [b'{"text": "\\ud800"}', b'{"text": "\xff"}', b'{"text": "good too"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.txt").write_bytes(b"# one\nfine\n# two\nline\nbad \xe9\n# three\r\nfine\n")
    sources = [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.txt"]
    settings = TokenSettings(tokenizer=bpe, split_on="^#")
    (report,) = make_tokens(sources, tmp_path / "out", settings, max_bad=7)
    assert (report.documents, report.skipped.empty, report.skipped.unusable) == (4, 1, 7)
    found = {entry["where"].rpartition("/")[2]: entry["problem"] for entry in report.skipped.named}
    assert list(found) == [
        "a.jsonl:3",
        "a.jsonl:4",
        "a.jsonl:5",
        "a.jsonl:6",
        "a.jsonl:7",
        "a.jsonl:8",
        "a.jsonl:9",
        "b.txt:5",
    ]
    for where, problem in (
        ("a.jsonl:3", "not JSON"), ("a.jsonl:4", "no field 'text', only body"), ("a.jsonl:5", "is a NoneType"),
        ("a.jsonl:6", "empty"), ("a.jsonl:7", "not a JSON object"), ("a.jsonl:8", "no Unicode text"),
        ("a.jsonl:9", "not JSON: 'utf-8'"), ("b.txt:5", "byte 0xe9 is not UTF-8"),
    ):  # fmt: skip
        assert problem in found[where]
    text = AutoTokenizer.from_pretrained(bpe).decode(stream(tmp_path / "out"))
    assert text.split(END_OF_TEXT) == ["good", "good too", "# one\nfine\n", "# three\nfine\n", ""]
    with pytest.raises(ValueError, match=r"7 documents cannot be read, more than --max-bad 6.*b\.txt:5: byte 0xe9"):
        make_tokens(sources, tmp_path / "other", settings, max_bad=6)


def test_sources_that_are_none_are_named(tmp_path, bpe, corpus):
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(os.urandom(10000).hex().encode())[:-2000])
    (tmp_path / "no.parquet").write_bytes(b"PAR1 is how it begins")
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" \n\n")
    for source, options, message in (
        (f"{tmp_path}/nowhere", {}, "no such file or folder"),
        (f"{tmp_path}/empty", {}, "no such file or folder"),
        (f"{ROOT}/README.md", {}, r"holds no text; read are \.txt"),
        (f"{tmp_path}/cut.txt.gz", {}, r"cut\.txt\.gz is damaged after line"),
        (f"{tmp_path}/no.parquet", {}, r"no\.parquet cannot be read as Parquet"),
        (f"{tmp_path}/blank.txt", {}, r"holds no document that can be used.*blank\.txt:1"),
        (corpus, {"split_on": "("}, "no regular expression"),
        (corpus, {"split_on": "x"}, "holds no text file that it could split"),
        (corpus, {"field": "body"}, "more than --max-bad 100 allows"),
        (f"hf:{tmp_path}/none", {}, "none"),
        (f"hf:{tmp_path}/set:name=x", {}, "allowed is hf:NAME"),
        (corpus, {"val_fraction": 1e-9}, "none is left for .*val; change val_fraction"),
    ):
        with pytest.raises(ValueError, match=message):
            make_tokens([source], tmp_path / "out", TokenSettings(tokenizer=bpe, **options))
        assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_large_text_file_wants_to_be_split(tmp_path, monkeypatch, caplog):
    path = tmp_path / "large.txt.gz"
    path.write_bytes(gzip.compress(b"# title\n" * 100))
    monkeypatch.setattr(documents, "_LARGE", 400)
    assert len(list(Corpus([str(path)]))) == 1
    assert [record.getMessage().partition(", which")[0] for record in caplog.records] == [
        f"{path}:1 begins one document of more than 400 bytes"
    ]
    assert "--split-on" in caplog.text
    monkeypatch.setattr(documents, "_TOO_LARGE", 700)
    with pytest.raises(ValueError, match=r"gz:1 begins a document of more than 700 bytes; .*--split-on"):
        list(Corpus([str(path)]))
    caplog.clear()
    assert len(list(Corpus([str(path)], split_on="^#"))) == 100 and not caplog.records


def test_options_of_a_stream(every_kind, tmp_path):
    folder = f"{tmp_path}/set"
    (tmp_path / "set" / "part").mkdir()
    (tmp_path / "set" / "train.parquet").rename(tmp_path / "set" / "part" / "b.parquet")
    write_jsonl(tmp_path / "set" / "a.jsonl", ["other"])
    for options, expected in (
        (":data_dir=part", texts(20)),
        (":data_files=part/b.parquet:split=train", texts(20)),
        (f":data_files=file://{folder}/part/*.parquet", texts(20)),
    ):
        assert [document.text for document in Corpus([f"hf:{folder}{options}"], field="body")] == expected
    with pytest.raises(ValueError, match=r"a stream has no part of a split; .* end it with --max-tokens"):
        Corpus([f"hf:{folder}:split=train[:10%]"])
    with pytest.raises(ValueError, match=r"allowed is hf:NAME\[:config=VALUE\].*\[:data_files=VALUE\]"):
        Corpus([f"hf:{folder}:rev=main"])


def test_a_revision_is_asked_for(monkeypatch):
    import datasets

    given = []
    rows = datasets.Dataset.from_dict({"text": ["one"]}).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: given.append((a, k)) or rows)
    assert [document.text for document in Corpus(["hf:a/b:revision=v1.0:config=c"])] == ["one"]
    assert given == [(("a/b",), {"streaming": True, "split": "train", "revision": "v1.0", "name": "c"})]


def test_a_stream_that_breaks_off_is_named(bpe, tmp_path, monkeypatch):
    """The errors of HTTP clients are no OSError."""
    import datasets

    class ReadTimeout(Exception):
        pass

    broken = [True]

    def rows():
        for number, text in enumerate(texts(30)):
            if number == 20 and broken:
                raise ReadTimeout
            yield {"text": text}

    stream_of_it = datasets.IterableDataset.from_generator(
        rows, features=datasets.Features(text=datasets.Value("string"))
    )
    monkeypatch.setattr(encode, "_CHUNK_DOCUMENTS", 1)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: stream_of_it)
    settings = TokenSettings(tokenizer=bpe, shard_tokens=300)
    with pytest.raises(
        ValueError, match=r"source 'hf:a/b' broke off after row 20: ReadTimeout.* The same command goes"
    ):
        make_tokens(["hf:a/b"], tmp_path / "out", settings)
    broken.clear()
    (report,) = make_tokens(["hf:a/b"], tmp_path / "out", settings)
    assert report.documents == 30 and report.kept_shards > 1

    def refuse(*_, **__):
        raise ReadTimeout("slow\nserver")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match="source 'hf:a/b' cannot be opened: ReadTimeout: slow server"):
        Corpus(["hf:a/b"])


def test_columns_that_are_not_there_are_named(every_kind):
    for name in ("parquet", "hub"):
        with pytest.raises(ValueError, match="no field 'text', only body, id; name one of them with --field"):
            list(Corpus(every_kind[name][0]))


@pytest.mark.parametrize(("options", "message"), [
    ({}, "tokenizer is None and train_bpe None; give one"),
    ({"tokenizer": "x", "train_bpe": 300}, "give one of the two"),
    ({"tokenizer": "x", "val_fraction": 1.0}, r"val_fraction is 1\.0; allowed: 0 or more"),
    ({"tokenizer": "x", "shard_tokens": 0}, "shard_tokens is 0"),
    ({"tokenizer": "x", "max_tokens": 0}, "max_tokens is 0; allowed: 1 or more"),
    ({"train_bpe": 300, "end_of_text": "x"}, "end_of_text is 'x' with train_bpe"),
    ({"train_bpe": 300, "max_tokens": 9}, "max_tokens is 9 with train_bpe, which reads all texts"),
], ids=["neither", "both", "fraction", "shard", "tokens", "end", "trained"])  # fmt: skip
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        TokenSettings(**options)


# --- any number of processes, runs that break off -----------------------------------------------------------------


def test_any_number_of_workers_writes_the_same_bytes(corpus, bpe, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "_CHUNK_DOCUMENTS", 7)  # so that there is something to share out
    settings = TokenSettings(tokenizer=bpe, val_fraction=0.1, shard_tokens=2000)
    for workers in (1, 3):
        make_tokens([corpus], tmp_path / str(workers), settings, workers=workers)
    assert digests(tmp_path / "1") == digests(tmp_path / "3")
    assert len(digests(tmp_path / "1")) > 8 and not list(tmp_path.glob("1/.*"))


@pytest.mark.parametrize("held_out", ["none", "split off", "named"])
def test_max_tokens(corpus, bpe, tmp_path, monkeypatch, held_out):
    """The beginning of the whole sets, whole documents; the same by any number of workers, and gone on with."""
    monkeypatch.setattr(encode, "_CHUNK_DOCUMENTS", 7)
    values = [value for text in texts(300) for value in (text, "")]  # empty ones are counted up to the end only
    source = str(write_jsonl(tmp_path / "in.jsonl", values))
    given = {"val_sources": [corpus]} if held_out == "named" else {}
    fraction = 0.1 if held_out == "split off" else 0.0
    settings = TokenSettings(tokenizer=bpe, val_fraction=fraction, shard_tokens=1500)
    limited = dataclasses.replace(settings, max_tokens=4000)
    whole = make_tokens([source], tmp_path / "whole", settings, **given)
    out = tmp_path / "limited"
    reports = make_tokens([source], out, limited, **given)
    for all_of_it, report in zip(whole, reports, strict=True):
        tokens = stream(report.folder).tolist()
        assert tokens == stream(all_of_it.folder)[: len(tokens)].tolist() and tokens[-1] == 0
    train, *others = reports
    last = np.flatnonzero(stream(train.folder)[:-1] == 0)[-1] + 1  # tokens of all documents but the last
    assert last < 4000 <= train.tokens < whole[0].tokens
    assert [report.tokens == full.tokens for report, full in zip(others, whole[1:], strict=True)] == (
        {"none": [], "split off": [False], "named": [True]}[held_out]
    )
    facts = json.loads((train.folder / "manifest.json").read_text())["source"]
    assert facts["documents"] == sum(report.documents for report in (reports if fraction else [train]))
    assert facts["empty"] == facts["documents"] - 1
    make_tokens([source], tmp_path / "workers", limited, workers=3, **given)
    assert digests(tmp_path / "workers") == digests(out)
    for damaged in (train.folder, *(report.folder for report in others)):
        path = sorted(damaged.glob("*.safetensors"))[-1]
        path.write_bytes(b"")
        again = make_tokens([source], out, limited, workers=2, **given)
        assert digests(out) == digests(tmp_path / "workers")
        assert sum(report.kept_shards for report in again) == sum(report.shards for report in again) - 1
    assert all(report.kept_shards == report.shards for report in make_tokens([source], out, limited, **given))
    with pytest.raises(ValueError, match="max_tokens: 4000 -> 5000"):
        make_tokens([source], out, dataclasses.replace(limited, max_tokens=5000), **given)
    with pytest.raises(ValueError, match="max_tokens: 4000 -> None"):
        make_tokens([source], out, settings, **given)


def test_no_more_is_read_than_max_tokens_need(corpus, bpe, tmp_path):
    """A stream may have no end."""
    source = tmp_path / "in.jsonl"
    source.write_bytes(Path(corpus).read_bytes() + b"no JSON\n" * 1000)  # more than --max-bad allows
    settings = TokenSettings(tokenizer=bpe, shard_tokens=1500, max_tokens=3000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "_CHUNK_DOCUMENTS", 7)
        (report,) = make_tokens([str(source)], tmp_path / "out", settings)
        (again,) = make_tokens([str(source)], tmp_path / "out", settings, workers=2)
    assert report.tokens == again.tokens and again.kept_shards == report.shards


def test_a_set_of_a_version_without_a_setting_is_gone_on_with(corpus, bpe, tmp_path):
    (report,) = make_tokens([corpus], tmp_path / "out", TokenSettings(tokenizer=bpe))
    path = report.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    assert [manifest["settings"].pop(name) for name in ("max_tokens", "end_of_text")] == [None, None]
    path.write_text(json.dumps(manifest))
    (again,) = make_tokens([corpus], tmp_path / "out", TokenSettings(tokenizer=bpe))
    assert again.kept_shards == report.shards


def test_killed_run_goes_on_where_it_was(corpus, tmp_path, monkeypatch):
    settings = TokenSettings(train_bpe=350, val_fraction=0.1, shard_tokens=2000)
    make_tokens([corpus], tmp_path / "whole", settings)
    calls = []

    def killed_at_the_fourth(path, content):
        calls.append(path)
        if len(calls) == 4:
            path.with_name(f".{path.name}.tmp").write_bytes(content[:100])  # half a shard, out of sight
            os.kill(os.getpid(), signal.SIGKILL)
        write_bytes(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "_CHUNK_DOCUMENTS", 7)  # so that the other workers are busy or waiting
        patch.setattr(token_shards, "write_bytes", killed_at_the_fourth)
        arguments = {"args": ([corpus], tmp_path / "out", settings), "kwargs": {"workers": 2}}
        run = multiprocessing.get_context("fork").Process(target=make_tokens, **arguments)
        run.start()
        run.join(600)
    assert run.exitcode == -signal.SIGKILL
    assert not list(tmp_path.glob("out/*/manifest.json")) and len(list(tmp_path.glob("out/*/*.safetensors"))) == 3
    with pytest.raises(DataError, match=r"manifest\.json does not exist; run the scripts/make_tokens\.py command"):
        TokenShards(tmp_path / "out" / "train")
    lock = FileLock(tmp_path / "out" / ".parts" / "lock")
    lock.acquire(timeout=300)  # the killed run's workers end by themselves, and let go of its lock
    lock.release()
    with pytest.raises(ValueError, match=r"out was made with other settings .*shard_tokens: 2000 -> 999"):
        make_tokens([corpus], tmp_path / "out", dataclasses.replace(settings, shard_tokens=999))
    monkeypatch.setattr(token_shards, "train_bpe", None)  # nothing is trained again
    reports = make_tokens([corpus], tmp_path / "out", settings, workers=3)
    assert sum(report.kept_shards for report in reports) == 3
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_finished_set_is_verified_and_mended(corpus, bpe, tmp_path):
    settings = TokenSettings(tokenizer=bpe, shard_tokens=2000)
    (first,) = make_tokens([corpus], tmp_path / "out", settings)
    before = digests(tmp_path / "out")
    (report,) = make_tokens([corpus], tmp_path / "out", settings, workers=2)
    assert report[:5] == first[:5] and report.kept_shards == report.shards == first.shards > 3
    assert digests(tmp_path / "out") == before
    path = tmp_path / "out" / "shard-000002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    (report,) = make_tokens([corpus], tmp_path / "out", settings)
    assert report.kept_shards == 2 and digests(tmp_path / "out") == before


def test_other_texts_are_refused(bpe, tmp_path):
    values, source, out = texts(300), tmp_path / "in.jsonl", tmp_path / "out"
    settings = TokenSettings(tokenizer=bpe, shard_tokens=2000)
    write_jsonl(source, values)
    make_tokens([str(source)], out, settings)
    before = digests(out)
    for changed in (["new", *values[1:]], [*values, "more"], values[:-1], [*values[:-1], "last"]):
        write_jsonl(source, changed)
        with pytest.raises(ValueError, match=r"was made from other texts than .*in\.jsonl holds now"):
            make_tokens([str(source)], out, settings)
        assert {name: digest for name, digest in digests(out).items() if not name.startswith(".")} == before
    write_jsonl(source, values)
    (report,) = make_tokens([str(source)], out, settings)  # the refusals did no harm
    assert report.kept_shards == report.shards and digests(out) == before


def test_tokenizer_of_other_texts_is_refused(tmp_path, monkeypatch):
    source, out = write_jsonl(tmp_path / "in.jsonl", texts(30)), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(token_shards, "_pack", lambda *_: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):  # after the training
            make_tokens([str(source)], out, TokenSettings(train_bpe=300))
    write_jsonl(source, texts(31))
    with pytest.raises(ValueError, match="trained was made from other texts"):
        make_tokens([str(source)], out, TokenSettings(train_bpe=300))
    assert not (out / "manifest.json").exists()


def test_folders_of_others_are_left_alone(corpus, bpe, tmp_path):
    settings = TokenSettings(tokenizer=bpe)
    make_tokens([corpus], tmp_path / "out", settings)
    with pytest.raises(ValueError, match="train_bpe: None -> 300"):
        make_tokens([corpus], tmp_path / "out", TokenSettings(train_bpe=300))
    with pytest.raises(ValueError, match="out holds a data set already"):
        make_tokens([corpus], tmp_path / "out", TokenSettings(tokenizer=bpe, val_fraction=0.5))
    make_tokens([corpus], tmp_path / "out", settings)  # still the old one
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(ValueError, match="holds shards that no manifest lists"):
        make_tokens([corpus], tmp_path / "foreign", settings)
    assert (tmp_path / "foreign" / "model.safetensors").read_bytes() == b"weights"
    (tmp_path / "busy" / ".parts").mkdir(parents=True)
    with FileLock(tmp_path / "busy" / ".parts" / "lock"), pytest.raises(ValueError, match="written by another run"):
        make_tokens([corpus], tmp_path / "busy", settings)


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def command():
    path = ROOT / "scripts" / "make_tokens.py"
    spec = importlib.util.spec_from_file_location("make_tokens_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_command(command, corpus, tmp_path, capsys):
    held_out = write_jsonl(tmp_path / "val.jsonl", ["held out", ""])
    out = tmp_path / "out"
    arguments = ["--source", corpus, "--out", str(out), "--val-source", str(held_out), "--train-bpe", "300"]
    assert command([*arguments, "--workers", "1"]) == 0
    text = capsys.readouterr().out
    assert f"{out}/train: 300 documents, {len(stream(out / 'train')):,} tokens" in text
    assert f"{out}/val: 1 documents" in text and "val.jsonl:2: empty" in text and "vocabulary of 300 tokens" in text
    assert f"python scripts/pretrain_lm.py --data.train {out}/train --data.val {out}/val --name NAME" in text
    TokenShards(out / "train").require_same_tokenizer(TokenShards(out / "val"))
    end = ["--tokenizer", str(out / "train/tokenizer"), "--max-tokens", "1_000", "--end-of-text", END_OF_TEXT]
    assert command(["--source", corpus, "--out", str(tmp_path / "short"), *end]) == 0
    assert 1000 <= len(stream(tmp_path / "short")) < 1400
    assert "warning" not in capsys.readouterr().out
    end[3] = "1_000_000"
    assert command(["--source", corpus, "--out", str(tmp_path / "all"), *end]) == 0
    assert "warning: the sources end before 1,000,000 tokens" in capsys.readouterr().out
    assert command(["--source", corpus, "--out", str(out), "--train-bpe", "100"]) == 1
    assert "make_tokens: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(["--help"])
    assert "hf:NAME" in capsys.readouterr().out
