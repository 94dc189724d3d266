"""from_llama: weights taken over, functions kept, everything else refused with a reason."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from moa_ffn import VARIANTS, FFNSpec
from moa_lm import MoALlamaForCausalLM

SMALL = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TYPE_TWO = [variant for variant in VARIANTS if FFNSpec(variant).type_two]
TYPE_ONE = [variant for variant in VARIANTS if not FFNSpec(variant).type_two]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("way", ["folder", "text", "model"])
def test_swiglu_is_the_same_function(way, tied, llama, tokens, tmp_path):
    theirs = llama(tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    theirs.save_pretrained(tmp_path)
    source = {"folder": tmp_path, "text": str(tmp_path), "model": theirs}[way]
    ours = MoALlamaForCausalLM.from_llama(source)
    assert torch.equal(ours(tokens(2, 9)).logits, theirs(tokens(2, 9)).logits)
    assert not ours.training


def test_a_model_is_copied(llama, tokens):
    theirs = llama()
    before = theirs(tokens(1, 5)).logits
    ours = MoALlamaForCausalLM.from_llama(theirs)
    for parameter in ours.parameters():
        parameter.data.zero_()
    assert torch.equal(theirs(tokens(1, 5)).logits, before)


@pytest.mark.parametrize("variant", TYPE_TWO)
def test_projections_are_kept_and_mixing_starts_by_the_layer_s_rule(variant, llama, tokens, tmp_path):
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
    assert len(ours.state_dict()) - len(kept) == (0 if variant == "swiglu" else 2)
    ours.save_pretrained(tmp_path / "ours")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(loaded(tokens(1, 6)).logits, ours(tokens(1, 6)).logits)


@pytest.mark.parametrize("variant", TYPE_ONE)
def test_type_one_is_refused_with_the_reason(variant, llama):
    with pytest.raises(ValueError, match=f"variant='{variant}' is Type-I.*up_proj would be lost"):
        MoALlamaForCausalLM.from_llama(llama(), variant)


def test_dtype(llama, tmp_path):
    llama().to(torch.bfloat16).save_pretrained(tmp_path)
    assert MoALlamaForCausalLM.from_llama(tmp_path, "qdmoa").dtype == torch.bfloat16
    wide = MoALlamaForCausalLM.from_llama(tmp_path, "qdmoa", dtype=torch.float32, device_map="cpu")
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    assert MoALlamaForCausalLM.from_llama(llama().to(torch.bfloat16)).dtype == torch.bfloat16


def test_generation_settings_and_tokens_are_kept(llama, tmp_path):
    theirs = llama(eos_token_id=7, bos_token_id=5)
    theirs.generation_config.top_k = 11
    theirs.generation_config.do_sample = True
    theirs.save_pretrained(tmp_path)
    for source in (theirs, tmp_path):
        ours = MoALlamaForCausalLM.from_llama(source)
        assert (ours.config.eos_token_id, ours.config.bos_token_id) == (7, 5)
        assert (ours.generation_config.top_k, ours.generation_config.eos_token_id) == (11, 7)


def test_rope_settings_are_kept(llama, tokens, tmp_path):
    theirs = llama(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4})
    theirs.save_pretrained(tmp_path)
    assert torch.equal(MoALlamaForCausalLM.from_llama(tmp_path)(tokens(1, 9)).logits, theirs(tokens(1, 9)).logits)


def test_mistral_without_a_window(tokens, tmp_path):
    torch.manual_seed(0)
    theirs = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None, head_dim=16)).eval()
    theirs.save_pretrained(tmp_path)
    ours = MoALlamaForCausalLM.from_llama(tmp_path)
    assert torch.equal(ours(tokens(2, 9)).logits, theirs(tokens(2, 9)).logits)


@pytest.mark.parametrize("experts", [0, 4])
def test_our_own_swiglu_gives_variants_with_the_same_projections(experts, tiny):
    fields = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    source = tiny(ffn_variant="swiglu", **fields)
    variant = MoALlamaForCausalLM.from_llama(source, "qdmoa")
    assert variant.config.num_experts == experts
    kept = variant.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in source.state_dict().items())


def test_other_architectures_are_refused(tiny):
    small = {**SMALL, "sliding_window": None}
    sources = {
        "model_type='qwen2'": Qwen2ForCausalLM(Qwen2Config(**SMALL)),
        "sliding_window=8": MistralForCausalLM(MistralConfig(**{**small, "sliding_window": 8})),
        "hidden_act='gelu'": MistralForCausalLM(MistralConfig(**small, hidden_act="gelu")),
        "ffn_variant='qdmoa'": tiny(ffn_variant="qdmoa"),
    }
    for reason, source in sources.items():
        with pytest.raises(ValueError, match=f"{reason}.*accepted.*llama; mistral without a sliding window"):
            MoALlamaForCausalLM.from_llama(source)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hidden_size": 64}, "hidden_size=64: the checkpoint decides it"),
        ({"num_experts": 4}, "num_experts=4: the checkpoint decides it"),
        ({"ffn_gates": "tanh"}, "unknown setting 'ffn_gates'; allowed: .*ffn_mixing_gate"),
        ({"ffn_mixing_gate": "loud"}, "ffn_mixing_gate='loud' is not one of"),
        ({"variant": "moe"}, "variant='moe' is not one of"),
    ],
    ids=["shape", "experts", "unknown", "value", "variant"],
)
def test_bad_settings(settings, words, llama):
    with pytest.raises(ValueError, match=words):
        MoALlamaForCausalLM.from_llama(llama(), **settings)


def test_incomplete_and_foreign_checkpoints_are_refused(llama, tmp_path):
    theirs = llama()
    theirs.save_pretrained(tmp_path / "lacks")
    weights = load_file(tmp_path / "lacks" / "model.safetensors")
    gone = "model.layers.1.mlp.up_proj.weight"
    save_file(
        {n: w for n, w in weights.items() if n != gone}, tmp_path / "lacks" / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=f"lacks '{gone}'"):
        MoALlamaForCausalLM.from_llama(tmp_path / "lacks", "qdmoa")
    theirs.save_pretrained(tmp_path / "more")
    extra = {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}
    save_file({**weights, **extra}, tmp_path / "more" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"has 'model\.layers\.0\.self_attn\.q_norm\.weight'"):
        MoALlamaForCausalLM.from_llama(tmp_path / "more")
    LlamaModel(theirs.config).save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match=r"lacks 'lm_head\.weight'"):
        MoALlamaForCausalLM.from_llama(tmp_path / "headless")


def test_damaged_checkpoints_are_refused(llama, tmp_path):
    llama().save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, settings = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="the weights are damaged"):
        MoALlamaForCausalLM.from_llama(tmp_path)
    weights.write_bytes(whole)
    config.write_text(settings.replace('"intermediate_size": 48', '"intermediate_size": 64'))
    with pytest.raises(ValueError, match=r"mlp.*has the shape \(.*48.*config\.json means \(.*64"):
        MoALlamaForCausalLM.from_llama(tmp_path, "qdmoa")
    config.write_text("{")
    with pytest.raises(OSError, match=r"config\.json.*not a valid JSON"):
        MoALlamaForCausalLM.from_llama(tmp_path)
    config.write_text('{"a":' * 100_000)
    with pytest.raises(ValueError, match=r"config\.json: .*recursion"):
        MoALlamaForCausalLM.from_llama(tmp_path)


@pytest.mark.parametrize("parts", [False, True], ids=["one file", "parts"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 2**20}, r"has the shape \(.*32.*config\.json means \(.*1048576"),
        ({"num_hidden_layers": 500, "intermediate_size": 48}, r"lacks 'model\.layers\.2\."),
        ({"dtype": "floaty"}, r"config\.json: .*floaty"),
        ({"rope_parameters": {"rope_type": ["linear"]}}, "rope_parameters"),
    ],
    ids=["width", "layers", "dtype", "rope"],
)
def test_a_config_that_means_another_model(change, message, parts, llama, tmp_path):
    """Refused before a weight takes memory: a model of that width has terabytes."""
    llama().save_pretrained(tmp_path, max_shard_size="10KB" if parts else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == parts
    MoALlamaForCausalLM.from_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        MoALlamaForCausalLM.from_llama(tmp_path)
    assert str(tmp_path) in str(error.value) or "rope_parameters" in change


def test_missing_folder_and_pickled_weights(llama, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        MoALlamaForCausalLM.from_llama(Path(tmp_path / "nowhere"))
    theirs = llama()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        MoALlamaForCausalLM.from_llama(tmp_path)
