import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa_eval.training.configuration import WIDENED, config_difference, role
from moa_lm.sizes import SIZES
from moa_train.config import RESUME_MUTABLE_KEYS

scalars = st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from([0.5, 1.0, "x", "absent"])
values = st.recursive(
    scalars | st.lists(scalars, max_size=2),
    lambda children: st.dictionaries(st.sampled_from("abc"), children, max_size=3),
    max_leaves=8,
)
configs = st.dictionaries(st.sampled_from("abc"), values, max_size=3)


def leaves(tree, path=()):
    if isinstance(tree, dict):
        return {leaf: value for key, own in tree.items() for leaf, value in leaves(own, (*path, key)).items()}
    return {".".join(path): tree}


@given(st.lists(configs, min_size=1, max_size=3))
def test_config_difference_is_every_leaf_that_is_not_equal_everywhere(trees):
    flat = [leaves(tree) for tree in trees]
    expected = {}
    for key in {key for own in flat for key in own}:
        if len({(key in own, repr(own.get(key))) for own in flat}) > 1:
            expected[key] = [repr(own.get(key, "absent")) for own in flat]
    found = config_difference(trees)
    assert {key: [repr(value) for value in own] for key, own in found.items()} == expected


@pytest.mark.parametrize(
    ("key", "pair", "expected"),
    [
        ("name", ["a", "b"], "identity"),
        ("start_from", ["runs/b/checkpoints/step_1", "runs/a/checkpoints/step_1"], "identity"),
        ("start_from", [None, "runs/a/checkpoints/step_1"], "setting"),
        ("optim.lr", [1e-3, 2e-3], "peak rate"),
        ("model.encoder", ["vit_base_patch16_swiglu", "vit_base_patch16_moa"], "FFN"),
        ("model.encoder", ["vit_base_patch16_swiglu", "vit_tiny_patch16_swiglu"], "size"),
        ("model.encoder", ["vit_base_patch16_swiglu", "vit_base_patch8_swiglu"], "must match"),
        ("model.encoder_args.mlp_ratio", [4.0, 5.0], "FFN"),
        ("model.encoder_args.patch_size", [4, 8], "must match"),
        ("model.ffn", ["swiglu", "qdmoa"], "FFN"),
        ("model.size", ["dense-0.12b", "dense-0.5b"], "size"),
        ("model.size", ["dense-0.12b", "llama-large"], "FFN"),
        ("model.args.intermediate_size", [64, 96], "FFN"),
        ("model.args.num_hidden_layers", [2, 4], "size"),
        ("data.train", ["a", "b"], "must match"),
        ("data.workers", [0, 4], "bookkeeping"),
        ("schedule.tokens_per_parameter", [20, 100], "must match"),
    ],
)
def test_role_of_a_differing_key(key, pair, expected):
    assert role(key, pair) == expected


@pytest.mark.parametrize("key", sorted(RESUME_MUTABLE_KEYS))
def test_keys_that_may_change_on_resume_do_not_split_a_method(key):
    assert role(key, [1, 2]) in ("identity", "bookkeeping")


@pytest.mark.parametrize("widened", sorted(WIDENED))
def test_a_widened_size_differs_from_its_twin_in_the_ffn_only(widened):
    wide, plain = SIZES[widened], SIZES[WIDENED[widened]]
    for field in ("layers", "width", "heads", "experts", "active_experts", "tied"):
        assert getattr(wide, field) == getattr(plain, field), field
