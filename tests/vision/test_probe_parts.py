"""Parts of the probes against timm, scikit-learn and the formulas of facebookresearch/mae."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from torch import nn

from moa_train.errors import DataError
from moa_vision import vit
from moa_vision.data import ImageBatch
from moa_vision.probe import knn
from moa_vision.probe.augment import BatchRandAugment, MixingAugment, seed_from, seeded_globals
from moa_vision.probe.classify import LinearProbe, lars, layer_groups
from moa_vision.probe.knn import Features, KNNConfig, knn_accuracies

CLASSES, SIZE = 6, (16, 16)
POLICY = "rand-m9-mstd0.5-inc1"

# nearest neighbours


def unit_features(count, seed):
    generator = torch.Generator().manual_seed(seed)
    values = F.normalize(torch.randn(count, 5, generator=generator), dim=1)
    return Features(values, torch.randint(CLASSES, (count,), generator=generator))


@pytest.mark.parametrize("similarities", [1, 2**27], ids=["in chunks", "at once"])
@pytest.mark.parametrize("k", [1, 20])
def test_accuracies_equal_scikit_learn(k, similarities, monkeypatch):
    monkeypatch.setattr(knn, "SIMILARITIES", similarities)
    train, val = unit_features(60, 3), unit_features(200, 4)
    theirs = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(train.values, train.labels)
    accuracies = knn_accuracies(train, val, CLASSES, KNNConfig(k=(k, 2)))
    assert accuracies[k][0] == pytest.approx(theirs.score(val.values, val.labels))
    assert accuracies.keys() == {k, 2}


def test_a_class_without_votes_is_not_among_the_top_five():
    train = Features(torch.eye(6), torch.arange(6))
    val = Features(torch.eye(6)[:1], torch.tensor([4]))  # its nearest neighbour has label 0
    assert knn_accuracies(train, val, 6, KNNConfig(k=(1, 6))) == {1: (0.0, 0.0), 6: (0.0, 1.0)}


# optimizers


def layer_of(name, depth):
    """Return the layer as get_layer_id_for_vit of facebookresearch/mae, util/lr_decay.py."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks") else depth + 1


def test_layer_groups_equal_mae():
    model = vit.vit_tiny_patch16_qdla(img_size=32, depth=2, num_classes=CLASSES, global_pool="avg")
    groups = layer_groups(model, 0.05, 0.65)
    found = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    named = dict(model.named_parameters())
    assert sum(len(group["params"]) for group in groups) == len(named) == len(found)
    assert any(name.endswith("mix_coef") for name in named)
    for name, parameter in named.items():
        no_decay = parameter.ndim == 1 or name in ("cls_token", "pos_embed") or name.endswith("mix_coef")
        scale = 0.65 ** (3 - layer_of(name, 2))
        assert found[id(parameter)] == (pytest.approx(scale), 0.0 if no_decay else 0.05), name


def test_lars_equals_mae():
    """facebookresearch/mae, util/lars.py: v = m v + trust |p| / |g| g for weights, v = m v + g for vectors."""
    head = nn.Linear(5, 3)
    optimizer = lars(head, lr=0.5, weight_decay=0.0, momentum=0.9)
    parameters = [head.weight, head.bias]
    expected = [p.detach().double() for p in parameters]
    velocities = [torch.zeros_like(p) for p in expected]
    for _ in range(3):
        for i, parameter in enumerate(parameters):
            parameter.grad = torch.randn(parameter.shape)
            update = parameter.grad.double()
            if update.ndim > 1:
                update = update * 0.001 * expected[i].norm() / update.norm()
            velocities[i] = 0.9 * velocities[i] + update
            expected[i] = expected[i] - 0.5 * velocities[i]
        optimizer.step()
    for parameter, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), value, rtol=1e-5, atol=1e-7)


def test_folded_head_equals_norm_and_head():
    linear = LinearProbe(nn.Identity(), 5, 3)
    for _ in range(4):
        linear(3 + 2 * torch.randn(16, 5))
    x = torch.randn(7, 5)
    weight, bias = linear.folded_head()
    torch.testing.assert_close(F.linear(x, weight, bias), linear.eval()(x))
    assert not linear.train().encoder.training and linear.norm.training


# augmentations


@pytest.mark.parametrize("seed", range(3))
def test_erasing_and_mixing_equal_timm(seed):
    images, labels = torch.randn(8, 3, *SIZE), torch.arange(8) % CLASSES
    augment = MixingAugment(CLASSES, mixup=0.8, cutmix=1.0, smoothing=0.1, erase=0.5)
    torch.manual_seed(seed)
    ours = augment(images.clone(), labels, seed)
    torch.manual_seed(seed)
    with seeded_globals(seed):
        erased = RandomErasing(0.5, mode="pixel", device="cpu")(images.clone())
        theirs = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=CLASSES)(erased.clone(), labels)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert not torch.equal(erased, images) and not torch.equal(ours[0], erased)


def test_rand_augment_has_the_operations_of_timms_recipe():
    mean = (0.4, 0.5, 0.6)
    ours = BatchRandAugment(POLICY, (32, 40), mean).transform
    whole = create_transform((32, 40), is_training=True, auto_augment=POLICY, mean=mean, interpolation="bicubic")
    (theirs,) = (part for part in whole.transforms if type(part) is type(ours))
    assert ours.num_layers == theirs.num_layers and repr(ours).replace(", mmax=9.999", "") == repr(theirs)
    for op, other in zip(ours.ops, theirs.ops, strict=True):
        assert (op.aug_fn, op.kwargs) == (other.aug_fn, other.kwargs)
        assert op.hparams["translate_const"] == other.hparams["translate_const"]


def uint8_batch(count, channels=3):
    images = torch.randint(0, 256, (count, *SIZE, channels), dtype=torch.uint8).permute(0, 3, 1, 2)
    return ImageBatch(images, torch.rand(count, 4), [""] * count, torch.zeros(count, dtype=torch.int64), [])


def test_rand_augment_of_an_image_depends_on_its_noise_only():
    batch, augment = uint8_batch(12), BatchRandAugment(POLICY, SIZE, (0.5, 0.5, 0.5))
    before = batch.images.clone()
    alone = [
        augment(batch._replace(images=before[i : i + 1].clone(), noise=batch.noise[i : i + 1])).images
        for i in range(12)
    ]
    together = augment(batch)
    assert together is batch and torch.equal(batch.images, torch.cat(alone))
    assert sum(not torch.equal(a, b) for a, b in zip(before, batch.images, strict=True)) > 6
    assert seed_from(batch.noise[0]) != seed_from(batch.noise[1])


def test_rand_augment_works_at_full_magnitude():
    """timm posterizes to 0 bits at the top of its scale, which Pillow rejects."""
    augment = BatchRandAugment("rand-m10-n1-p1-inc1", SIZE, (0.5, 0.5, 0.5))
    image = Image.fromarray(np.full((*SIZE, 3), 200, np.uint8))
    assert "PosterizeIncreasing" in [op.name for op in augment.transform.ops]
    for op in augment.transform.ops:
        with seeded_globals(0):
            assert op(image).size == SIZE


def test_rand_augment_takes_grey_images_of_8_bits():
    augment, batch = BatchRandAugment(POLICY, SIZE, (0.5,)), uint8_batch(6, channels=1)
    before = batch.images.clone()
    assert augment(batch).images.shape == before.shape and not torch.equal(batch.images, before)
    with pytest.raises(DataError, match=r"finetune\.rand_augment null"):
        augment(batch._replace(images=before / 255))
