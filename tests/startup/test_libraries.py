"""The hook with the libraries themselves: each name works in a process that imports nothing of ours."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moa_lm import MoALlamaConfig, MoALlamaForCausalLM

WORDS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz .:?"]
TASK = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint folder: config, weights and a tokenizer that reads letters. Two layers, 32 wide."""
    folder = tmp_path_factory.mktemp("checkpoint")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MoALlamaConfig(vocab_size=len(WORDS), max_position_embeddings=64, bos_token_id=1, eos_token_id=2, **sizes)
    torch.manual_seed(0)
    MoALlamaForCausalLM(config).save_pretrained(folder)
    letters = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=letters, **special).save_pretrained(folder)
    return folder


@pytest.fixture
def letters_task(tmp_path):
    """A folder for lm-eval's `--include_path` with a task of three multiple-choice questions."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": q, "choices": ["a b", "c", "d e f"], "label": i} for i, q in enumerate(["x:", "y z:", "w?"])]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "letters.yaml").write_text(TASK.replace("DATA", str(folder / "data.jsonl")))
    return folder


def test_timm_has_our_names(python):
    code = """
import sys, timm
names = timm.list_models("*qdmoa*")
model = timm.create_model("vit_tiny_patch16_qdmoa", num_classes=3, depth=1)
print(len(names), "vit_base_patch16_qdmoa" in names, type(model.blocks[0].mlp).__mro__[1].__module__)
print([name for name in ("transformers", "lm_eval", "moa_lm", "moa_vision.pretrain") if name in sys.modules])
"""
    assert python("-W", "error", "-c", code).stdout == "4 True moa_ffn.layers\n[]\n"


@pytest.mark.slow
def test_lm_eval_has_our_name_and_loads_it_late(python):
    code = """
import sys, lm_eval.models
from lm_eval.api.registry import get_model, model_registry
loaded = [name for name in ("torch", "transformers", "moa_eval", "moa_lm") if name in sys.modules]
print(loaded, "moa" in model_registry, "hf" in model_registry, model_registry.origin("moa"))
model = get_model("moa")
print(model.__module__, model.__name__, model is sys.modules["moa_eval.harness"].MoALM)
"""
    process = python("-c", code)
    assert process.stdout == "[] True True None\nmoa_eval.harness.model MoALM True\n"


def test_transformers_reads_our_checkpoints(python, checkpoint):
    code = f"""
import sys, json, transformers, torch
config = transformers.AutoConfig.from_pretrained({str(checkpoint)!r})
model = transformers.AutoModelForCausalLM.from_pretrained({str(checkpoint)!r})
body = transformers.AutoModel.from_pretrained({str(checkpoint)!r})
tokenizer = transformers.AutoTokenizer.from_pretrained({str(checkpoint)!r})
ids = torch.tensor([tokenizer("hello.", add_special_tokens=False).input_ids])
write = transformers.pipeline("text-generation", {str(checkpoint)!r}, max_new_tokens=3, do_sample=False)
print(json.dumps({{
    "classes": [type(x).__name__ for x in (config, model, body)],
    "ids": ids.tolist(), "logits": model(ids).logits.tolist(),
    "written": write("hello.", return_full_text=False)[0]["generated_text"],
    "models": [name for name in sys.modules if name.startswith("moa_")],
}}))
"""
    process = python("-c", code)
    found = json.loads(process.stdout.splitlines()[-1])
    assert found["classes"] == ["MoALlamaConfig", "MoALlamaForCausalLM", "MoALlamaModel"]
    assert found["ids"] == [[WORDS.index(letter) for letter in "hello."]]
    with torch.no_grad():
        logits = MoALlamaForCausalLM.from_pretrained(checkpoint)(torch.tensor(found["ids"])).logits
    torch.testing.assert_close(torch.tensor(found["logits"]), logits)
    assert set(found["written"]) <= set("".join(WORDS[3:])) | set("<unk></s> ")
    assert "moa_vision" not in found["models"] and "is not supported" not in process.stderr


@pytest.mark.slow
def test_transformers_without_our_models_loads_none_of_ours(python, tmp_path):
    """Other model types, registering one, listing all types and a tokenizer's look-up in all of them."""
    code = """
import sys, transformers
from transformers.models.auto import configuration_auto as auto
assert "moa_llama" in auto.CONFIG_MAPPING and "moa_llama" in auto.CONFIG_MAPPING.keys()
assert type(transformers.AutoConfig.for_model("bert")).__name__ == "BertConfig"

class OtherConfig(transformers.PreTrainedConfig):
    model_type = "other"

transformers.AutoConfig.register("other", OtherConfig)
assert auto.CONFIG_MAPPING["other"] is OtherConfig
assert auto.config_class_to_model_type("BertConfig") == "bert"
assert not {"moa_lm", "moa_ffn", "transformers.modeling_utils"} & set(sys.modules)
assert auto.config_class_to_model_type("MoALlamaConfig") == "moa_llama"
assert dict(auto.CONFIG_MAPPING._extra_content) == {
    "other": OtherConfig, "moa_llama": sys.modules["moa_lm"].MoALlamaConfig
}
print("fine")
"""
    process = python("-W", "error::RuntimeWarning", "-c", code)
    assert process.stdout == "fine\n", process.stderr


COMMANDS = {
    "lm_eval": [Path(sys.executable).parent / "lm_eval"],
    "accelerate": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "lm_eval"],
}


@pytest.mark.parametrize("command", ["lm_eval", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_the_literal_command_line_evaluates(python, checkpoint, letters_task, tmp_path, command):
    """`lm_eval --model moa`, as users type it, gives each choice its log-likelihood."""
    arguments = ["--model", "moa", "--model_args", f"pretrained={checkpoint},dtype=float32", "--tasks", "letters"]
    arguments += ["--device", "cpu", "--batch_size", "2", "--include_path", letters_task, "--log_samples"]
    python(*COMMANDS[command], *arguments, "--output_path", tmp_path / "out")
    (samples,) = (tmp_path / "out").rglob("samples_letters_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    scores = [[float(answer[0][0]) for answer in row["resps"]] for row in rows]
    assert scores == [
        pytest.approx([log_likelihood(checkpoint, row["doc"]["question"], choice) for choice in row["doc"]["choices"]])
        for row in rows
    ]
    assert len(scores) == 3


def log_likelihood(checkpoint, context, continuation):
    """Sum of log p over " " + continuation after `context`, by torch's own functions."""
    model = MoALlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = torch.tensor([[WORDS.index(letter) for letter in f"{context} {continuation}"]])
    with torch.no_grad():
        rows = model(ids).logits[0, len(context) - 1 : -1]
    return -torch.nn.functional.cross_entropy(rows, ids[0, len(context) :], reduction="sum").item()
