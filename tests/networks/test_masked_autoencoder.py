"""A masked autoencoder sees the visible patches alone, and is judged by the hidden ones alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medseg_reg.config_pretraining import MaskingSpec
from medseg_reg.errors import MedsegError
from medseg_reg.networks.build import Network, build_network
from medseg_reg.networks.masked_autoencoder import (
    MaskedAutoencoder,
    image_of,
    patches_of,
    reconstruction_loss,
    sincos_positions,
)
from medseg_reg.networks.token_encoder import token_encoder
from tests.insertion.transformers import recompute
from tests.networks.small_foreign import SMALL
from tests.reference import masked_autoencoder as reference

SIZES = {"monai.UNETR": (48, 64), "smp.DPT": (64, 96)}
MORE = {"monai.UNETR": {"img_size": [48, 64]}, "smp.DPT": {}}
DECODER = {"width": 16, "blocks": 1, "heads": 2}


def network(name: str, **more: Any) -> Network:
    torch.manual_seed(0)
    arguments = {**SMALL[name], **MORE.get(name, {}), **more}
    return build_network(in_channels=1, classes=2, head="softmax", name=name, **arguments)


def autoencoder(name: str = "monai.UNETR", **more: Any) -> MaskedAutoencoder:
    model = network(name)
    given = {"factor": model.factor, **DECODER, **more}
    return MaskedAutoencoder(token_encoder(model), 1, SIZES[name], **given)


@pytest.fixture(scope="module", params=list(SIZES))
def model(request: pytest.FixtureRequest) -> MaskedAutoencoder:
    return autoencoder(request.param).eval()


# The loss


@pytest.mark.parametrize("normalize", [True, False])
def test_the_loss_equals_brute_force(normalize: bool) -> None:
    torch.manual_seed(0)
    images = torch.rand(3, 2, 8, 12)
    hidden = torch.rand(3, 6) < 0.6
    hidden[0] = False  # a sample may have none
    prediction = torch.randn(3, 6, 4 * 4 * 2)
    mae = autoencoder(normalize=normalize)
    mae.encoder.patch, mae.factor = (4, 4), 1
    found = reconstruction_loss(prediction, mae.targets(images), hidden)
    wanted = reference.loss(
        prediction.numpy(), images.numpy(), hidden.numpy(), 4, 4, normalize=normalize
    )
    assert float(found) == pytest.approx(wanted, rel=1e-5)


def test_visible_patches_do_not_count() -> None:
    torch.manual_seed(0)
    target, hidden = torch.rand(2, 5, 7), torch.rand(2, 5) < 0.5
    prediction = torch.rand(2, 5, 7, requires_grad=True)
    before = reconstruction_loss(prediction, target, hidden)
    before.backward()
    reaches = prediction.grad.abs().sum(-1) > 0
    assert torch.equal(reaches, hidden)
    other = torch.where(hidden[..., None], prediction, 1e3)
    assert torch.equal(reconstruction_loss(other, target, hidden), before)


def test_a_patch_without_contrast_has_a_target_of_zeros() -> None:
    target = autoencoder().targets(torch.full((1, 1, 48, 64), 0.7))
    assert target.abs().max() < 1e-3


@pytest.mark.parametrize("patch", [(4, 4), (2, 6)])
def test_patches_are_cut_row_after_row_and_put_together_again(patch: tuple[int, int]) -> None:
    images = torch.rand(2, 3, 8, 12)
    patches = patches_of(images, patch)
    for one, image in zip(patches, images, strict=True):
        np.testing.assert_allclose(one, reference.cut(image.numpy(), *patch), rtol=1e-6)
    grid = (8 // patch[0], 12 // patch[1])
    assert torch.equal(image_of(patches, patch, grid), images)


def test_positions_are_the_sines_and_cosines_of_the_formula() -> None:
    found = sincos_positions((3, 5), 16).numpy()
    np.testing.assert_allclose(found, reference.positions(3, 5, 16), atol=1e-6)


# What the encoder sees


def test_the_published_numbers_are_the_defaults() -> None:
    spec = MaskingSpec()
    assert (spec.ratio, spec.width, spec.blocks, spec.heads) == (0.75, 512, 8, 16)
    unetr = network("monai.UNETR", img_size=96)
    mae = MaskedAutoencoder(token_encoder(unetr), 1, (96, 96), **DECODER)
    for training in (True, False):
        _, hidden = mae.train(training)(torch.rand(2, 1, 96, 96))
        assert hidden.sum(1).tolist() == [27, 27]  # of 36, in evaluation too
    assert mae.hidden_patches == 27


def test_each_patch_is_hidden_as_often_as_any_other() -> None:
    torch.manual_seed(0)
    mae = autoencoder()
    mae.encoder.forward = lambda image, kept: torch.zeros(*kept.shape, mae.encoder.width)
    _, hidden = mae(torch.rand(2000, 1, 48, 64))
    spread = math.sqrt(0.75 * 0.25 / 2000)
    assert ((hidden.float().mean(0) - 0.75).abs() < 4 * spread).all()
    assert len({tuple(row.tolist()) for row in hidden[:50]}) > 40  # drawn for each image


def test_a_hidden_pixel_changes_nothing_and_a_visible_one_does(model: MaskedAutoencoder) -> None:
    rows, columns = SIZES["smp.DPT" if "Timm" in type(model.encoder).__name__ else "monai.UNETR"]
    image = torch.rand(1, 1, rows, columns)
    kept = torch.tensor([[1, 4, 6]])
    with torch.no_grad():
        before = model.encoder(image, kept)
        for number in range(model.patches):
            top, left = (16 * i for i in divmod(number, columns // 16))
            other = image.clone()
            other[..., top : top + 16, left : left + 16] = 3.0
            same = torch.equal(model.encoder(other, kept), before)
            assert same == (number not in kept), number


def test_its_blocks_run_on_as_many_tokens_as_are_visible(model: MaskedAutoencoder) -> None:
    counts = []
    for block in model.encoder.vit.blocks:
        hook = lambda module, args: counts.append(args[0].shape[1])  # noqa: E731
        block.register_forward_pre_hook(hook)
    with torch.no_grad():
        model(torch.rand(2, 1, *(16 * side for side in model.grid)))
    classes = getattr(model.encoder.vit, "num_prefix_tokens", 0)
    assert set(counts) == {model.patches - model.hidden_patches + classes}


def test_with_every_patch_visible_it_is_the_transformer_itself(model: MaskedAutoencoder) -> None:
    image, encoder = torch.rand(2, 1, *(16 * side for side in model.grid)), model.encoder
    every = torch.arange(model.patches).expand(2, -1)
    with torch.no_grad():
        found = encoder(image, every)
        if hasattr(encoder.vit, "forward_features"):
            wanted = encoder.vit.forward_features(image)[:, encoder.vit.num_prefix_tokens :]
        else:
            wanted = encoder.vit(image)[0]
    torch.testing.assert_close(found, wanted)


# The decoder


def test_the_decoder_knows_a_hidden_patch_by_its_place_alone() -> None:
    mae = autoencoder().eval()
    seen: list[Tensor] = []
    mae.blocks.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        _, hidden = mae(torch.rand(3, 1, 48, 64))
    wanted = mae.mask_token + mae.positions
    for tokens, m in zip(seen[0], hidden, strict=True):
        torch.testing.assert_close(tokens[m], wanted[m])
        assert not torch.isclose(tokens[~m], wanted[~m]).all(1).any()


def test_everything_but_unused_parts_learns(model: MaskedAutoencoder) -> None:
    mae = model.train()
    image = torch.rand(2, 1, *(16 * side for side in mae.grid))
    prediction, hidden = mae(image)
    reconstruction_loss(prediction, mae.targets(image), hidden).backward()
    without = {name for name, p in mae.named_parameters() if p.grad is None}
    # MONAI makes norms, and timm a classifier, that a network for segmentation never calls.
    assert all("norm_cross_attn" in name or ".head." in name for name in without)
    model.zero_grad()
    model.eval()


def test_a_picture_has_the_true_pixels_where_patches_are_visible() -> None:
    mae, images = autoencoder().eval(), torch.rand(2, 1, 45, 60)  # padded to 48 x 64
    with torch.no_grad():
        seen, filled = mae.reconstructed(images)
    visible = ~seen.isnan()
    assert seen.shape == filled.shape == images.shape
    assert torch.equal(seen[visible], images[visible])
    assert torch.equal(filled[visible], images[visible])
    assert not torch.equal(filled[~visible], images[~visible])
    assert filled.isfinite().all()


def test_the_picture_of_a_perfect_prediction_is_the_image() -> None:
    mae, images = autoencoder().eval(), torch.rand(2, 1, 48, 64)
    mae.forward = lambda image: (mae.targets(image), torch.ones(2, 12, dtype=torch.bool))
    _, filled = mae.reconstructed(images)
    torch.testing.assert_close(filled, images)


def step(mae: MaskedAutoencoder, run: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """The loss and the gradients of an autoencoder that is run as it is or in another way."""
    torch.manual_seed(3)
    x = torch.rand(2, 1, *(16 * side for side in mae.grid))
    mae.zero_grad()
    prediction, hidden = run(x)
    loss = reconstruction_loss(prediction, mae.targets(x), hidden)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in mae.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", list(SIZES))
def test_it_is_trained_in_lower_precision_and_with_activations_computed_again(name: str) -> None:
    mae = autoencoder(name).train()
    loss, grads = step(mae, mae)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, theirs = step(mae, mae)
    torch.testing.assert_close(low, loss, atol=0.05, rtol=0.05)
    assert all(grad.isfinite().all() for grad in theirs)
    recompute(mae, [f"encoder.vit.blocks.{n}" for n in range(len(mae.encoder.vit.blocks))])
    found, theirs = step(mae, mae)
    torch.testing.assert_close([found, *theirs], [loss, *grads], atol=0, rtol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", list(SIZES))
def test_it_compiles_without_a_break(name: str) -> None:
    mae = autoencoder(name).train()
    loss, grads = step(mae, mae)
    torch.compiler.reset()
    found, theirs = step(mae, torch.compile(mae, backend="eager", fullgraph=True))
    torch.testing.assert_close([found, *theirs], [loss, *grads], atol=1e-5, rtol=1e-3)


# What cannot be


@pytest.mark.parametrize("name", ["monai.SwinUNETR", "smp.Unet"])
def test_a_network_without_one_sequence_of_tokens_is_refused(name: str) -> None:
    with pytest.raises(MedsegError, match=rf"{name} has no encoder .* Use monai.UNETR"):
        token_encoder(network(name))


def test_a_network_that_is_no_network_of_this_package_is_refused() -> None:
    with pytest.raises(MedsegError, match="Sequential has no encoder"):
        token_encoder(nn.Sequential())


def test_a_size_of_one_patch_and_one_that_does_not_fit_are_refused() -> None:
    encoder = token_encoder(network("monai.UNETR"))
    with pytest.raises(MedsegError, match=r"16x16 is one patch of 16x16: nothing can be hidden"):
        MaskedAutoencoder(encoder, 1, (16, 16), **DECODER)
    with pytest.raises(MedsegError, match=r"50x64 is not divided by patches of 16x16"):
        MaskedAutoencoder(encoder, 1, (50, 64), **DECODER)
