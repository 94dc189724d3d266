"""Scores of packed token trees against the plain forward passes of transformers' models."""

import random

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_eval.harness import prefix_tree
from moa_eval.harness.prefix_tree import Request
from moa_eval.harness.scoring import PrefixTreeScorer
from moa_eval.harness.tree_attention import IMPLEMENTATION
from moa_lm import MoALlamaConfig, MoALlamaForCausalLM

CPU = torch.device("cpu")
VOCABULARY, LONGEST = 61, 96
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LONGEST,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # untrained, but every layer matters
}
HEAD = {"head_dim": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SAME = {**COMMON, "num_key_value_heads": 4}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LONGEST, **IDS}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2}
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, **IDS}
BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, **IDS}
XGLM = {"vocab_size": VOCABULARY, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, **IDS}
CHUNKS = {**HEAD, "attention_chunk_size": 8, "intermediate_size_mlp": 48, "num_local_experts": 2}

EXACT = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", COMMON),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "opt": ("OPTForCausalLM", "OPTConfig", {**COMMON, **OPT}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SAME),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**COMMON, **EXPERTS}),
    "mistral_window": ("MistralForCausalLM", "MistralConfig", {**COMMON, "sliding_window": 8}),
    "gemma3_windows": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**COMMON, **HEAD, "sliding_window": 8}),
}
UNSUPPORTED = {
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**COMMON, **HEAD}, "softcap"),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**COMMON, **HEAD, **EXPERTS}, "s_aux"),
    "bloom": ("BloomForCausalLM", "BloomConfig", BLOOM, "position_ids"),
    "mamba": ("MambaForCausalLM", "MambaConfig", MAMBA, "position_ids"),
    "bert": ("BertLMHeadModel", "BertConfig", SAME, "reads later tokens"),
    "xglm": ("XGLMForCausalLM", "XGLMConfig", XGLM, "attention interface"),
    "llama4_chunks": ("Llama4ForCausalLM", "Llama4TextConfig", {**COMMON, **CHUNKS}, "different scores"),
}


def build(model_class, config_class, arguments):
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**arguments)
    return getattr(transformers, model_class)(config).eval()


def scorer_of(model, max_length=LONGEST, **arguments):
    return PrefixTreeScorer(model, device=CPU, max_length=max_length, **arguments)


@pytest.fixture(scope="module")
def llama():
    return build(*EXACT["llama"])


@torch.inference_mode()
def plain_score(model, request, max_length):
    """Score and greediness of one request by the model's own forward pass and torch's log_softmax."""
    sequence = torch.tensor([*request.context, *request.continuation][-(max_length + 1) :])
    logits = model(input_ids=sequence[None, :-1]).logits[0].float()
    count = len(request.continuation)
    rows, target = torch.log_softmax(logits[-count:], -1), sequence[-count:]
    return rows.gather(1, target[:, None]).sum().item(), bool((rows.argmax(-1) == target).all())


def scores(scorer, requests):
    results = {result.request: result[1:] for result in scorer.stream(requests)}
    assert sorted(results) == list(range(len(requests)))
    return [results[index] for index in range(len(requests))]


def assert_same(found, expected):
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def assert_plain_scores(model, scorer, requests, max_length=LONGEST):
    assert scorer.unsupported_reason(max_length) is None
    assert_same(scores(scorer, requests), [plain_score(model, request, max_length) for request in requests])


def mixed_requests(seed, count=60, vocabulary=VOCABULARY):
    """Answers that begin alike, two contexts with one continuation, duplicates, and single tokens, shuffled."""
    generator = random.Random(seed)

    def tokens(low, high):
        return [generator.randrange(3, vocabulary) for _ in range(generator.randint(low, high))]

    requests = []
    while len(requests) < count:
        context, begun = tokens(1, 30), tokens(1, 3)
        requests += [Request(context, begun + tokens(1, 8)) for _ in range(3)]
        requests += [Request(context, tokens(1, 1)), requests[-1]]
        ending = tokens(1, 9)
        requests += [Request(context + tokens(1, 2), ending) for _ in range(2)]
    generator.shuffle(requests)
    return requests


@pytest.mark.parametrize("name", EXACT)
def test_scores_match_plain_forward_passes(name):
    model = build(*EXACT[name])
    assert_plain_scores(model, scorer_of(model), mixed_requests(1))


@pytest.mark.parametrize("experts", [{}, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}])
def test_scores_of_moa_llama(experts):
    torch.manual_seed(0)
    model = MoALlamaForCausalLM(MoALlamaConfig(**COMMON, ffn_variant="qdmoa", **experts)).eval()
    assert_plain_scores(model, scorer_of(model), mixed_requests(2))


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_models_are_detected(name):
    *what, reason = UNSUPPORTED[name]
    assert reason in (scorer_of(build(*what)).unsupported_reason(10) or "")


@pytest.mark.filterwarnings("ignore")  # of the peft library
def test_lora_is_supported_and_prompt_tuning_is_not():
    lora = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(build(*EXACT["llama"]), lora).eval()
    assert_plain_scores(model, scorer_of(model), mixed_requests(8, 20))
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    reason = scorer_of(peft.get_peft_model(build(*EXACT["llama"]), prompt)).unsupported_reason(10)
    assert "one row" in (reason or "")


def test_layers_that_mix_positions_are_detected():
    model = build(*EXACT["llama"])
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: output.cumsum(1))
    assert "different scores" in (scorer_of(model).unsupported_reason(10) or "")


def test_unused_window_limits_the_length():
    model = build(*EXACT["llama"])
    model.config.sliding_window = 32  # as if only masks applied it
    scorer = scorer_of(model)
    assert scorer.unsupported_reason(32) is None
    assert "window of 32" in (scorer.unsupported_reason(33) or "")


def test_dynamic_rotary_scaling_limits_the_length():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 48}
    scorer = scorer_of(build("LlamaForCausalLM", "LlamaConfig", {**COMMON, "rope_parameters": rope}))
    assert scorer.unsupported_reason(48) is None
    assert "beyond 48 tokens" in (scorer.unsupported_reason(49) or "")


TOKENS = st.lists(st.integers(3, 5), min_size=1, max_size=12)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(st.builds(Request, TOKENS, st.lists(st.integers(3, 5), min_size=1, max_size=6)), min_size=1, max_size=8),
    st.integers(6, 20),
    st.sampled_from([1, 2, 5, 64, "auto"]),
)
def test_arbitrary_truncated_requests(llama, requests, max_length, batch_size):
    """With three different tokens, nearly all requests share prefixes."""
    requests = [prefix_tree.truncated(request, max_length) for request in requests]
    assert_plain_scores(llama, scorer_of(llama, max_length, batch_size=batch_size), requests, max_length)


def count_positions(model, scorer, requests):
    """Positions that pass the model's layers, rows that pass its head, and forward passes."""
    counts = {"positions": 0, "rows": 0, "calls": 0}

    def layer(module, inputs, output):
        assert inputs[0].shape[0] == 1
        counts["positions"] += inputs[0].shape[1]
        counts["calls"] += 1

    def head(module, inputs, output):
        counts["rows"] += inputs[0].shape[1]

    handles = [model.model.layers[0].mlp.register_forward_hook(layer), model.lm_head.register_forward_hook(head)]
    scores(scorer, requests)
    for handle in handles:
        handle.remove()
    return counts


def test_each_distinct_prefix_is_computed_once(llama):
    begun = list(range(3, 20))
    contexts = [[*begun, 50], [*begun, 51]]  # as in WinoGrande
    answers = [[30, 31, 32], [30, 31, 33, 34], [30], [35], [30, 31, 32], [36, 37]]
    requests = [Request(context, answer) for context in contexts for answer in answers]
    read = [(*context, *answer[:-1]) for context, answer in requests]
    prefixes = {text[:length] for text in read for length in range(1, len(text) + 1)}
    scored = {prefix for prefix in prefixes if len(prefix) > len(begun)}
    counts = count_positions(llama, scorer_of(llama), requests)
    assert counts == {"positions": len(prefixes), "rows": len(scored), "calls": 1}


def test_batches_respect_their_limits():
    requests = mixed_requests(4)
    segments = prefix_tree.plan(requests, 48.0, 100)
    assert sorted(index for segment in segments for index in segment.requests) == list(range(len(requests)))
    groups = list(prefix_tree.batches(segments, 100, 40))
    assert [segment for group in groups for segment in group] == segments
    for group in groups:
        assert len(group) == 1 or sum(map(len, group)) <= 100
        assert len(group) == 1 or sum(segment.logit_rows for segment in group) <= 40


def test_batch_is_halved_when_memory_is_insufficient(llama, monkeypatch):
    requests = mixed_requests(6)
    expected = scores(scorer_of(llama), requests)
    scorer = scorer_of(llama)
    forward, sizes = scorer._forward, []

    def limited(packing):
        sizes.append(packing.shape[0])
        if packing.shape[0] > 2:
            raise torch.OutOfMemoryError
        return forward(packing)

    monkeypatch.setattr(scorer, "_forward", limited)
    assert_same(scores(scorer, requests), expected)
    assert max(sizes) > 2


def test_attention_of_the_model_is_restored(llama, monkeypatch):
    before = llama.config._attn_implementation
    scores(scorer_of(llama), mixed_requests(7, 5))
    assert llama.config._attn_implementation == before != IMPLEMENTATION
    monkeypatch.setattr(llama.model.norm, "forward", lambda states: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scores(scorer_of(llama), mixed_requests(7, 5))
    assert llama.config._attn_implementation == before


def test_log_softmax_of_a_bfloat16_model_is_float32():
    model = build(*EXACT["llama"]).bfloat16()
    logits = model(torch.tensor([[5, 6, 7]]), logits_to_keep=1).logits[0, 0]
    expected = torch.log_softmax(logits.double(), -1)[8].item()
    assert scores(scorer_of(model), [Request([5, 6, 7], [8])])[0][0] == pytest.approx(expected, abs=1e-4)
