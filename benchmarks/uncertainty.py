"""Whether a trained network errs where MC dropout says that it is unsure.

    python benchmarks/uncertainty.py --run runs/bagls_small/mc --draws 20 --out docs/uncertainty.png

Each pixel of a part of the split is predicted by the mean of the draws, and is right or wrong.
Three measures of how unsure it is are compared: the entropy of one pass without dropout, the
entropy of the mean over the draws, and their mutual information. For each:

* the share of wrong pixels in ten bins of it, drawn and as a table;
* Spearman's correlation between it and being wrong, over pixels. With few wrong pixels it is far
  from 1 even where every wrong pixel is less sure than every right one; `of at most` says how far;
* the area under the ROC curve: the chance that a wrong pixel is less sure than a right one;
* Spearman's correlation over slices, between the mean of it and the share of wrong pixels.

Intervals are 95 % by the bootstrap over patients or videos, because pixels of one are not
independent. The table is printed and the figure written; the numbers also stand in a JSON file
beside it, with the configuration, the cases and the hashes of split and weights of the run.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot
from scipy.stats import spearmanr
from tqdm import tqdm

from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.errors import MedsegError, run_main
from medseg_reg.files import replacing, sha256_of, write_json
from medseg_reg.inference.ensemble import Ensemble, Way, load_runs

Array = np.ndarray[Any, np.dtype[Any]]

# Bins for ranks are even in the logarithm, because most pixels of a trained network are very sure.
FINE, SMALLEST = 2000, 1e-8
BINS, RESAMPLES = 10, 1000
MEASURES = {
    "single": "entropy, one pass",
    "entropy": "entropy, MC dropout",
    "mutual_information": "mutual information",
}


def spearman(counts: Array) -> float:
    """Return Spearman's correlation between a measure and being wrong.

    Args:
        counts: (bins, 2), right and wrong pixels in each of many bins of the measure; pixels of one
            bin are ties.
    """
    each = counts.sum(axis=1).astype(np.float64)
    total = each.sum()
    ranks = np.cumsum(each) - (each - 1) / 2  # the mean rank of each bin
    wrong = counts[:, 1].sum()
    deviation = ranks - (total + 1) / 2
    spread = np.sqrt((each * deviation**2).sum() * wrong * (total - wrong) / total)
    return float((counts[:, 1] * deviation).sum() / spread) if spread > 0 else float("nan")


def area(counts: Array) -> float:
    """Return the area under the ROC curve of a measure for wrong pixels; counts as above."""
    right, wrong = counts.astype(np.float64).T
    below = np.cumsum(right) - right
    pairs = right.sum() * wrong.sum()
    return float((wrong * (below + right / 2)).sum() / pairs) if pairs > 0 else float("nan")


def largest(counts: Array) -> float:
    """Return the correlation if every wrong pixel were less sure than every right one."""
    each, wrong = counts.sum(axis=1), counts[:, 1].sum()
    from_top = np.cumsum(each[::-1])[::-1]
    ideal = np.clip(wrong - (from_top - each), 0, each)
    return spearman(np.stack([each - ideal, ideal], axis=1))


def rates(counts: Array) -> Array:
    """Return the share of wrong pixels in each bin, NaN where there are no pixels."""
    with np.errstate(invalid="ignore"):
        shares: Array = counts[:, 1] / counts.sum(axis=1)
    return shares


def interval(
    groups: Sequence[Any], statistic: Callable[[Sequence[Any]], Any], seed: int = 0
) -> tuple[Any, Any]:
    """Return the 2.5 % and 97.5 % points of a statistic over groups drawn with replacement."""
    rng = np.random.default_rng(seed)
    drawn = [
        statistic([groups[i] for i in rng.integers(0, len(groups), len(groups))])
        for _ in range(RESAMPLES)
    ]
    with warnings.catch_warnings():
        # A bin that is empty in every resample has no interval.
        warnings.simplefilter("ignore", RuntimeWarning)
        return tuple(np.nanpercentile(np.array(drawn), [2.5, 97.5], axis=0))


def gather(run: RunDirectory, part: str, draws: int, seed: int) -> dict[str, Any]:
    """Predict a part of the split, and count right and wrong pixels by measure.

    Returns:
        For each measure and group: `counts` (FINE, 2), right and wrong pixels for ranks; `bins`
        (BINS, 2), the same for rates; `slices` (slices, 2), the mean of the measure and the share
        of wrong pixels.
    """
    store, splits = run.data(run.config().data.store)
    sampled, single = (load_runs([run], Way(draws=n, seed=seed)).ensemble for n in (draws, 0))
    top = float(np.log(len(store.classes)))
    edges = {
        "counts": np.geomspace(SMALLEST, top, FINE)[:-1],
        "bins": np.linspace(0, top, BINS + 1)[1:-1],
    }
    found: dict[str, Any] = {kind: {name: {} for name in MEASURES} for kind in (*edges, "slices")}
    for case in tqdm(getattr(splits, part), unit="case"):
        group, truth = store.row(case).group, store.mask(case)
        known = truth != (-1 if store.ignore_label is None else store.ignore_label)
        for start, measures, wrong in _predicted(sampled, single, store.image(case), case, truth):
            here = known[start : start + len(wrong)]
            full = here.any(axis=(1, 2))
            for name, values in measures.items():
                for kind, at in edges.items():
                    new = _count(np.searchsorted(at, values[here]), wrong[here], len(at) + 1)
                    found[kind][name][group] = found[kind][name].get(group, 0) + new
                means = [x[full].mean(axis=(1, 2), where=here[full]) for x in (values, wrong)]
                found["slices"][name].setdefault(group, []).append(np.stack(means, axis=1))
    for groups in found["slices"].values():
        groups.update({group: np.concatenate(parts) for group, parts in groups.items()})
    return found


def _count(index: Array, wrong: Array, bins: int) -> Array:
    """Return right and wrong pixels of each bin, (bins, 2)."""
    return np.bincount((2 * index + wrong).ravel(), minlength=2 * bins).reshape(bins, 2)


def _predicted(sampled: Ensemble, single: Ensemble, images: Array, case: str, truth: Array) -> Any:
    """Yield a first slice, the measures from there on, and which of the pixels are wrong."""
    parts = zip(
        sampled.parts(images, case, ("entropy", "mutual_information")),
        single.parts(images, case, ("entropy",)),
        strict=True,
    )
    for many, one in parts:
        wrong = many.labels != truth[many.start : many.start + len(many.labels)]
        # What a crop cut off has no value: the network says nothing of it.
        found = {"single": one.maps["entropy"], **many.maps}
        yield many.start, {name: np.nan_to_num(values) for name, values in found.items()}, wrong


def summarise(gathered: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the numbers of each measure, with intervals over groups."""
    summary = {}
    for name in MEASURES:
        counts = list(gathered["counts"][name].values())
        bins, slices = (list(gathered[kind][name].values()) for kind in ("bins", "slices"))
        whole = sum(counts)
        if not 0 < whole[:, 1].sum() < whole.sum():
            raise MedsegError("all pixels are right, or all wrong: there is nothing to compare.")

        def over_slices(groups: Sequence[Array]) -> float:
            means = np.concatenate(groups)
            # A constant has no ranks.
            return float(spearmanr(*means.T)[0]) if np.ptp(means, axis=0).all() else float("nan")

        summary[name] = {
            "groups": len(counts),
            "pixels": int(whole.sum()),
            "wrong": float(whole[:, 1].sum() / whole.sum()),
            "spearman": spearman(whole),
            "spearman_interval": interval(counts, lambda some: spearman(sum(some))),
            "spearman_at_most": largest(whole),
            "area": area(whole),
            "area_interval": interval(counts, lambda some: area(sum(some))),
            "spearman_of_slices": over_slices(slices),
            "spearman_of_slices_interval": interval(slices, over_slices),
            "rates": rates(sum(bins)),
            "rates_interval": interval(bins, lambda some: rates(sum(some))),
            "share_of_pixels": sum(bins).sum(axis=1) / whole.sum(),
        }
    return summary


def table(summary: dict[str, dict[str, Any]]) -> str:
    """Return the numbers as Markdown."""

    def shown(one: dict[str, Any], key: str) -> str:
        low, high = one[f"{key}_interval"]
        return f"{one[key]:.3f} ({low:.3f} to {high:.3f})"

    first = next(iter(summary.values()))
    lines = [
        f"{first['groups']} patients or videos, {first['pixels']} pixels, {first['wrong']:.2%} "
        f"wrong; over pixels Spearman is at most {first['spearman_at_most']:.3f}",
        "",
        "| measure | Spearman, pixels | area under ROC | Spearman, slices |",
        "|---|---|---|---|",
    ]
    for name, one in summary.items():
        cells = [shown(one, key) for key in ("spearman", "area", "spearman_of_slices")]
        lines.append(f"| {MEASURES[name]} | {' | '.join(cells)} |")
    heads = " | ".join(f"{name}: pixels | wrong" for name in MEASURES.values())
    lines += ["", f"| bin | {heads} |", "|---" * (1 + 2 * len(MEASURES)) + "|"]
    for index in range(BINS):
        cells = [
            f"{one['share_of_pixels'][index]:.2%} | {one['rates'][index]:.2%}".replace("nan%", "-")
            for one in summary.values()
        ]
        lines.append(f"| {index + 1} of {BINS} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(summary: dict[str, dict[str, Any]], slices: dict[str, Any], path: Path) -> None:
    """Draw the share of wrong pixels over the bins, and over the slices."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    at = (np.arange(BINS) + 0.5) / BINS
    for (name, one), marker in zip(summary.items(), "os^", strict=True):
        low, high = one["rates_interval"]
        (line,) = left.plot(at, one["rates"], marker=marker, markersize=4, label=MEASURES[name])
        left.fill_between(at, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    left.set(
        xlabel="share of its largest value, log K", ylabel="share of wrong pixels", xlim=(0, 1)
    )
    left.set_ylim(bottom=0)
    left.legend(fontsize=7)
    for means in slices["entropy"].values():
        right.plot(*means.T, ".", markersize=3, alpha=0.6, color="tab:orange")
    score = summary["entropy"]["spearman_of_slices"]
    right.set(xlabel="mean entropy of a slice, MC dropout", title=f"Spearman {score:.2f}")
    right.set(ylabel="share of wrong pixels")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--part", choices=("test", "val", "train"), default="test")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("uncertainty.png"))
    options = parser.parse_args(arguments)
    gathered = gather(RunDirectory(options.run), options.part, options.draws, options.seed)
    summary = summarise(gathered)
    print(table(summary))
    draw(summary, gathered["slices"], options.out)
    plain = {
        name: {key: np.asarray(value).tolist() for key, value in one.items()}
        for name, one in summary.items()
    }
    about = {"part": options.part, "draws": options.draws, "seed": options.seed}
    about |= made_of(RunDirectory(options.run), options.part)
    write_json(options.out.with_suffix(".json"), _without_nan({**about, "measures": plain}))
    print(f"figure: {options.out}")


def made_of(run: RunDirectory, part: str) -> dict[str, Any]:
    """Return what a run is, so that anyone can train and measure it again."""
    config = run.config()
    _, splits = run.data(config.data.store)
    return {
        "config": config.model_dump(mode="json"),
        "data": run.data_facts().name,
        "splits_hash": splits.hash,
        "cases": list(getattr(splits, part)),
        "weights_sha256": sha256_of(run.weights),
    }


def _without_nan(content: Any) -> Any:
    """Return None for what is no number, as JSON wants it."""
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not np.isfinite(content) else content


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run_main(main)
