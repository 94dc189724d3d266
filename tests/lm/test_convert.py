"""from_llama: weights and functions are kept, other sources are refused with a reason."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from moa_ffn import VARIANTS, FFNSpec
from moa_lm import MoALlamaForCausalLM
from moa_lm.convert import require_shapes
from moa_train.errors import ConfigError, DataError

SMALL = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TYPE_TWO = [variant for variant in VARIANTS if FFNSpec(variant).type_two]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("way", ["folder", "text", "model"])
def test_swiglu_is_the_same_function(way, tied, llama, tokens, tmp_path):
    theirs = llama(tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    theirs.save_pretrained(tmp_path)
    source = {"folder": tmp_path, "text": str(tmp_path), "model": theirs}[way]
    ours = MoALlamaForCausalLM.from_llama(source)
    assert torch.equal(ours(tokens(2, 9)).logits, theirs(tokens(2, 9)).logits)
    assert not ours.training


def test_source_model_is_copied(llama, tokens):
    theirs = llama()
    before = theirs(tokens(1, 5)).logits
    ours = MoALlamaForCausalLM.from_llama(theirs)
    for parameter in ours.parameters():
        parameter.data.zero_()
    assert torch.equal(theirs(tokens(1, 5)).logits, before)


@pytest.mark.parametrize("variant", TYPE_TWO)
def test_projections_are_kept_and_mixing_is_initialized(variant, llama, tokens, tmp_path):
    theirs = llama()
    theirs.save_pretrained(tmp_path / "llama")
    settings = {
        "ffn_mix_init_std": 3.0,
        "ffn_coef_init": 0.7,
        "ffn_mixing_gate": "tanh",
        "ffn_up_activations": "id,l",
    }
    torch.manual_seed(0)
    ours = MoALlamaForCausalLM.from_llama(tmp_path / "llama", variant, **settings)
    assert ours.config.ffn_variant == variant and ours.config.ffn_up_activations == ["identity", "leaky_relu"]
    kept = theirs.state_dict()
    for name, value in ours.state_dict().items():
        if "mix_coef" in name:
            assert (value == 0.7).all()
        elif "mix_proj" in name:
            assert value.std().item() == pytest.approx(3.0, rel=0.3)
        else:
            assert torch.equal(value, kept[name])
    assert len(ours.state_dict()) - len(kept) == (2 if FFNSpec(variant).num_coefficients else 0)
    ours.save_pretrained(tmp_path / "ours")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(loaded(tokens(1, 6)).logits, ours(tokens(1, 6)).logits)


@pytest.mark.parametrize("variant", [variant for variant in TYPE_TWO if FFNSpec(variant).num_coefficients])
def test_anchored_conversion_keeps_the_function(variant, llama, tokens, tmp_path):
    theirs = llama()
    ours = MoALlamaForCausalLM.from_llama(theirs, variant, ffn_mix_base="anchor", ffn_mixing_gate="softmax")
    torch.testing.assert_close(ours(tokens(2, 9)).logits, theirs(tokens(2, 9)).logits)
    ours.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(tokens(2, 9)).logits, theirs(tokens(2, 9)).logits)
    loaded.train()(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
    mixing = [p for name, p in loaded.named_parameters() if "mix_" in name]
    assert mixing and all(p.grad.ne(0).any() for p in mixing)


def test_type_one_is_refused(llama):
    with pytest.raises(ConfigError, match="variant is 'moa', a Type-I FFN without the up branch"):
        MoALlamaForCausalLM.from_llama(llama(), "moa")


def test_dtype(llama, tmp_path):
    llama().to(torch.bfloat16).save_pretrained(tmp_path)
    assert MoALlamaForCausalLM.from_llama(tmp_path, "qdmoa").dtype == torch.bfloat16
    wide = MoALlamaForCausalLM.from_llama(tmp_path, "qdmoa", dtype=torch.float32, device_map="cpu")
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    assert MoALlamaForCausalLM.from_llama(llama().to(torch.bfloat16)).dtype == torch.bfloat16


def test_generation_config_is_kept(llama, tmp_path):
    theirs = llama(eos_token_id=7, bos_token_id=5)
    theirs.generation_config.top_k = 11
    theirs.generation_config.do_sample = True
    theirs.save_pretrained(tmp_path)
    for source in (theirs, tmp_path):
        ours = MoALlamaForCausalLM.from_llama(source)
        assert (ours.config.eos_token_id, ours.config.bos_token_id) == (7, 5)
        assert (ours.generation_config.top_k, ours.generation_config.eos_token_id) == (11, 7)


def test_mistral_without_a_window(tokens, tmp_path):
    torch.manual_seed(0)
    theirs = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None, head_dim=16)).eval()
    theirs.save_pretrained(tmp_path)
    ours = MoALlamaForCausalLM.from_llama(tmp_path)
    assert torch.equal(ours(tokens(2, 9)).logits, theirs(tokens(2, 9)).logits)


@pytest.mark.parametrize("experts", [0, 4])
def test_swiglu_moa_llama_converts_to_variants(experts, tiny):
    fields = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    source = tiny(ffn_variant="swiglu", **fields)
    variant = MoALlamaForCausalLM.from_llama(source, "qdmoa")
    assert variant.config.num_experts == experts
    kept = variant.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in source.state_dict().items())


def test_other_architectures_are_refused(tiny):
    small = {**SMALL, "sliding_window": None}
    sources = {
        "model_type is 'qwen2'": Qwen2ForCausalLM(Qwen2Config(**SMALL)),
        "sliding_window is 8": MistralForCausalLM(MistralConfig(**{**small, "sliding_window": 8})),
        "hidden_act is 'gelu'": MistralForCausalLM(MistralConfig(**small, hidden_act="gelu")),
        "ffn_variant is 'qdmoa'": tiny(ffn_variant="qdmoa"),
    }
    for reason, source in sources.items():
        with pytest.raises(ConfigError, match=f"{reason}: .*accepted.*llama; mistral without a sliding window"):
            MoALlamaForCausalLM.from_llama(source)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 64}, "hidden_size is 64, but the checkpoint decides it"),
        ({"num_experts": 4}, "num_experts is 4, but the checkpoint decides it"),
        ({"ffn_gates": "tanh"}, "unknown setting 'ffn_gates'; allowed: .*ffn_mixing_gate"),
        ({"ffn_mixing_gate": "loud"}, "ffn_mixing_gate.*'loud'"),
    ],
)
def test_invalid_settings(settings, message, llama):
    with pytest.raises(ConfigError, match=message):
        MoALlamaForCausalLM.from_llama(llama(), **settings)


def without_second_up_proj(weights):
    return {name: weight for name, weight in weights.items() if name != "model.layers.1.mlp.up_proj.weight"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_second_up_proj, r"lacks 'model\.layers\.1\.mlp\.up_proj\.weight'"),
        (lambda weights: weights | {"model.q_norm.weight": torch.ones(8)}, r"has 'model\.q_norm\.weight'"),
        (lambda weights: weights | {"model.norm.weight": torch.ones(8)}, r"'model\.norm\.weight' has the shape \(8,\)"),
    ],
    ids=["missing", "unknown", "mismatched"],
)
def test_wrong_weights_are_named(change, message, llama, tmp_path):
    llama().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
    with pytest.raises(DataError, match=rf"{tmp_path}:? {message}"):
        MoALlamaForCausalLM.from_llama(tmp_path, "qdmoa")


def test_damaged_files_are_named(llama, tmp_path):
    llama().save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=f"{tmp_path}: the weights are damaged"):
        MoALlamaForCausalLM.from_llama(tmp_path)
    weights.write_bytes(whole)
    config.write_text("{")
    with pytest.raises(DataError, match=rf"{tmp_path}: cannot read config\.json"):
        MoALlamaForCausalLM.from_llama(tmp_path)


@pytest.mark.parametrize("size", ["10KB", "1GB"], ids=["several files", "one file"])
def test_require_shapes(size, llama, tmp_path):
    theirs = llama()
    theirs.save_pretrained(tmp_path, max_shard_size=size)
    require_shapes(LlamaForCausalLM, tmp_path, theirs.config)
    theirs.config.intermediate_size = 2**40  # nothing of this size is allocated
    with pytest.raises(DataError, match=r"has the shape \(.*48.*config\.json means \(.*1099511627776"):
        require_shapes(LlamaForCausalLM, tmp_path, theirs.config)


def test_missing_folder_and_pickled_weights(llama, tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        MoALlamaForCausalLM.from_llama(tmp_path / "nowhere")
    llama().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        MoALlamaForCausalLM.from_llama(tmp_path)


@pytest.mark.filterwarnings("default")  # of odd dtypes
def test_damaged_weights(fuzz, fuzzing, tiny, tmp_path):
    tiny(ffn_variant="swiglu", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8).save_pretrained(tmp_path)

    def attempt(example):
        name, content = example
        with fuzzing.replaced(tmp_path / name, content):
            error = fuzzing.refusal(lambda: MoALlamaForCausalLM.from_llama(tmp_path, "qdmoa"), DataError)
        assert error is None or str(tmp_path) in str(error), error

    fuzz(fuzzing.damage(tmp_path, ["model.safetensors"]), attempt, examples=20)
