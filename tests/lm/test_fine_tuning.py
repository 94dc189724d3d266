"""peft on moa_lm models: wrapped heads, stacked experts, checkpointing, and the code of docs/fine-tuning.md."""

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from torch import Tensor, nn

from moa_lm import MoALlamaForCausalLM, loss

EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
STACKED = ["experts.gate_proj", "experts.up_proj", "experts.down_proj"]
PAGE = Path(__file__).parents[2] / "docs" / "fine-tuning.md"

pytestmark = pytest.mark.filterwarnings("ignore")  # of the peft library, and of its calls of transformers


def lora(**fields: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "init_lora_weights": False, "r": 4, **fields})


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def in_place(change: Callable[[MoALlamaForCausalLM], object]) -> Callable[[MoALlamaForCausalLM], nn.Module]:
    return lambda model: (change(model), model)[1]


def offload_head(model: MoALlamaForCausalLM) -> None:
    accelerate.cpu_offload(model.lm_head, execution_device=torch.device("cpu"))


WRAPPERS: dict[str, Callable[[MoALlamaForCausalLM], nn.Module]] = {
    "LoRA": lambda model: peft.get_peft_model(model, lora(target_modules=["lm_head"])),
    "bias": in_place(lambda model: setattr(model.lm_head, "bias", nn.Parameter(torch.randn(101)))),
    "offloaded": in_place(offload_head),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_skip_logits_with_a_wrapped_head(name, tiny, tokens, monkeypatch):
    monkeypatch.setattr(loss, "MIN_CHUNK", 5)
    input_ids = tokens(2, 9)
    labels = input_ids.clone()
    labels[1, 4:] = -100
    losses, found = [], []
    for skip in (False, True):
        torch.manual_seed(3)
        model = WRAPPERS[name](tiny()).train()
        out = model(input_ids=input_ids, labels=labels, skip_logits=skip)
        out.loss.backward()
        losses.append(out.loss)
        found.append(gradients(model))
    assert out.logits is None and out.sequence_losses.shape == (2,)
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(found[1], found[0])
    if name == "LoRA":
        assert all("lora" in parameter for parameter in found[1])


@pytest.mark.parametrize("dispatch", ["blocks", "grouped"])
def test_lora_on_stacked_experts(dispatch, tiny, tokens, tmp_path):
    """Every factor gets a gradient; saving, loading and merging keep the function."""
    fields, input_ids = {**EXPERTS, "expert_dispatch": dispatch}, tokens(2, 9)
    model = peft.get_peft_model(tiny(**fields), lora(target_modules=[], target_parameters=STACKED)).train()
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    assert all("lora" in name and gradient.any() for name, gradient in gradients(model).items())
    assert len(gradients(model)) == 2 * 2 * len(STACKED)
    trained = model.eval()(input_ids=input_ids).logits
    with model.disable_adapter():
        assert not torch.allclose(model(input_ids=input_ids).logits, trained, atol=0.1)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny(**fields), tmp_path)
    torch.testing.assert_close(loaded(input_ids=input_ids).logits, trained)
    torch.testing.assert_close(model.merge_and_unload()(input_ids=input_ids).logits, trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", [{}, EXPERTS], ids=["dense", "moe"])
def test_lora_on_all_linear_layers_with_checkpointing(fields, tiny, tokens):
    input_ids, found = tokens(2, 9), []
    for checkpointing in (False, True):
        model = peft.prepare_model_for_kbit_training(tiny(**fields), use_gradient_checkpointing=False)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model = peft.get_peft_model(model, lora(target_modules="all-linear")).train()
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        found.append(gradients(model))
    torch.testing.assert_close(found[1], found[0])
    adapted = model.eval()(input_ids=input_ids).logits
    torch.testing.assert_close(model.merge_and_unload()(input_ids=input_ids).logits, adapted, rtol=1e-4, atol=1e-4)
    assert {"q_proj", "gate_proj", "mix_proj"} <= {name.split(".lora")[0].rsplit(".", 1)[1] for name in found[0]}


def test_code_of_the_page_runs(tiny, tmp_path, monkeypatch):
    """Blocks that need a library which is not installed are skipped."""
    monkeypatch.chdir(tmp_path)
    tiny(**EXPERTS).save_pretrained("models/moe")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    scope: dict[str, Any] = {}
    for block in blocks:
        needed = {library for library in ("bitsandbytes", "torchao") if library in block.lower()}
        if all(find_spec(library) for library in needed):
            exec(block, scope)
    assert len(blocks) == 5
    assert (tmp_path / "models" / "moe_tuned" / "model.safetensors").is_file()
