"""The registered ViTs against timm's own, and timm's usual arguments and methods on them."""

import inspect
from pathlib import Path
from typing import Any

import onnxruntime
import peft
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import set_scriptable
from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from timm.models.naflexvit import NaFlexVit, checkpoint_filter_fn
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock, VisionTransformer
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from moa_ffn import FFN, VARIANTS
from moa_vision.vit import FFN_ARGUMENTS, SIZES, ffn_settings, model_name

SMALL: dict[str, Any] = {"depth": 2, "img_size": 32}


def vit(name: str = "vit_tiny_patch16_qdmoa", **kwargs: Any) -> VisionTransformer:
    model = timm.create_model(name, **{**SMALL, **kwargs})
    assert isinstance(model, VisionTransformer)
    return model


def ffns(model: nn.Module) -> list[FFN]:
    return [module for module in model.modules() if isinstance(module, FFN)]


def count(name: str) -> int:
    with torch.device("meta"):
        model = timm.create_model(name)
    return sum(parameter.numel() for parameter in model.parameters())


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_every_size_and_variant_is_registered():
    expected = {f"vit_{size}_patch16_{variant}" for size in SIZES for variant in VARIANTS}
    assert len(expected) == 44
    assert expected <= set(timm.list_models("vit_*"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_runs_forward_and_backward(variant):
    model = vit(model_name("tiny", variant), num_classes=10)
    logits = model(images(2, 3, 32, 32))
    logits.sum().backward()
    assert logits.shape == (2, 10)
    assert {ffn.spec.variant for ffn in ffns(model)} == {variant}
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts(size):
    gelu = count(f"vit_{size}_patch16_gelu")
    assert gelu == count(f"vit_{size}_patch16_224")
    swiglu, qdmoa = count(f"vit_{size}_patch16_swiglu"), count(f"vit_{size}_patch16_qdmoa")
    assert abs(swiglu / gelu - 1) < 1e-3
    shape = SIZES[size]
    assert qdmoa - swiglu == shape["depth"] * 6 * shape["embed_dim"]  # 3 x 2 gate vectors a layer


def test_gelu_equals_timm_with_its_weights():
    theirs = timm.create_model("vit_tiny_patch16_224", **SMALL)
    ours = vit("vit_tiny_patch16_gelu")
    weights = {
        key.replace("mlp.fc1", "mlp.gate_proj").replace("mlp.fc2", "mlp.down_proj"): value
        for key, value in theirs.state_dict().items()
    }
    ours.load_state_dict(weights)
    x = images(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "size", "shape"),
    [
        ({"num_classes": 7}, 32, (2, 7)),
        ({"num_classes": 0}, 32, (2, 192)),
        ({"img_size": (32, 48)}, (32, 48), (2, 1000)),
        ({"dynamic_img_size": True}, 64, (2, 1000)),
        ({"patch_size": 8}, 32, (2, 1000)),
        ({"in_chans": 1}, 32, (2, 1000)),
        ({"global_pool": "avg"}, 32, (2, 1000)),
        ({"global_pool": "map"}, 32, (2, 1000)),
        ({"embed_dim": 96, "num_heads": 2, "mlp_ratio": 3.0}, 32, (2, 1000)),
        ({"init_values": 1e-5, "qk_norm": True, "reg_tokens": 4, "fix_init": True}, 32, (2, 1000)),
        ({"drop_path_rate": 0.5, "proj_drop_rate": 0.1, "pos_drop_rate": 0.1}, 32, (2, 1000)),
        ({"ffn_mixing_gate": "tanh", "ffn_gate_activations": "g,s", "ffn_mix_bias": True}, 32, (2, 1000)),
    ],
)
def test_usual_arguments(arguments, size, shape):
    height, width = (size, size) if isinstance(size, int) else size
    x = images(2, arguments.get("in_chans", 3), height, width)
    assert vit(**arguments)(x).shape == shape


def test_arguments_reach_the_ffn():
    model = vit(
        ffn_mixing_gate="softmax", ffn_up_activations=["id", "t", "s"], ffn_mix_init_std=0.3, proj_drop_rate=0.2
    )
    for ffn in ffns(model):
        assert ffn.spec.mixing_gate == "softmax" and ffn.spec.up_activations == ("identity", "tanh", "silu")
        assert ffn.mix_init_std == 0.3 and ffn.drop.p == 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ffn_gates": "tanh"}, "ffn_gates.*allowed: ffn_mixing_gate, "),
        ({"ffn_mixing_gate": "relu"}, "gate='relu' is not one of sigmoid, tanh, softmax"),
        ({"ffn_gate_activations": "gelu,swish"}, "unknown activation 'swish'"),
        ({"act_layer": "relu"}, "act_layer must be left out"),
        ({"scale_mlp_norm": True}, "scale_mlp_norm=True"),
        ({"mlp_layer": nn.Identity}, "mlp_layer must be left out"),
        ({"block_fn": ParallelScalingBlock}, "block_fn=.*ParallelScalingBlock.* without the qdmoa FFN"),
        ({"use_naflex": True, "attn_type": "eva"}, "without the qdmoa FFN"),
    ],
)
def test_bad_arguments_say_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        vit(**arguments)


@pytest.mark.parametrize("arguments", [("huge", "qdmoa"), ("base", "geglu")])
def test_unknown_size_or_variant(arguments):
    with pytest.raises(ValueError, match="is not one of"):
        model_name(*arguments)


def test_every_setting_of_the_layer_is_an_argument():
    others = {"self", "dim", "hidden_dim", "variant", "bias", "drop", "device", "dtype"}  # timm gives these
    assert {f"ffn_{name}" for name in set(inspect.signature(FFN.__init__).parameters) - others} == set(FFN_ARGUMENTS)


def test_settings_of_a_layer_build_the_same_layer():
    settings = {
        "mixing_gate": "tanh",
        "gate_activations": "g,r",
        "mix_init_std": 0.1,
        "coef_init": 0.2,
        "mix_bias": True,
    }
    layer = ffns(vit(**{f"ffn_{name}": value for name, value in settings.items()}))[0]
    again = FFN(192, 512, "qdmoa", **ffn_settings(layer))
    assert again.spec == layer.spec and ffn_settings(again) == ffn_settings(layer)


@pytest.mark.parametrize("weight_init", ["", "jax", "jax_nlhb", "moco", "reset", "skip"])
@pytest.mark.parametrize("variant", ["qdmoa", "bila"])
def test_ffn_initialization_survives_timm(weight_init, variant):
    model = vit(f"vit_tiny_patch16_{variant}", weight_init=weight_init, ffn_mix_init_std=0.3, ffn_coef_init=0.7)
    check_ffn_initialization(model)


@pytest.mark.parametrize("mode", ["", "jax", "moco", "reset"])
@pytest.mark.parametrize("variant", ["qdmoa", "bila"])
def test_ffn_initialization_survives_a_later_one(mode, variant):
    with torch.device("meta"):
        model = vit(f"vit_tiny_patch16_{variant}", ffn_mix_init_std=0.3, ffn_coef_init=0.7)
    model.to_empty(device="cpu")
    model.init_weights(mode)
    check_ffn_initialization(model)


def check_ffn_initialization(model: nn.Module) -> None:
    for ffn in ffns(model):
        assert ffn.gate_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert ffn.down_proj.bias.abs().max() == 0
        if ffn.mix_proj is not None:
            assert ffn.mix_proj.weight.std().item() == pytest.approx(0.3, rel=0.1)
        if ffn.mix_coef is not None:
            assert torch.all(ffn.mix_coef == 0.7)


def test_features_only():
    model = timm.create_model("vit_tiny_patch16_qdmoa", features_only=True, out_indices=[0, 1], **SMALL)
    assert [tuple(feature.shape) for feature in model(images(1, 3, 32, 32))] == [(1, 192, 2, 2)] * 2


def test_forward_intermediates_end_in_forward_features():
    model, x = vit().eval(), images(2, 3, 32, 32)
    final, intermediates = model.forward_intermediates(x, norm=True, output_fmt="NLC")
    torch.testing.assert_close(final, model.forward_features(x))
    assert isinstance(intermediates, list)
    torch.testing.assert_close(intermediates[-1], final[:, 1:])


def test_gradient_checkpointing_changes_nothing():
    model, x = vit(), images(2, 3, 32, 32)
    model(x).square().sum().backward()
    plain = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], msg=name)


@pytest.mark.filterwarnings("ignore")  # of the peft library
def test_lora_on_projections_is_what_it_is_merged():
    """Adapted layers compute by modules, merged ones by whatever backend is the fastest."""
    model = timm.create_model("vit_tiny_patch16_qdmoa", depth=2, img_size=64, num_classes=4).eval()
    images = torch.randn(2, 3, 64, 64)
    plain = model(images)
    lora = peft.LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora).eval()
    out = adapted(images)
    out.sum().backward()
    assert all(p.grad.any() for p in adapted.parameters() if p.requires_grad)
    assert not torch.allclose(out, plain, atol=0.1)
    torch.testing.assert_close(adapted.merge_and_unload()(images), out, rtol=1e-4, atol=1e-4)


def test_parameter_groups():
    model = vit("vit_tiny_patch16_bila")
    assert model.no_weight_decay() >= {"pos_embed", "cls_token"}
    undecayed, decayed = param_groups_weight_decay(model, 0.05, model.no_weight_decay())
    coefficients = {id(ffn.mix_coef) for ffn in ffns(model)}
    assert coefficients <= {id(parameter) for parameter in undecayed["params"]}
    assert len(undecayed["params"]) + len(decayed["params"]) == len(list(model.parameters()))
    scales = {group["lr_scale"] for group in param_groups_layer_decay(model, 0.05, layer_decay=0.5)}
    assert scales == {1.0, 0.5, 0.25, 0.125}  # head, two blocks, stem


def test_set_input_size_and_reset_classifier():
    model = vit()
    model.set_input_size((48, 64))
    model.reset_classifier(5, "avg")
    assert model(images(2, 3, 48, 64)).shape == (2, 5)


def traced_by_timm(model: VisionTransformer, x: Tensor) -> nn.Module:
    """What timm's own tests trace: torchvision's extractor with timm's leaves."""
    settings = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    settings["param_shapes_constant"] = True
    _, nodes = get_graph_node_names(model, tracer_kwargs=settings)
    graph = create_feature_extractor(model, {nodes[-1]: "out"}, tracer_kwargs=settings)

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.graph = graph

        def forward(self, x: Tensor) -> Tensor:
            return self.graph(x)["out"]

    return Last()


def traced(model: VisionTransformer, x: Tensor):
    with torch.no_grad():
        return torch.jit.trace(model, x)


def exported(model: VisionTransformer, x: Tensor):
    return torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()


TOOLS = {
    "fx": lambda model, x: torch.fx.symbolic_trace(model),
    "torchvision": traced_by_timm,
    "script": lambda model, x: torch.jit.script(model),
    "fx, script": lambda model, x: torch.jit.script(traced_by_timm(model, x)),
    "trace": traced,
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
    for batch in (2, 3, 1):
        x = images(batch, 3, 32, 32)
        torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-5)


@GRAPH_WARNINGS
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")  # onnx's
@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_onnx(dynamo, tmp_path):
    model, x = vit().eval(), images(2, 3, 32, 32)
    batch: dict[str, Any] = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)} if dynamo else {}
    batch = batch or {"dynamic_axes": {"x": {0: "batch"}, "y": {0: "batch"}}}
    torch.onnx.export(
        model,
        (x,),
        tmp_path / "vit.onnx",
        dynamo=dynamo,
        input_names=["x"],
        output_names=["y"],
        verbose=False,
        **batch,
    )
    session = onnxruntime.InferenceSession(tmp_path / "vit.onnx")
    for count in (2, 5):
        x = images(count, 3, 32, 32)
        (y,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [ResPostBlock, ParallelThingsBlock])
def test_blocks_that_call_their_mlp_layer(block):
    model = vit(block_fn=block)
    assert len(ffns(model)) == len(model.blocks) * (2 if block is ParallelThingsBlock else 1)
    assert model(images(1, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_naflex_is_the_same_function(pool, monkeypatch):
    monkeypatch.setenv("TIMM_USE_NAFLEXVIT", "true")
    naflex: Any = timm.create_model("vit_tiny_patch16_qdmoa", **SMALL, global_pool=pool).eval()
    assert isinstance(naflex, NaFlexVit) and len(ffns(naflex)) == 2
    classic = vit(use_naflex=False, global_pool=pool).eval()
    state = {name: value.clone() for name, value in classic.state_dict().items()}  # timm changes cls_token in place
    naflex.load_state_dict(checkpoint_filter_fn(state, naflex))
    x = images(2, 3, 32, 32)
    torch.testing.assert_close(naflex(x), classic(x))


def test_pretrained_configuration_and_overlay(tmp_path: Path):
    source = vit(num_classes=5)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    overlay = {"file": str(tmp_path / "weights.safetensors"), "num_classes": 5}
    x = images(2, 3, 32, 32)
    config = timm.get_pretrained_cfg("vit_tiny_patch16_qdmoa")
    assert config is not None
    for way in ({"pretrained_cfg_overlay": overlay}, {"pretrained_cfg": {**config.to_dict(), **overlay}}):
        model = vit(pretrained=True, **way)
        torch.testing.assert_close(model(x), source(x))
    other = vit(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
    torch.testing.assert_close(other.forward_features(x), source.forward_features(x))
