"""Draw what each method drops on a map of a trained network; used by make_methods.py.

The network is a small U-Net, trained for half a minute on the generated phantom, so that no
patient's image is shown. A unit counts as dropped where the output is zero and does not depend on
the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data_prep.phantom import phantom_volume
from medseg_reg.losses import MixedLoss
from medseg_reg.networks import UNet
from medseg_reg.regularizers import Regularizer, build, corrdrop_spatial, row_correlation
from medseg_reg.regularizers.catalogue import Entry

mpl.use("Agg")
from matplotlib import pyplot as plt

RATE, DRAWS, SEED = 0.25, 20, 0
CASES, SIZE, WINDOW = 8, 96, (-100, 240)
CHANNELS = (8, 16, 32, 64)
HEADS, GRID = 4, 6  # of the attention between positions of a map
EPOCHS, BATCH = 20, 8
PLACE = "encoder.1.between_convs"

RED, BLUE, INK, PAPER = (214, 69, 48), (36, 99, 190), (30, 30, 30), (255, 255, 255)
GAP, BAND = 4, 26
GREYS = 24  # levels; few, so that the files stay small

PARAMETERS: dict[str, dict[str, Any]] = {
    "adl": {"gamma": 0.6},  # at .9 it is single pixels
    "auto_dropout": {"rotate": 20.0},
}
"""Parameters of a picture beside p = `RATE` that are not the defaults, by name of the method."""


@dataclass
class Scene:
    """What the pictures are made from.

    Attributes:
        images: slices (B, 1, H, W) in 0..1.
        labels: their masks (B, H, W).
        maps: the feature maps (B, C, h, w) of those slices at `PLACE`.
        training_maps: maps of slices that were trained on, and their masks.
    """

    images: Tensor
    labels: Tensor
    maps: Tensor
    training_maps: tuple[Tensor, Tensor]


def draw_all(chosen: Sequence[Entry], folder: Path) -> None:
    """Draw the pictures of some methods, and CorrDrop's figure with one of its."""
    torch.set_num_threads(1)  # small maps: a second thread only waits for the first
    scene = make_scene()
    for one in chosen:
        save(draw(one, scene), folder / f"{one.name}.png")
    if any(one.name.startswith("corrdrop") for one in chosen):
        draw_selectivity(scene, folder / "corrdrop_selectivity.png")


def make_scene() -> Scene:
    """Train the network, and take its maps of eight slices it has not seen."""
    images, labels = _slices(range(1, CASES + 1))
    network = _train(images, labels)
    seen: list[Tensor] = []
    network.get_submodule(PLACE).register_forward_hook(lambda *call: seen.append(call[2]))
    network.eval()
    new_images, new_labels = _slices(range(CASES + 1, CASES + 5))
    rows = new_labels.flatten(1).sum(1).argsort(descending=True)[:8]
    with torch.no_grad():
        network(new_images[rows])
        network(images[: 4 * BATCH])
    return Scene(new_images[rows], new_labels[rows], seen[0], (seen[1], labels[: 4 * BATCH]))


def _slices(cases: range) -> tuple[Tensor, Tensor]:
    """Return the slices of some phantoms that show the organ."""
    volumes = [phantom_volume(SEED, case, SIZE) for case in cases]
    hu = np.concatenate([volume for volume, _ in volumes]).astype(np.float32)
    mask = np.concatenate([mask for _, mask in volumes])
    shown = mask.any((1, 2))
    low, high = WINDOW
    images = torch.from_numpy(((hu[shown] - low) / (high - low)).clip(0, 1))
    return images[:, None], torch.from_numpy(mask[shown].astype(np.int64))


def _train(images: Tensor, labels: Tensor) -> UNet:
    torch.manual_seed(SEED)
    network = UNet(2, 1, 2, channels=CHANNELS)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    loss_of = MixedLoss(ce=1.0, dice=1.0)
    for epoch in range(EPOCHS):
        total = 0.0
        for rows in torch.randperm(len(images)).split(BATCH):
            loss = loss_of(network(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        print(f"epoch {epoch + 1} of {EPOCHS}: loss {total / len(images):.3f}")
    return network


def draw(one: Entry, scene: Scene) -> Image.Image:
    """Draw one method: image, tiles before, tiles after with what was dropped in red.

    The tiles are the channels of one slice's map; for a method of the input eight images, for one
    of residual branches the mean maps of eight samples, for one of an attention its heads.
    """
    special = PARAMETERS.get(one.name, {})
    layer = build(one.name, p=RATE, **special).train()
    if "input" in one.default_places:
        x, title = scene.images, "8 images"
    elif "residual" in one.default_places:
        x, title = scene.maps, "branch of 8 samples (mean over channels)"
    elif "tokens" in one.default_places:
        x, title = scene.maps, "tokens of 8 samples (mean over channels)"
    elif "attention" in one.default_places:
        x, title = attention_of(scene.maps[:1]), "weights of 4 heads (a row: a query)"
    elif "block_residual" in one.default_places:
        x, title = scene.maps, "what a block adds to 8 samples (mean over channels)"
    elif "attention_head" in one.default_places:
        x = scene.maps[:HEADS].unflatten(1, (HEADS, -1)).mean(2)
        title = f"{HEADS} heads (columns) of {HEADS} samples"
    else:
        x, title = scene.maps[:1], f"map of {scene.maps.shape[1]} channels"
        _serve(layer, scene)
    y, dropped, altered, rate = choose_draw(layer, x)
    if len(x) > 1 and x.shape[1] > 1 and "attention_head" not in one.default_places:
        x, y = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
        dropped, altered = dropped.all(1, keepdim=True), altered.any(1, keepdim=True)
    tiles = [part.flatten(0, 1) for part in (x, y, dropped, altered)]
    before, after = (_grid(*tiles, after=after) for after in (False, True))
    panels = [before, after]
    titles = [f"before: {title}", "after one training pass"]
    if len(x) == 1:
        panels.insert(0, _enlarge(_grey(scene.images[0, 0], 1.0), 2 * SIZE))
        titles.insert(0, "image")
    marks = [(RED, "dropped")] * bool(dropped.any()) + [(BLUE, "replaced")] * bool(altered.any())
    asked = ", ".join(f"{key} = {value}" for key, value in ({"p": layer.p} | special).items())
    return _compose(panels, titles, f"{asked}; measured {rate:.2f}", marks)


def attention_of(maps: Tensor) -> Tensor:
    """Return the weights (B, heads, N, N) of an attention between the positions of maps.

    A quarter of the channels each is query and key of one head.
    """
    tokens = torch.nn.functional.adaptive_avg_pool2d(maps, GRID).flatten(2)
    tokens = tokens.unflatten(1, (HEADS, -1)).transpose(2, 3)
    tokens = (tokens - tokens.mean(2, keepdim=True)) / (tokens.std(2, keepdim=True) + 1e-6)
    return (tokens @ tokens.transpose(2, 3) / tokens.shape[-1] ** 0.5).softmax(-1)


def _serve(layer: Regularizer, scene: Scene) -> None:
    """Give a layer the labels and the held-out activations that it asks for."""
    if hasattr(layer, "finish_validation"):
        layer.eval()
        layer.recording, layer.labels = True, scene.training_maps[1]
        layer(scene.training_maps[0])
        layer.finish_validation()
        layer.recording = False
        layer.train().labels = scene.labels[:1]
    if hasattr(layer, "taking_part"):
        layer.taking_part = True


def choose_draw(layer: Regularizer, x: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return output, dropped and altered values, and rate, of the draw nearest to p, but not 0."""
    draws = []
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        source = x.clone().requires_grad_()
        y = layer(source)
        (slope,) = torch.autograd.grad(y.sum(), source)
        y = y.detach()
        draws.append((y, slope, layer.measured_rate(x, y)))
    acting = [one for one in draws if one[2] > 0] or draws
    y, slope, rate = min(acting, key=lambda one: abs(one[2] - layer.p))
    if "attention" in layer.place_kinds:  # a row is scaled where a part of it is dropped
        return y, (y == 0) & (x != 0), torch.zeros_like(x, dtype=torch.bool), rate
    # replaced rather than zeroed or scaled: the whole channel is marked
    altered = ((y - slope * x).abs() > 1e-4 * (1 + y.abs())).flatten(2).any(2)
    altered = altered.view(*x.shape[:2], *[1] * (x.dim() - 2)).expand_as(x)
    return y, (slope == 0) & (y == 0) & ~altered, altered, rate


def _grid(x: Tensor, y: Tensor, dropped: Tensor, altered: Tensor, *, after: bool) -> Image.Image:
    """Return the tiles four in a row, each with the grey scale of its map before."""
    tiles = []
    for index in range(len(x)):
        high = max(float(x[index].quantile(0.995)), 1e-6)
        grey = _grey(y[index] if after else x[index], high)
        if after:
            shade = _grey(x[index], high)
            mark = dropped[index].numpy()[..., None]
            grey = np.where(mark, 0.4 * shade + 0.6 * np.array(RED), grey)
        tile = _enlarge(grey)
        if after and bool(altered[index].any()):
            ImageDraw.Draw(tile).rectangle(
                (0, 0, tile.width - 1, tile.height - 1), outline=BLUE, width=2
            )
        tiles.append(tile)
    columns, (width, height) = 4, tiles[0].size
    rows = -(-len(tiles) // columns)
    grid = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), PAPER)
    for index, tile in enumerate(tiles):
        grid.paste(tile, (index % columns * (width + GAP), index // columns * (height + GAP)))
    return grid


def _grey(plane: Tensor, high: float) -> np.ndarray[Any, Any]:
    level = (plane.detach().clamp(0, high) / high * (GREYS - 1)).round().numpy()
    return np.repeat(level[..., None] * (255 / (GREYS - 1)), 3, axis=2)


def _enlarge(pixels: np.ndarray[Any, Any], width: int = SIZE) -> Image.Image:
    image = Image.fromarray(pixels.round().astype(np.uint8))
    size = (width, width * image.height // image.width)
    return image.resize(size, Image.Resampling.NEAREST)


def _compose(
    panels: Sequence[Image.Image],
    titles: Sequence[str],
    text: str,
    marks: Sequence[tuple[tuple[int, int, int], str]],
) -> Image.Image:
    """Put panels side by side, titles above, a text and what the colours mean below."""
    width = sum(panel.width for panel in panels) + 16 * (len(panels) - 1)
    height = max(panel.height for panel in panels) + 2 * BAND
    image = Image.new("RGB", (width, height), PAPER)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=15)
    left = 0
    for panel, title in zip(panels, titles, strict=True):
        pen.text((left, 4), title, INK, font)
        image.paste(panel, (left, BAND))
        left += panel.width + 16
    line = height - BAND + 6
    left = width - panels[-1].width
    pen.text((0, line), text, INK, font)
    for colour, meaning in marks:
        pen.rectangle((left, line + 2, left + 12, line + 14), fill=colour)
        pen.text((left + 18, line), meaning, INK, font)
        left += 34 + int(pen.textlength(meaning, font))
    return image


def draw_selectivity(scene: Scene, path: Path, draws: int = 2000) -> None:
    """Draw how often CorrDrop drops a block, against the block's correlation."""
    torch.manual_seed(SEED)
    synthetic = torch.randn(1, 16, 40, 40)
    synthetic[..., :20] = torch.randn(1, 16, 1, 1)
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), dpi=100, sharey=True)
    maps = {"half of the map correlated": synthetic, f"trained map, {PLACE}": scene.maps[:1]}
    for axis, (title, x) in zip(axes, maps.items(), strict=True):
        for faithful, colour in ((True, "#d64530"), (False, "#2463be")):
            correlation, frequency = selectivity(x, RATE, faithful=faithful, draws=draws)
            label = "published (faithful=True)" if faithful else "default"
            axis.plot(correlation, frequency, "o", ms=4, color=colour, alpha=0.6, label=label)
        axis.axhline(RATE, color="#1e1e1e", lw=0.8, ls=":")
        axis.set(title=title, xlabel="mean absolute correlation of the block", ylim=(-0.03, 1.03))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"drop frequency (p = {RATE})")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, pil_kwargs={"optimize": True})
    plt.close(figure)


def selectivity(
    x: Tensor, p: float, *, faithful: bool, block: int = 4, draws: int = 2000
) -> tuple[Tensor, Tensor]:
    """Return correlation and drop frequency of every block of a map (1, C, H, W)."""
    cells = torch.nn.functional.avg_pool2d(x, block)
    correlation = row_correlation(cells.flatten(2).transpose(1, 2))[0]
    total, batch = torch.zeros(cells.shape[2:]), 200
    for _ in range(draws // batch):
        many = x.expand(batch, -1, -1, -1)
        y = corrdrop_spatial(many, p, block, faithful=faithful)
        blocks = torch.nn.functional.avg_pool2d((y == 0).all(1).float()[:, None], block)
        total += (blocks == 1).sum((0, 1))
    return correlation, total.flatten() / (draws // batch * batch)


def save(image: Image.Image, path: Path) -> None:
    """Write a small PNG: few colours, no dithering."""
    palette = Image.new("P", (1, 1))
    levels = np.linspace(0, 255, GREYS)
    greys = [[level] * 3 for level in levels]
    reds = [0.4 * level + 0.6 * np.array(RED) for level in levels]
    colours = np.array([*greys, *reds, RED, BLUE, INK]).round().astype(int)
    palette.putpalette(colours.flatten().tolist())
    small = image.quantize(palette=palette, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size // 1024} kB")
