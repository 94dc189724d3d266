"""Packed token trees give the scores of plain forward passes, text by text, for models made here from configs."""

import random

import numpy as np
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
REFUSED = {
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**COMMON, **HEAD}, "softcap"),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**COMMON, **HEAD, **EXPERTS}, "s_aux"),
    "bloom": ("BloomForCausalLM", "BloomConfig", BLOOM, "position_ids"),
    "mamba": ("MambaForCausalLM", "MambaConfig", MAMBA, "position_ids"),
    "bert": ("BertLMHeadModel", "BertConfig", SAME, "later tokens"),
    "llama4_chunks": ("Llama4ForCausalLM", "Llama4TextConfig", {**COMMON, **CHUNKS}, "other scores"),
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
def plainly(model, request, max_length):
    """Score and greediness of one request by the model's stock forward pass and torch's log_softmax."""
    sequence = torch.tensor([*request.context, *request.continuation][-(max_length + 1) :])
    logits = model(input_ids=sequence[None, :-1]).logits[0].float()
    count = len(request.continuation)
    rows, target = torch.log_softmax(logits[-count:], -1), sequence[-count:]
    return rows.gather(1, target[:, None]).sum().item(), bool((rows.argmax(-1) == target).all())


def scores(scorer, requests):
    results = {result.request: result[1:] for result in scorer.stream(requests)}
    assert sorted(results) == list(range(len(requests)))
    return [results[index] for index in range(len(requests))]


def assert_as_plain(model, scorer, requests, max_length=LONGEST):
    for ours, request in zip(scores(scorer, requests), requests, strict=True):
        log_probability, greedy = plainly(model, request, max_length)
        assert ours[0] == pytest.approx(log_probability, abs=1e-4)
        assert ours[1] == greedy


def mixed_requests(seed, count=60, vocabulary=VOCABULARY):
    """Questions with answers that begin alike, two beginnings with one ending, duplicates, single tokens, singles."""
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
def test_scores_of_plain_forward_passes(name):
    model = build(*EXACT[name])
    scorer = scorer_of(model)
    assert scorer.refusal(LONGEST) is None
    assert_as_plain(model, scorer, mixed_requests(1))


@pytest.mark.parametrize("experts", [{}, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}])
def test_our_models(experts):
    torch.manual_seed(0)
    model = MoALlamaForCausalLM(MoALlamaConfig(**COMMON, ffn_variant="qdmoa", **experts)).eval()
    scorer = scorer_of(model)
    assert scorer.refusal(LONGEST) is None
    assert_as_plain(model, scorer, mixed_requests(2))


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_trees_are_not_exact_for(name):
    *what, reason = REFUSED[name]
    assert reason in (scorer_of(build(*what)).refusal(10) or "")


@pytest.mark.filterwarnings("ignore")  # of the peft library
def test_adapters():
    """LoRA changes weights only; virtual tokens change what attention sees."""
    lora = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(build(*EXACT["llama"]), lora).eval()
    scorer = scorer_of(model)
    assert scorer.refusal(LONGEST) is None
    assert_as_plain(model, scorer, mixed_requests(8, 20))
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    assert "one row" in (scorer_of(peft.get_peft_model(build(*EXACT["llama"]), prompt)).refusal(10) or "")


def test_a_layer_that_mixes_positions_is_found():
    model = build(*EXACT["llama"])
    mlp = model.model.layers[0].mlp
    mlp.register_forward_hook(lambda module, inputs, output: output.cumsum(1))
    assert "other scores" in (scorer_of(model).refusal(10) or "")


def test_a_window_that_attention_is_not_told_of(llama):
    llama.config.sliding_window = 32  # as if masks alone applied it
    try:
        scorer = scorer_of(llama)
        assert scorer.refusal(32) is None
        assert "window of 32" in (scorer.refusal(33) or "")
    finally:
        del llama.config.sliding_window


def test_rotary_scaling_that_depends_on_the_batch():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 48}
    scorer = scorer_of(build("LlamaForCausalLM", "LlamaConfig", {**COMMON, "rope_parameters": rope}))
    assert scorer.refusal(48) is None
    assert "longest text beyond 48" in (scorer.refusal(49) or "")


TOKENS = st.lists(st.integers(3, 5), min_size=1, max_size=12)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(st.builds(Request, TOKENS, st.lists(st.integers(3, 5), min_size=1, max_size=6)), min_size=1, max_size=8),
    st.integers(6, 20),
    st.sampled_from([1, 2, 5, "auto"]),
)
def test_any_requests(llama, requests, max_length, batch_size):
    """Three tokens only, so that nearly everything is shared; contexts longer than the model reads."""
    requests = [prefix_tree.truncated(request, max_length) for request in requests]
    assert_as_plain(llama, scorer_of(llama, max_length, batch_size=batch_size), requests, max_length)


def test_scores_do_not_depend_on_batch_order_or_limit(llama):
    requests = mixed_requests(3)
    expected = scores(scorer_of(llama), requests)
    order = list(range(len(requests)))
    random.Random(0).shuffle(order)
    for batch_size in (1, 2, 7, 64, "auto"):
        shuffled = scores(scorer_of(llama, batch_size=batch_size), [requests[index] for index in order])
        few = scores(scorer_of(llama, batch_size=batch_size), requests[:5])
        for got, index in zip([*shuffled, *few], [*order, *range(5)], strict=True):
            assert got[0] == pytest.approx(expected[index][0], abs=1e-4)
            assert got[1] == expected[index][1]


def computed(model, scorer, requests):
    """Positions that pass through the model's layers and rows that pass through its head."""
    counts = {"positions": 0, "rows": 0, "calls": 0}

    def layer(module, inputs, output):
        assert inputs[0].shape[0] == 1
        counts["positions"] += inputs[0].shape[1]
        counts["calls"] += 1

    def head(module, inputs, output):
        counts["rows"] += inputs[0].shape[1]

    handles = [model.model.layers[0].mlp.register_forward_hook(layer), model.lm_head.register_forward_hook(head)]
    try:
        scores(scorer, requests)
    finally:
        for handle in handles:
            handle.remove()
    return counts


def test_one_question_computes_each_distinct_prefix_once(llama):
    context = list(range(3, 23))
    answers = [[30, 31, 32], [30, 31, 33, 34], [30], [35], [30, 31, 32], [36, 37]]
    requests = [Request(context, answer) for answer in answers]
    read = [tuple(context + answer[:-1]) for answer in answers]
    prefixes = {text[:length] for text in read for length in range(1, len(text) + 1)}
    scored = {text[:length] for text in read for length in range(len(context), len(text) + 1)}
    counts = computed(llama, scorer_of(llama), requests)
    assert counts == {"positions": len(prefixes), "rows": len(scored), "calls": 1}


def test_the_two_sentences_of_a_schema_share_their_beginning(llama):
    begun, ending = list(range(3, 20)), [40, 41, 42, 43]
    requests = [Request([*begun, option], ending) for option in (50, 51)]
    assert computed(llama, scorer_of(llama), requests)["positions"] == len(begun) + 2 * len(ending)


def test_batches_keep_their_bounds(llama):
    requests = mixed_requests(4)
    scorer = scorer_of(llama, batch_size=3)
    longest = max(len(request.context) + len(request.continuation) - 1 for request in requests)
    segments = prefix_tree.plan(requests, 48.0, 3 * longest)
    assert sorted(index for segment in segments for index in segment.requests) == list(range(len(requests)))
    for chosen in prefix_tree.batches(segments, 3 * longest, 40):
        assert len(chosen) == 1 or sum(map(len, chosen)) <= 3 * longest
        assert len(chosen) == 1 or sum(segment.logit_rows for segment in chosen) <= 40
    assert computed(llama, scorer, requests)["positions"] == sum(map(len, segments))


def test_a_tree_holds_the_text_of_every_request():
    requests = mixed_requests(5)
    for segment in prefix_tree.plan(requests, 1000.0, 500):
        index = np.arange(len(segment))
        for request, rows, target in zip(segment.requests, segment.rows, segment.targets, strict=True):
            ancestors = (index <= rows[-1]) & (rows[-1] < segment.end)
            text = [*requests[request].context, *requests[request].continuation]
            assert segment.tokens[ancestors].tolist() == text[:-1]
            assert segment.depth[ancestors].tolist() == list(range(len(text) - 1))
            assert target.tolist() == list(requests[request].continuation)


def test_too_little_memory_halves_the_batch(llama, monkeypatch):
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
    assert [score for score, _ in scores(scorer, requests)] == pytest.approx([s for s, _ in expected], abs=1e-4)
    assert max(sizes) > 2


def test_attention_is_given_back(llama, monkeypatch):
    before = llama.config._attn_implementation
    scores(scorer_of(llama), mixed_requests(7, 5))
    assert llama.config._attn_implementation == before != IMPLEMENTATION
    monkeypatch.setattr(llama.model.norm, "forward", lambda states: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scores(scorer_of(llama), mixed_requests(7, 5))
    assert llama.config._attn_implementation == before


def test_half_precision_keeps_its_softmax_in_float32():
    model = build(*EXACT["llama"]).bfloat16()
    request = Request([5, 6, 7], [8])
    logits = model(torch.tensor([[5, 6, 7]]), logits_to_keep=1).logits[0, 0]
    expected = torch.log_softmax(logits.double(), -1)[8].item()
    assert scores(scorer_of(model), [request])[0][0] == pytest.approx(expected, abs=1e-4)


def test_no_requests(llama):
    assert list(scorer_of(llama).stream([])) == []
