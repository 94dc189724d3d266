"""Windows of a token stream across shards, in an order that is a function of (seed, epoch, position)."""

import hashlib
import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from moa_lm.data import TokenDataConfig, TokenShards, train_loader, val_loader
from moa_train.errors import DataError


def write_set(folder, pieces, dtype=np.uint16, **fields):
    """Write a set whose shards hold these pieces, without `moa_lm.token_shards`."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number, tokens in enumerate(pieces):
        name = f"shard-{number:06d}.safetensors"
        save_file({"tokens": np.asarray(tokens, dtype)}, folder / name)
        content = (folder / name).read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        records.append({"name": name, "tokens": len(tokens), "documents": 1, "bytes": len(content), "sha256": sha256})
    manifest = {
        "format": "moa-tokens-1", "tokens": sum(map(len, pieces)), "documents": len(pieces), "bytes": 1000,
        "vocab_size": 50000, "end_of_text": 0, "dtype": np.dtype(dtype).name,
        "tokenizer": {"name": "t", "sha256": "0" * 64}, "source": {}, "shards": records, **fields,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def counting(tmp_path, *lengths):
    """A set whose token i is i, in shards of these lengths."""
    return TokenShards(write_set(tmp_path / "set", np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])))


def config(length=4, **fields):
    return TokenDataConfig(train="", sequence_length=length, **fields)


def firsts(loader, length=4):
    """Check the tokens of a `counting` set's loader and return the window numbers of its batches."""
    numbers = []
    for tokens, windows in loader:
        assert tokens.dtype == torch.int64 and tokens.shape[1] == length + 1
        assert torch.equal(tokens, tokens[:, :1] + torch.arange(length + 1))
        assert not (tokens[:, 0] % length).any()
        numbers.append((tokens[:, 0] // length).tolist())
        assert list(windows) == numbers[-1]
    return numbers


# --- windows ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    length=st.integers(1, 50),
    dtype=st.sampled_from([np.uint16, np.uint32]),
)
def test_windows_are_slices_of_the_stream(tmp_path, lengths, length, dtype):
    stream = np.random.default_rng(sum(lengths)).integers(0, 50000, sum(lengths)).astype(dtype)
    shards = TokenShards(write_set(tmp_path / "set", np.split(stream, np.cumsum(lengths)[:-1]), dtype))
    count = shards.windows(length)
    assert count == sum(1 for start in range(0, len(stream), length) if start + length + 1 <= len(stream))
    for i in range(count):
        window = shards.window(i, length)
        assert window.dtype == dtype and np.array_equal(window, stream[i * length : i * length + length + 1])
    for beyond in (-1, count):
        with pytest.raises(IndexError, match=f"window {beyond} of {length} tokens"):
            shards.window(beyond, length)


# --- damage -------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path):
    """A set of two shards, and the path of the second one."""
    folder = counting(tmp_path, 30, 20).folder
    return folder, folder / "shard-000001.safetensors"


def test_wrong_size_and_missing_shard_are_found_when_opened(damaged):
    folder, path = damaged
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"shard-000001.* has {size - 1} bytes instead of {size}; run"):
        TokenShards(folder)
    path.unlink()
    with pytest.raises(DataError, match=r"shard-000001\.safetensors: No such file.*make_tokens"):
        TokenShards(folder)


def test_shard_of_another_dtype_is_found_when_read(damaged):
    folder, path = damaged
    save_file({"tokens": np.arange(20, dtype=np.int16)}, path)
    with pytest.raises(DataError, match=r"'I16'.* instead of .*'U16'"):
        TokenShards(folder).window(8, 4)


def test_token_outside_of_the_vocabulary_is_reported(tmp_path):
    folder = write_set(tmp_path / "set", [[1, 2, 999, 3]], vocab_size=70)
    with pytest.raises(DataError, match=r"window 0 of 3 tokens holds token 999, but the vocabulary of .* has 70"):
        TokenShards(folder).window(0, 3)


def test_shard_truncated_while_open_is_reported(damaged):
    folder, path = damaged
    shards = TokenShards(folder)
    shards.window(8, 4)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"shard-000001.* was truncated"):
        shards.window(9, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "moa-shards-1"}, "format is 'moa-shards-1', expected 'moa-tokens-1'"),
        ({"tokens": 49}, "tokens is 49, but its shards add up to 50"),
        ({"bytes": "many"}, "bytes is 'many'"),
        ({"dtype": "int16"}, "dtype is 'int16', expected uint16 or uint32"),
        ({"end_of_text": 50000}, "end_of_text is 50000"),
        ({"tokenizer": None}, "tokenizer is None"),
    ],
)
def test_invalid_manifest_field_is_named(tmp_path, fields, message):
    write_set(tmp_path / "set", [np.arange(30), np.arange(20)], **fields)
    with pytest.raises(DataError, match=rf"manifest\.json cannot be read: {message}.*delete .*set"):
        TokenShards(tmp_path / "set")


def test_different_tokenizers_are_refused(tmp_path):
    ours = TokenShards(write_set(tmp_path / "a", [range(9)]))
    ours.require_same_tokenizer(TokenShards(write_set(tmp_path / "b", [range(5)])))
    for fields in ({"tokenizer": {"name": "other", "sha256": "1" * 64}}, {"end_of_text": 7}):
        with pytest.raises(DataError, match="have different tokenizers"):
            ours.require_same_tokenizer(TokenShards(write_set(tmp_path / "c", [range(5)], **fields)))


def test_damaged_set_is_an_error_that_names_it(fuzz, fuzzing, damaged):
    folder, path = damaged

    def attempt(example):
        name, content = example
        with fuzzing.replaced(folder / name, content):
            error = fuzzing.refusal(
                lambda: [shards.window(i, 4) for shards in [TokenShards(folder)] for i in range(12)],
                DataError,
                IndexError,
            )
        assert error is None or str(folder) in str(error), error

    fuzz(fuzzing.damage(folder, ["manifest.json", "manifest.json", path.name]), attempt, examples=40)


# --- order --------------------------------------------------------------------------------------------------------


def order(shards, **options):
    options = {"seed": 3, "global_batch": 6, "micro_batch": 6, "num_steps": 8, **options}
    return firsts(train_loader(shards, config(**options.pop("fields", {})), **options))


def flat(batches):
    return [window for batch in batches for window in batch]


def test_every_epoch_is_another_permutation(tmp_path):
    shards = counting(tmp_path, 50, 31, 19)  # 24 windows of 4: four batches of 6 an epoch
    steps = order(shards)
    one, two = flat(steps[:4]), flat(steps[4:])
    assert sorted(one) == sorted(two) == list(range(24)) and one != two and one != sorted(one)
    assert order(shards) == steps and order(shards, seed=4) != steps
    assert [sorted(set(batch)) == sorted(batch) for batch in order(shards, global_batch=5, micro_batch=5)] == [True] * 8


def test_order_does_not_depend_on_ranks_micro_batches_workers_or_start_step(tmp_path):
    shards = counting(tmp_path, 50, 31, 19)
    steps = order(shards)
    for start in range(9):
        assert order(shards, start_step=start) == steps[start:]
    assert flat(order(shards, micro_batch=2)) == flat(steps)
    assert order(shards, fields={"workers": 2}, start_step=3) == steps[3:]
    ranks = [order(shards, micro_batch=1, world_size=3, rank=rank) for rank in range(3)]
    together = flat(batch for turn in zip(*ranks, strict=True) for batch in turn)
    assert together == flat(steps)


def test_invalid_batch_sizes(tmp_path):
    shards = counting(tmp_path, 101)
    with pytest.raises(ValueError, match="global batch of 6 does not split over 1 ranks into micro-batches of 4"):
        order(shards, micro_batch=4)
    with pytest.raises(ValueError, match=r"101 tokens, 25 windows of data\.sequence_length 4, fewer than .* 26"):
        order(shards, global_batch=26, micro_batch=26)
    with pytest.raises(ValueError, match="seed is -1"):
        order(shards, seed=-1)


def test_validation_covers_the_first_windows_in_order(tmp_path):
    shards = counting(tmp_path, 50, 50)
    assert firsts(val_loader(shards, config(), batch_size=10)) == [[*range(10)], [*range(10, 20)], [*range(20, 24)]]
    loader = val_loader(shards, config(), batch_size=3, limit=7)
    assert firsts(loader) == firsts(loader) == [[0, 1, 2], [3, 4, 5], [6]]
    assert firsts(val_loader(shards, config(), batch_size=9, limit=99)) == firsts(
        val_loader(shards, config(), batch_size=9)
    )
    ranks = [firsts(val_loader(shards, config(), batch_size=2, limit=7, rank=r, world_size=3)) for r in range(3)]
    assert ranks == [[[0, 3], [6]], [[1, 4]], [[2, 5]]]
    assert firsts(val_loader(shards, config(200), batch_size=2), 200) == []
