"""The registered ViTs against timm's own, with timm's arguments, methods and export tools."""

import inspect
from typing import Any

import onnxruntime
import peft
import pytest
import timm
import torch
from timm.layers import set_scriptable
from timm.models.naflexvit import NaFlexVit, checkpoint_filter_fn
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from moa_ffn import FFN, VARIANTS
from moa_vision.vit import FFN_ARGUMENTS, SIZES, model_name

SMALL: dict[str, Any] = {"depth": 2, "img_size": 32}


def vit(name: str = "vit_tiny_patch16_qdmoa", **kwargs: Any) -> VisionTransformer:
    model = timm.create_model(name, **{**SMALL, **kwargs})
    assert isinstance(model, VisionTransformer)
    return model


def ffns(model: nn.Module) -> list[FFN]:
    return [module for module in model.modules() if isinstance(module, FFN)]


def num_parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(name).parameters())


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains(variant):
    model = vit(model_name("tiny", variant), num_classes=10)
    logits = model(images(2, 3, 32, 32))
    logits.sum().backward()
    assert logits.shape == (2, 10)
    assert {ffn.spec.variant for ffn in ffns(model)} == {variant}
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts(size):
    gelu, swiglu, qdmoa = (num_parameters(model_name(size, variant)) for variant in ("gelu", "swiglu", "qdmoa"))
    assert gelu == num_parameters(f"vit_{size}_patch16_224")
    assert abs(swiglu / gelu - 1) < 1e-3
    assert qdmoa - swiglu == SIZES[size]["depth"] * 6 * SIZES[size]["embed_dim"]  # 3 x 2 gate vectors per layer


def test_gelu_equals_timm_with_the_same_weights():
    theirs = timm.create_model("vit_tiny_patch16_224", **SMALL)
    ours = vit("vit_tiny_patch16_gelu")
    names = (("mlp.fc1", "mlp.gate_proj"), ("mlp.fc2", "mlp.down_proj"))
    weights = {key.replace(*names[0]).replace(*names[1]): value for key, value in theirs.state_dict().items()}
    ours.load_state_dict(weights)
    x = images(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "size", "outputs"),
    [
        ({"dynamic_img_size": True}, (64, 64), 1000),
        ({"patch_size": 8, "in_chans": 1}, (32, 32), 1000),
        ({"global_pool": "map", "num_classes": 0}, (32, 32), 192),
        ({"init_values": 1e-5, "qk_norm": True, "reg_tokens": 4, "fix_init": True}, (32, 32), 1000),
    ],
)
def test_timm_arguments(arguments, size, outputs):
    assert vit(**arguments)(images(2, arguments.get("in_chans", 3), *size)).shape == (2, outputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ffn_gates": "tanh"}, "ffn_gates.*allowed: ffn_mixing_gate, "),
        ({"ffn_mixing_gate": "relu"}, "gate='relu' is not one of sigmoid, tanh, softmax"),
        ({"act_layer": "relu"}, "act_layer is not allowed"),
        ({"scale_mlp_norm": True}, "scale_mlp_norm=True"),
        ({"mlp_layer": nn.Identity}, "mlp_layer is not allowed"),
        ({"use_naflex": True, "attn_type": "eva"}, "without the qdmoa FFN"),
        ({"block_fn": ParallelScalingBlock}, "block_fn=.*ParallelScalingBlock.* without the qdmoa FFN"),
    ],
)
def test_invalid_arguments_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        vit(**arguments)


def test_every_setting_of_the_layer_is_an_argument():
    others = {"self", "dim", "hidden_dim", "variant", "bias", "drop", "device", "dtype"}  # set by timm
    assert {f"ffn_{name}" for name in set(inspect.signature(FFN.__init__).parameters) - others} == set(FFN_ARGUMENTS)


@pytest.mark.parametrize("weight_init", ["", "jax", "reset"])
@pytest.mark.parametrize("variant", ["qdmoa", "bila"])
def test_timm_initialization_keeps_that_of_the_ffn(weight_init, variant):
    arguments = {"ffn_mix_init_std": 0.3, "ffn_coef_init": 0.7}
    built = vit(f"vit_tiny_patch16_{variant}", weight_init=weight_init, **arguments)
    with torch.device("meta"):
        later = vit(f"vit_tiny_patch16_{variant}", **arguments)
    later.to_empty(device="cpu")
    later.init_weights(weight_init)
    for ffn in ffns(built) + ffns(later):
        assert ffn.gate_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert ffn.down_proj.bias.abs().max() == 0
        if ffn.mix_proj is not None:
            assert ffn.mix_proj.weight.std().item() == pytest.approx(0.3, rel=0.1)
        if ffn.mix_coef is not None:
            assert torch.all(ffn.mix_coef == 0.7)


def test_features_only():
    model = timm.create_model("vit_tiny_patch16_qdmoa", features_only=True, out_indices=[0, 1], **SMALL)
    assert [tuple(feature.shape) for feature in model(images(1, 3, 32, 32))] == [(1, 192, 2, 2)] * 2


@pytest.mark.filterwarnings("ignore")  # of the peft library
def test_merged_lora_equals_the_adapted_model():
    model = timm.create_model("vit_tiny_patch16_qdmoa", depth=2, img_size=64, num_classes=4).eval()
    x = images(2, 3, 64, 64)
    plain = model(x)
    lora = peft.LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora).eval()
    out = adapted(x)
    out.sum().backward()
    assert all(p.grad.any() for p in adapted.parameters() if p.requires_grad)
    assert not torch.allclose(out, plain, atol=0.1)
    torch.testing.assert_close(adapted.merge_and_unload()(x), out, rtol=1e-4, atol=1e-4)


def exported(model: VisionTransformer, x: Tensor):
    return torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()


TOOLS = {
    "fx": lambda model, x: torch.fx.symbolic_trace(model),
    "script": lambda model, x: torch.jit.script(model),
    "export": exported,
}


GRAPH_WARNINGS = pytest.mark.filterwarnings(  # of torch.jit, of tracing timm's models, of every fx.GraphModule
    "ignore:.*torch.jit", "ignore::torch.jit.TracerWarning", "ignore:The TorchScript type system:UserWarning"
)


@GRAPH_WARNINGS
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("variant", ["bila", "qdmoa"])
def test_graphs_compute_batches_of_any_size(variant, tool):
    set_scriptable(True)
    model = vit(model_name("tiny", variant)).eval()
    set_scriptable(False)
    graph = TOOLS[tool](model, images(2, 3, 32, 32))
    for batch in (3, 1):
        x = images(batch, 3, 32, 32)
        torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-5)


@GRAPH_WARNINGS
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")  # onnx's
@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_onnx_export(dynamo, tmp_path):
    model, path = vit().eval(), tmp_path / "vit.onnx"
    dynamic = {"dynamic_axes": {"x": {0: "batch"}, "y": {0: "batch"}}}
    if dynamo:
        dynamic = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    names = {"input_names": ["x"], "output_names": ["y"]}
    torch.onnx.export(model, (images(2, 3, 32, 32),), path, dynamo=dynamo, verbose=False, **names, **dynamic)
    session = onnxruntime.InferenceSession(path)
    for batch in (2, 5):
        x = images(batch, 3, 32, 32)
        (y,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("block", "per_block"), [(ResPostBlock, 1), (ParallelThingsBlock, 2)])
def test_other_blocks_of_timm(block, per_block):
    model = vit(block_fn=block)
    assert len(ffns(model)) == len(model.blocks) * per_block
    assert model(images(1, 3, 32, 32)).isfinite().all()


def test_naflex_equals_the_classic_model(monkeypatch):
    monkeypatch.setenv("TIMM_USE_NAFLEXVIT", "true")
    naflex: Any = timm.create_model("vit_tiny_patch16_qdmoa", **SMALL).eval()
    assert isinstance(naflex, NaFlexVit) and len(ffns(naflex)) == 2
    classic = vit(use_naflex=False).eval()
    state = {name: value.clone() for name, value in classic.state_dict().items()}  # timm changes cls_token in place
    naflex.load_state_dict(checkpoint_filter_fn(state, naflex))
    x = images(2, 3, 32, 32)
    torch.testing.assert_close(naflex(x), classic(x))
