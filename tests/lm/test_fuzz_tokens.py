"""Sources of texts and folders of tokens that something has damaged: `make_tokens` goes on, or says what is wrong.

What reads finished token shards is in test_token_faults.py.
"""

import contextlib
import gzip
import json
import shutil

import pyarrow
import pyarrow.parquet
import pytest

from moa_lm.documents import Corpus
from moa_lm.token_shards import SetWriter, TokenSettings, make_tokens
from moa_train.errors import DataError

TEXTS = [" ".join(f"w{1 + (i * 7 + k) % 69}" for k in range(20)) for i in range(12)]


REFUSALS = (ValueError, DataError, OSError)


def stop(*_):
    raise KeyboardInterrupt


@pytest.fixture
def files(tmp_path):
    """The same texts in a file of each kind; whoever damages one mends it."""
    folder = tmp_path / "files"
    folder.mkdir()
    lines = "\n".join(json.dumps({"text": text}) for text in TEXTS)
    (folder / "texts.jsonl").write_text(lines + "\n")
    (folder / "texts.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    (folder / "texts.txt").write_text("\n".join(TEXTS))
    table = pyarrow.table({"number": range(12), "text": TEXTS})
    for kind in ("snappy", "none"):
        pyarrow.parquet.write_table(table, folder / f"{kind}.parquet", compression=kind, row_group_size=5)
    return folder


def test_documents(fuzz, fuzzing, files):
    def attempt(example):
        name, content = example
        path = str(files / name)
        with fuzzing.replaced(files / name, content):
            error = fuzzing.refusal(lambda: [document.where for document in Corpus([path])], ValueError)
        assert error is None or path in str(error), error

    fuzz(fuzzing.damage(files, sorted(path.name for path in files.iterdir())), attempt, examples=20)


def test_a_parquet_text_that_is_no_text_is_named(files):
    path = files / "none.parquet"
    path.write_bytes(path.read_bytes().replace(b"w8 w9", b"w8\xffw9", 1))
    problems = [document for document in Corpus([str(path)]) if document.problem]
    assert [(document.where, document.problem) for document in problems] == [
        (f"{path}:row 1", "byte 0xff is not UTF-8")
    ]


@pytest.mark.parametrize("state", ["finished", "broken off"])
@pytest.mark.parametrize("way", ["given", "trained"])
def test_going_on(fuzz, fuzzing, files, tmp_path, tokenizer_folder, monkeypatch, state, way):
    """A folder of an earlier run with one file damaged, and the same command again."""
    monkeypatch.setattr("os.fsync", lambda file: None)  # the power stays on
    chosen = {"tokenizer": str(tokenizer_folder)} if way == "given" else {"train_bpe": 300}
    settings = TokenSettings(**chosen, shard_tokens=80)
    source, out = files / "texts.jsonl", tmp_path / "set"
    with pytest.MonkeyPatch.context() as patch:
        if state == "broken off":
            patch.setattr(SetWriter, "publish", stop)
        with contextlib.suppress(KeyboardInterrupt):
            make_tokens([str(source)], out, settings)
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.stat().st_size and path.is_file())
    assert len(names) > 5

    def attempt(example):
        name, content = example
        again = shutil.copytree(out, tmp_path / "again")
        try:
            (again / name).write_bytes(content)
            error = fuzzing.refusal(lambda: make_tokens([str(source)], again, settings), *REFUSALS)
        finally:
            shutil.rmtree(again)
        assert error is None or str(again) in str(error), error

    fuzz(fuzzing.damage(out, names), attempt, examples=5)


@pytest.mark.parametrize("key", ["until_sha256", "until", "text_bytes"])
def test_a_record_that_lacks_something_is_made_again(files, tmp_path, tokenizer_folder, key):
    settings, out = TokenSettings(tokenizer=str(tokenizer_folder), shard_tokens=80), tmp_path / "set"
    make_tokens([str(files / "texts.jsonl")], out, settings)
    whole = (out / "manifest.json").read_bytes()
    manifest = json.loads(whole)
    del manifest["shards"][1][key]
    (out / "manifest.json").write_text(json.dumps(manifest))
    [report] = make_tokens([str(files / "texts.jsonl")], out, settings)
    assert report.kept_shards == 1 and json.loads((out / "manifest.json").read_bytes()) == json.loads(whole)
