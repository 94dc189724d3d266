"""The MAE against transformers' ViTMAE, timm's forward pass and a plain decoder."""

import math
import re
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from moa_ffn import FFN
from moa_train.config import OptimConfig
from moa_train.errors import ConfigError
from moa_train.optim import build_optimizer
from moa_vision.mae import MAE, create_mae, forward_flops, parameter_counts

TINY: dict[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 4, "patch_size": 8}
DECODER: dict[str, Any] = {"decoder_dim": 24, "decoder_depth": 2, "decoder_heads": 3}
TOLERANCE = 1e-5


def tiny_mae(variant: str = "gelu", img_size: Any = 32, **kwargs: Any) -> MAE:
    encoder_args = {**TINY, **kwargs.pop("encoder_args", {})}
    return create_mae(
        f"vit_tiny_patch16_{variant}", img_size=img_size, encoder_args=encoder_args, **{**DECODER, **kwargs}
    )


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def make_batch(mae: MAE, size: int = 3) -> tuple[Tensor, Tensor]:
    return 2 * random(size, mae.in_chans, *mae.image_size) - 1, random(size, mae.num_patches, seed=1)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


# transformers.ViTMAEForPreTraining


def reference(img_size: Any, **kwargs: Any) -> ViTMAEForPreTraining:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    decoder = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    sizes |= {f"decoder_{name}": value for name, value in decoder.items()}
    return ViTMAEForPreTraining(ViTMAEConfig(image_size=img_size, patch_size=8, layer_norm_eps=1e-6, **sizes, **kwargs))


RENAMED = [  # transformers' name -> ours; the first five convert its older naming scheme to its newer one
    (r"encoder\.layer\.", "layers."),
    (r"attention\.attention\.(query|key|value)", lambda match: f"attention.{match[1][0]}_proj"),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"(\d)\.output\.dense", r"\1.mlp.fc2"),
    (r"^vit\.embeddings\.patch_embeddings\.projection", "encoder.patch_embed.proj"),
    (r"^vit\.embeddings\.cls_token", "encoder.cls_token"),
    (r"^vit\.embeddings\.position_embeddings", "encoder.pos_embed"),
    (r"^vit\.layernorm", "encoder.norm"),
    (r"^vit\.layers\.(\d+)\.attention", r"encoder.blocks.\1.attn"),
    (r"^vit\.layers", "encoder.blocks"),
    (r"^decoder\.decoder_layers\.(\d+)\.attention\.o_proj", r"decoder_blocks.\1.proj"),
    (r"^decoder\.decoder_layers\.(\d+)\.attention\.", r"decoder_blocks.\1."),
    (r"^decoder\.decoder_layers", "decoder_blocks"),
    (r"^decoder\.decoder_pred", "decoder_head"),
    (r"^decoder\.decoder_pos_embed", "decoder_pos"),
    (r"^decoder\.", ""),
    (r"attn\.o_proj", "attn.proj"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"mlp\.fc1", "mlp.gate_proj"),
    (r"mlp\.fc2", "mlp.down_proj"),
]


def translated(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename transformers' tensors and stack query, key and value."""
    named = {}
    for name, tensor in tensors.items():
        for pattern, ours in RENAMED:
            name = re.sub(pattern, ours, name)
        named[name] = tensor
    for query in [name for name in named if "q_proj" in name]:
        parts = [named.pop(query.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        named[query.replace("q_proj", "qkv")] = torch.cat(parts)
    return named


@torch.no_grad()
def copy_weights(theirs: ViTMAEForPreTraining, ours: MAE) -> None:
    """Copy noisy weights to our model and our positions to theirs, which are zero without a checkpoint."""
    for parameter in theirs.parameters():  # zero biases and unit norms would hide a swap
        parameter.add_(0.1 * torch.randn_like(parameter))
    tensors = theirs.state_dict()
    assert ours.encoder.pos_embed is not None
    tensors["vit.embeddings.position_embeddings"].copy_(ours.encoder.pos_embed)
    tensors["decoder.decoder_pos_embed"].zero_()[0, 1:] = ours.decoder_pos
    weights = translated(tensors)
    del weights["decoder_pos"]
    ours.load_state_dict(weights)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_loss_mask_and_gradients_equal_vitmae(norm_pix_loss, attention):
    theirs = reference(32, norm_pix_loss=norm_pix_loss, attn_implementation=attention)
    ours = tiny_mae(norm_pix_loss=norm_pix_loss)
    copy_weights(theirs, ours)
    images, noise = make_batch(ours)

    expected = theirs(pixel_values=images, noise=noise)
    output = ours(images, noise)
    expected.loss.backward()
    output.loss.backward()

    assert torch.equal(output.mask, expected.mask)
    assert abs(output.loss.item() - expected.loss.item()) < TOLERANCE
    masked = expected.logits[expected.mask.bool()].view_as(output.prediction)
    assert (output.prediction - masked).abs().max() < TOLERANCE
    gradients = translated({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    trained = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert gradients.keys() == trained.keys()
    for name, gradient in trained.items():
        assert gradient is not None
        if name.endswith("qkv.bias"):  # the gradient of the key's bias is rounding error
            assert (gradient - gradients[name]).norm() < TOLERANCE
        else:
            assert relative_error(gradient, gradients[name]) < TOLERANCE, name


def test_equals_vitmae_on_non_square_images():
    theirs = reference((16, 64))  # its forward rejects such images, its parts do not
    ours = tiny_mae(img_size=(16, 64), norm_pix_loss=False)
    copy_weights(theirs, ours)
    images, noise = make_batch(ours)

    encoded = theirs.vit(images, noise=noise)
    logits = theirs.decoder(encoded.last_hidden_state, encoded.ids_restore).logits
    target = theirs.patchify(images, interpolate_pos_encoding=True)
    output = ours(images, noise)

    assert torch.equal(ours.patchify(images), target)
    masked = logits[encoded.mask.bool()].view_as(output.prediction)
    assert (output.prediction - masked).abs().max() < TOLERANCE
    assert abs(output.loss.item() - (logits - target).square()[encoded.mask.bool()].mean().item()) < TOLERANCE


def test_parameters_and_flops_of_the_official_size():
    with torch.device("meta"):
        theirs = ViTMAEForPreTraining(ViTMAEConfig(norm_pix_loss=True))
        ours = create_mae("vit_base_patch16_gelu", img_size=224)
    counts = parameter_counts(ours)
    assert counts["total"] == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert counts["total"] == counts["encoder"] + counts["decoder"] and counts["mixing"] == 0

    def block(tokens: int, width: int) -> int:  # 12 weight products and two attention products, two per multiply-add
        return 2 * (12 * tokens * width**2 + 2 * tokens**2 * width)

    encoder = 2 * 49 * 768 * 768 + 12 * block(50, 768)
    decoder = 2 * 50 * 768 * 512 + 8 * block(197, 512) + 2 * 147 * 512 * 768
    first = 2 * 147 * 3 * 512**2  # q, k, v of the mask tokens in the first decoder block, once per batch
    last = 2 * 50 * (9 * 512**2 + 2 * 197 * 512)  # visible tokens in the last decoder block, except q, k, v
    assert forward_flops(ours) == encoder + decoder - first - last


# timm encoders


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "deit3_small_patch16_224",  # positions without class token, layer scale
        "vit_small_patch14_reg4_dinov2",  # register tokens
        "vit_base_patch16_clip_224",  # norm before the blocks, no bias in the patch embedding
        "vit_tiny_patch16_qdmoa",
    ],
)
def test_encoding_all_patches_equals_timm(name):
    encoder = timm.create_model(name, img_size=(32, 48), patch_size=16, depth=2, num_classes=9)
    assert isinstance(encoder, VisionTransformer)
    mae = MAE(encoder, **DECODER).eval()
    images, noise = make_batch(mae)
    everything = torch.arange(mae.num_patches).expand(3, -1)
    torch.testing.assert_close(mae.encode(mae.patchify(images), everything), encoder.forward_features(images))
    mae(images, noise).loss.backward()
    assert [name for name, p in mae.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet18", {}, "ResNet, expected a timm VisionTransformer"),
        ("vit_tiny_patch16_224", {"patch_size": (16, 8)}, "must be square"),
        ("vit_tiny_patch16_224", {"pos_embed": "none"}, "absolute position embedding"),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, "global_pool='avg' must be 'token'"),
        ("vit_small_patch16_18x2_224", {}, "blocks with one `mlp` each"),
    ],
)
def test_unsupported_encoders_are_rejected(name, arguments, message):
    with pytest.raises(ConfigError, match=message), torch.device("meta"):
        MAE(timm.create_model(name, **arguments))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vit_tiny_patch16_qdmao", {}, "did you mean vit_tiny_patch16_qdmoa"),
        ("vit_tiny_patch16_qdmoa", {"encoder_args": {"ffn_gates": "tanh"}}, "unknown 'ffn_gates' .*ffn_mixing_gate"),
        ("vit_tiny_patch16_qdmoa", {"encoder_args": {"norm_layer": 3}}, "encoder_args={'norm_layer': 3}"),
        ("vit_tiny_patch16_qdmoa", {"mask_ratio": 1.0}, "mask_ratio=1.0 leaves 0 of 4 patches"),
    ],
)
def test_invalid_arguments_are_rejected(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        create_mae(name, **{"img_size": 32, **arguments})


def test_wrong_shapes_are_rejected():
    mae = tiny_mae()
    images, noise = make_batch(mae)
    with pytest.raises(ValueError, match=r"expected \(B, 3, 32, 32\)"):
        mae(images[..., :16])
    with pytest.raises(ValueError, match=r"expected \(B, 16\)"):
        mae(images, noise[:, :5])


# initialization and FFN settings


@pytest.mark.parametrize("variant", ["qdmoa", "bila"])
def test_initialization(variant):
    args = {"embed_dim": 96, "ffn_mix_init_std": 0.3, "ffn_coef_init": 0.7}
    mae = tiny_mae(variant, decoder_dim=96, encoder_args=args)
    mixing = {id(ffn.mix_proj) for ffn in mae.modules() if isinstance(ffn, FFN)}
    for name, module in mae.named_modules():
        if isinstance(module, nn.Linear) and id(module) not in mixing:
            bound = math.sqrt(6 / sum(module.weight.shape))
            assert 0.97 * bound < module.weight.abs().max() <= bound, name
            assert module.bias.abs().max() == 0
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6
        if isinstance(module, FFN) and module.mix_proj is not None:
            assert module.mix_proj.weight.std().item() == pytest.approx(0.3, rel=0.15)
        if isinstance(module, FFN) and module.mix_coef is not None:
            assert torch.all(module.mix_coef == 0.7)
    bound = math.sqrt(6 / (96 + 8 * 8 * 3))
    assert 0.97 * bound < mae.encoder.patch_embed.proj.weight.abs().max() <= bound
    assert mae.encoder.cls_token is not None and mae.encoder.pos_embed is not None
    for token in (mae.encoder.cls_token, mae.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.3)
    assert not mae.encoder.pos_embed.requires_grad


def test_decoder_ffn_has_the_settings_of_the_encoder():
    args = {"ffn_mixing_gate": "tanh", "ffn_gate_activations": "r,s", "ffn_mix_bias": True}
    mae = tiny_mae("qdmoa", encoder_args=args)
    assert {block.mlp.spec for block in mae.decoder_blocks} == {mae.encoder.blocks[0].mlp.spec}
    (spec,) = {block.mlp.spec for block in tiny_mae("qdmoa", encoder_args=args, decoder_ffn="bimoa").decoder_blocks}
    assert (spec.variant, spec.mixing_gate, spec.mix_bias) == ("bimoa", "tanh", True)


def test_decoder_ffn_of_a_plain_timm_encoder():
    plain = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    gated = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, mlp_layer=timm.layers.GluMlp)
    assert isinstance(plain, VisionTransformer) and isinstance(gated, VisionTransformer)
    assert {b.mlp.spec.variant for b in MAE(plain, **DECODER).decoder_blocks} == {"gelu"}
    with pytest.raises(ConfigError, match="GluMlp has no equivalent among the variants"):
        MAE(gated)
    assert {b.mlp.spec.variant for b in MAE(gated, decoder_ffn="qdmoa").decoder_blocks} == {"qdmoa"}


def test_parameter_counts_of_mixing():
    swiglu, qdmoa = (parameter_counts(tiny_mae(variant)) for variant in ("swiglu", "qdmoa"))
    assert qdmoa["mixing"] == 6 * (3 * 32 + 2 * 24)  # 3 x 2 vectors per layer
    assert qdmoa["total"] - swiglu["total"] == qdmoa["ffn"] - swiglu["ffn"] == qdmoa["mixing"]


def test_constant_coefficients_get_no_weight_decay():
    blocks = [*(f"encoder.blocks.{i}" for i in range(3)), *(f"decoder_blocks.{i}" for i in range(2))]
    assert tiny_mae("qdla").no_weight_decay() == {f"{block}.mlp.mix_coef" for block in blocks}


@pytest.mark.parametrize("variant", ["gelu", "qdla", "qdmoa", "pau"])
def test_muon_steps_the_projections_of_all_blocks(variant):
    mae = tiny_mae(variant)
    blocks = [*mae.encoder.blocks.named_modules(prefix="encoder.blocks")]
    blocks += mae.decoder_blocks.named_modules(prefix="decoder_blocks")
    linear = {f"{name}.weight" for name, module in blocks if isinstance(module, torch.nn.Linear)}
    assert mae.hidden_matrices() == {name for name in linear if "mix_proj" not in name}
    optimizer = build_optimizer(mae, OptimConfig(algorithm="muon"), mae.no_weight_decay(), mae.hidden_matrices())
    stepped = [group["params"] for group in optimizer.param_groups if "momentum" in group]
    assert sum(map(len, stepped)) == len(mae.hidden_matrices())


# forward pass


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    mae = tiny_mae("qdmoa", encoder_args={"depth": 1})
    images, noise = make_batch(mae)
    mae(images, noise).loss.backward()
    gradient = mae.decoder_embed.weight.grad
    mae.zero_grad()
    output = torch.compile(mae, fullgraph=True, backend="aot_eager")(images, noise)
    output.loss.backward()
    torch.testing.assert_close(output, mae(images, noise))
    torch.testing.assert_close(mae.decoder_embed.weight.grad, gradient)


def test_loss_stays_float32_under_autocast():
    mae = tiny_mae("qdmoa")
    images, noise = make_batch(mae)
    expected = mae(images, noise).loss
    with torch.autocast("cpu", torch.bfloat16):
        output = mae(images, noise)
        losses = mae.reconstruction_losses(images, output)
    assert output.prediction.dtype == torch.bfloat16
    assert {loss.dtype for loss in (output.loss, *losses.values())} == {torch.float32}
    torch.testing.assert_close(output.loss, expected, rtol=2e-2, atol=0)


def plain_decode(mae: MAE, latent: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
    """Decode with all tokens of all images in every block."""
    x = mae.decoder_embed(latent)
    prefix = x.shape[1] - visible.shape[1]
    seen = x[:, prefix:] + mae.decoder_pos[visible]
    x = torch.cat([x[:, :prefix], seen, mae.mask_token + mae.decoder_pos[masked]], dim=1)
    for block in mae.decoder_blocks:
        x = block(x)
    return mae.decoder_head(mae.decoder_norm(x[:, -masked.shape[1] :]))


def decoder_gradients(mae: MAE, prediction: Tensor, latent: Tensor) -> dict[str, Tensor]:
    """Return gradients of a weighted sum; the weights are positive, so that images do not cancel."""
    parameters = {name: p for name, p in mae.named_parameters() if not name.startswith("encoder.")}
    wanted = {"latent": latent, **parameters}
    weights = random(*prediction.shape, seed=2)
    return dict(zip(wanted, torch.autograd.grad((prediction * weights).sum(), list(wanted.values())), strict=True))


@settings(max_examples=20)
@given(
    images=st.integers(1, 5),
    depth=st.integers(1, 3),
    mask_ratio=st.floats(0.1, 0.9),
    registers=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_decode_equals_the_plain_decoder(images, depth, mask_ratio, registers, seed):
    args = {"depth": 1, "reg_tokens": registers}
    mae = tiny_mae("qdmoa", encoder_args=args, decoder_depth=depth, mask_ratio=mask_ratio).double()
    visible, masked = mae.split(mae.mask_from(random(images, 16, seed=seed)))
    latent = random(images, 1 + registers + mae.num_visible, 32).double().requires_grad_()
    prediction, expected = mae.decode(latent, visible, masked), plain_decode(mae, latent, visible, masked)
    torch.testing.assert_close(prediction, expected, rtol=0, atol=1e-12)
    gradients, expected = decoder_gradients(mae, prediction, latent), decoder_gradients(mae, expected, latent)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-12 * (1 + expected[name].norm()), name


def test_bf16_gradients_of_a_large_batch_are_as_exact_as_plain_ones():
    mae = tiny_mae("qdmoa")
    visible, masked = mae.split(mae.mask_from(random(1024, 16)))
    latent = random(1024, 1 + mae.num_visible, 32).requires_grad_()
    exact = decoder_gradients(mae, plain_decode(mae, latent, visible, masked), latent)
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = mae.decode(latent, visible, masked), plain_decode(mae, latent, visible, masked)
    ours, plain = (decoder_gradients(mae, prediction, latent) for prediction in (ours, plain))
    for name in ("mask_token", "decoder_blocks.0.norm1.weight", "decoder_blocks.0.qkv.weight"):
        assert relative_error(ours[name], exact[name]) < 2 * relative_error(plain[name], exact[name]), name


# reconstructions


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_reconstruction_and_its_losses(norm_pix_loss):
    mae = tiny_mae("qdmoa", img_size=(24, 32), norm_pix_loss=norm_pix_loss)
    images, noise = make_batch(mae)
    output = mae(images, noise)
    reconstruction = mae.reconstruct(images, output)
    seen = output.mask.unsqueeze(-1) == 0
    assert torch.equal(mae.patchify(reconstruction) * seen, mae.patchify(images) * seen)

    losses = mae.reconstruction_losses(images, output)
    trained = losses["loss_norm" if norm_pix_loss else "loss_pixel"]
    torch.testing.assert_close(trained.mean(), output.loss)
    pixel = (reconstruction - images).square().sum(dim=(1, 2, 3)) / (output.mask.sum(1) * 8 * 8 * 3)
    torch.testing.assert_close(losses["loss_pixel"], pixel)


@pytest.mark.parametrize(("variant", "name"), [("la", "mix_coef"), ("xielu", "act_param")])
def test_shared_coefficients_have_no_weight_decay(variant, name):
    mae = tiny_mae(variant)
    expected = {f"encoder.blocks.{i}.mlp.{name}" for i in range(3)} | {
        f"decoder_blocks.{i}.mlp.{name}" for i in range(2)
    }
    assert mae.no_weight_decay() == expected
