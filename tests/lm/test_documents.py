"""Sources of documents: every file type gives the same texts, and unusable input is reported by place."""

import gzip
import json
import os

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from moa_lm.documents import Corpus
from moa_train.errors import ConfigError, DataError

TEXTS = [f"Text {i}.\n" + "Äpfel 日本語 🦉 stones\n" * (i % 5) + "\nEnd" for i in range(20)]


def write_jsonl(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def read(*sources, **options):
    return [document.text for document in Corpus([str(source) for source in sources], **options).documents()]


def problems(*sources, **options):
    documents = Corpus([str(source) for source in sources], **options).documents()
    return {document.where.rpartition("/")[2]: document.problem for document in documents if document.problem}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.fixture
def parquet(tmp_path):
    """A file with the texts in the column "body"; its name would be a pattern to a glob."""
    path = tmp_path / "set" / "train[1].parquet"
    path.parent.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"id": range(20), "body": TEXTS}), path, row_group_size=7)
    return path


def test_jsonl_files_are_read_in_order_of_their_names(tmp_path):
    write_jsonl(tmp_path / "rows" / "b.jsonl", TEXTS[10:])
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:10])
    (tmp_path / "rows" / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "rows" / "notes.md").write_text("not read")
    assert read(tmp_path / "rows") == read(tmp_path / "rows" / "*") == TEXTS
    assert read(tmp_path / "rows" / "b.jsonl", tmp_path / "a.jsonl") == TEXTS[10:] + TEXTS[:10]


def test_text_file_is_one_document(tmp_path):
    for i, text in enumerate(TEXTS):
        path = tmp_path / "files" / "nested" / f"{i:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))  # Windows line ends and a byte-order mark
    assert read(tmp_path / "files") == TEXTS


def test_matching_line_begins_a_document(tmp_path):
    (tmp_path / "one.txt.gz").write_bytes(gzip.compress("".join(f"{text}\n" for text in TEXTS).encode()))
    assert read(tmp_path / "one.txt.gz", split_on=r"^Text \d+\.$") == [f"{text}\n" for text in TEXTS]


def test_parquet_and_streamed_data_sets(parquet):
    (parquet.parent / "train1.parquet").write_bytes(b"matches the file's name as a pattern")
    assert read(parquet, field="body") == TEXTS
    (parquet.parent / "train1.parquet").unlink()
    corpus = Corpus([f"hf:{parquet.parent}"], field="body")
    assert [text.text for text in corpus] == [text.text for text in corpus] == TEXTS


def test_options_of_a_streamed_data_set(parquet, tmp_path):
    (tmp_path / "set" / "part").mkdir()
    parquet.rename(tmp_path / "set" / "part" / "b.parquet")
    write_jsonl(tmp_path / "set" / "a.jsonl", ["other"])
    assert read(f"hf:{tmp_path}/set:data_files=file://{tmp_path}/set/part/*:split=train", field="body") == TEXTS


def test_unreadable_records_are_reported_by_line(tmp_path):
    lines = [b'{"text": "good"}', b"", b"{", b'{"body": 1}', b'{"text": null}', b"[1]", b'{"text": "\\ud800"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*lines, b'{"text": "\xff"}', b'{"text": "good too"}']))
    found = problems(tmp_path / "a.jsonl")
    assert [where.partition(":")[2] for where in found] == ["3", "4", "5", "6", "7", "8"]
    for line, message in (
        (3, "invalid JSON"),
        (4, "no field 'text', found body"),
        (5, "expected a text, found NoneType"),
        (6, "not a JSON object"),
        (7, "not valid Unicode"),
        (8, "not valid Unicode"),
    ):
        assert message in found[f"a.jsonl:{line}"]
    assert [text for text in read(tmp_path / "a.jsonl") if text] == ["good", "good too"]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere", {}, "no such file or folder"),
        ("empty", {}, "no such file or folder"),
        ("notes.md", {}, r"no file of a supported type: \.txt"),
        ("cut.txt.gz", {}, r"cut\.txt\.gz is damaged after line"),
        ("no.parquet", {}, r"no\.parquet cannot be read after row 0 \(ArrowInvalid"),
        ("set/train[1].parquet", {}, "has no field 'text', found id, body; set --field"),
        ("a.jsonl", {"split_on": "("}, "split_on is '\\('; it must be a regular expression"),
    ],
)
def test_unusable_sources_are_named(source, options, message, parquet, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(os.urandom(10000).hex().encode())[:-2000])
    (tmp_path / "no.parquet").write_bytes(b"PAR1 is how it begins")
    with pytest.raises((ConfigError, DataError), match=message):
        read(tmp_path / source, **options)


def test_unusable_streams_are_named(parquet):
    with pytest.raises(ConfigError, match=r"must be hf:NAME\[:config=VALUE\].*\[:data_files=VALUE\]"):
        read("hf:a/b:rev=main")
    with pytest.raises(DataError, match=r"split=train\[:10%\] cannot be read after row 0 \(ValueError: Bad split"):
        read(f"hf:{parquet.parent}:split=train[:10%]", field="body")


def test_broken_stream_is_named_with_the_last_row(monkeypatch):
    """HTTP clients raise errors that are not OSErrors."""

    class ReadTimeout(Exception):
        pass

    def rows():
        yield {"text": "one"}
        raise ReadTimeout("slow\nserver")

    stream = datasets.IterableDataset.from_generator(rows, features=datasets.Features(text=datasets.Value("string")))
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: stream)
    with pytest.raises(
        DataError, match=r"hf:a/b cannot be read after row 1 \(ReadTimeout: slow server\); .* to resume"
    ):
        read("hf:a/b")


def test_reader_counts_skipped_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": " \\n"}\n{\n{"text": "end"}\n')
    reader = Corpus([str(tmp_path / "a.jsonl")], max_bad=1)
    assert [text.text for text in reader] == ["good", "end"]
    assert (reader.state.documents, reader.state.empty, reader.state.unreadable) == (2, 1, 1)
    reader.max_bad = 0
    with pytest.raises(DataError, match=r"1 documents are unreadable, more than --max-bad 0; the last: .*a\.jsonl:3"):
        list(reader)


def test_damaged_files(fuzz, fuzzing, tmp_path):
    lines = "\n".join(json.dumps({"text": text}) for text in TEXTS)
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "texts.jsonl").write_text(lines)
    (folder / "texts.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    (folder / "texts.txt").write_text("\n".join(TEXTS))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), folder / "texts.parquet", row_group_size=5)

    def attempt(example):
        name, content = example
        with fuzzing.replaced(folder / name, content):
            error = fuzzing.refusal(lambda: read(folder / name), DataError)
        assert error is None or str(folder / name) in str(error), error

    fuzz(fuzzing.damage(folder, sorted(path.name for path in folder.iterdir())), attempt, examples=20)
