"""What a study's data support and what they do not, in sentences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from medseg_reg.study.report.besides import told_besides
from medseg_reg.study.report.budgets import unequal_budgets
from medseg_reg.study.report.comparing import ALPHA, Comparisons
from medseg_reg.study.report.source import METRICS, Source
from medseg_reg.study.report.tables import counted, p_value, share
from medseg_reg.study.statistics import is_supported, least_p, verdict

FEW_SEEDS = 3


@dataclass(frozen=True)
class Summary:
    """The summary of a report.

    Attributes:
        lead: what was compared.
        headline: the result in one or two sentences.
        supported: what the data support.
        open: what they do not.
        cautions: what a reader must know before quoting a number.
    """

    lead: str
    headline: str
    supported: list[str]
    open: list[str]
    cautions: list[str]


def summarize(source: Source, compared: Comparisons) -> Summary:
    """Say what was compared, what came out, and how far that can be trusted."""
    dice = compared.dice
    others = dice[(dice["method"] != source.baseline) & dice["difference"].notna()]
    sure = pd.Series([is_supported(row) for _, row in others.iterrows()], others.index, dtype=bool)
    found = others[sure].sort_values("difference", ascending=False, kind="stable")
    rest = others[~sure]
    lost = dice[(dice["method"] != source.baseline) & dice["mean"].isna()]
    return Summary(
        _lead(source),
        _headline(source, others, found),
        [_sentence(row) for _, row in found.iterrows()],
        [
            *(_sentence(row) for _, row in pd.concat([rest, lost]).iterrows()),
            *_winners(compared.ranked),
        ],
        [
            *_runs(source),
            *compared.notes,
            *_power(others),
            *_families(others),
            *_data(source),
            *_secondary(source),
        ],
    )


def _lead(source: Source) -> str:
    results = source.results
    if results.empty:
        return "No run of this study is finished, so there is nothing to compare."
    parts = [
        counted(len(source.methods), "method"),
        counted(results["network"].nunique(), "network"),
        counted(results["dataset"].nunique(), "data set"),
        counted(results["seed"].nunique(), "seed"),
    ]
    patients = results.groupby("dataset", sort=False)["group"].nunique()
    tested = ", ".join(f"{n} on {name}" for name, n in patients.items())
    return (
        f"{', '.join(parts)}: {counted(len(source.runs), 'finished run')}. Patients or videos "
        f"tested: {tested}. Every method is compared with the baseline, {source.baseline}, on "
        "the same patients and seeds."
    )


def _headline(source: Source, others: pd.DataFrame, found: pd.DataFrame) -> str:
    if not len(others):
        return "Nothing can be compared with the baseline yet."
    n = len(others)
    up, down = int((found["difference"] > 0).sum()), int((found["difference"] < 0).sum())
    comparisons = counted(n, "comparison")
    if not up and not down:
        return (
            f"In none of {comparisons} do the data show a difference to the baseline "
            f"({source.baseline}) in DICE. "
            "That is no proof of equality: see the intervals."
        )
    return (
        f"Of {comparisons} with the baseline ({source.baseline}), {up} "
        f"{'shows' if up == 1 else 'show'} a higher DICE and {down} a lower one; in "
        f"{n - up - down} the data cannot tell the difference from chance."
    )


def _sentence(row: pd.Series) -> str:
    return f"{row['dataset']}, {row['network']}: {verdict(row, metric='DICE')}"


def _winners(ranked: pd.DataFrame) -> Iterator[str]:
    if not len(ranked):
        return
    for (dataset, network), rows in ranked.groupby(["dataset", "network"], sort=False):
        if len(rows) < 2 or rows["best"].isna().all():
            continue
        top = rows.loc[rows["best"].idxmax()]
        if top["high"] > 1:
            yield (
                f"{dataset}, {network}: no method is clearly the best; {top['method']} comes first "
                f"most often, in {share(top['best'])} of the resamples, and its rank lies between "
                f"{top['low']:.0f} and {top['high']:.0f} of {len(rows)}."
            )


def _runs(source: Source) -> Iterator[str]:
    runs, expected = source.runs, source.expected
    if expected is not None and len(runs) < expected:
        yield f"{expected - len(runs)} of {expected} runs are missing from all numbers here."
    if source.failures is not None and len(source.failures):
        yield f"{counted(len(source.failures), 'run')} failed; see Failures."
    seeds = runs.groupby(["dataset", "network", "method"], sort=False)["seed"].nunique()
    if len(seeds) and seeds.min() < FEW_SEEDS:
        yield (
            f"With {counted(int(seeds.min()), 'seed')} in some cells the chance of the training is "
            "hardly seen, so intervals there, and those of ranks, are too narrow."
        )


def _power(others: pd.DataFrame) -> Iterator[str]:
    if not len(others):
        return
    for (dataset, network), rows in others.groupby(["dataset", "network"], sort=False):
        n, differ = int(rows["groups"].max()), int(rows["tested_groups"].max())
        tests = max(1, int(rows["p"].notna().sum()))
        least = min(1.0, least_p(differ) * tests)
        some = f", of whom at most {differ} differ from the baseline," if differ < n else ""
        if least >= ALPHA:
            yield (
                f"{dataset}, {network}: with {counted(n, 'patient')}{some} and "
                f"{counted(tests, 'method')} the smallest p that can come out is {p_value(least)} "
                "after Holm's correction, so no test there can be significant."
            )


def _families(others: pd.DataFrame) -> Iterator[str]:
    number = len(others[["dataset", "network"]].drop_duplicates())
    if number > 1:
        yield (
            "Holm's correction and the intervals for all methods together hold within one data set "
            f"and network. Over the {number} here a difference is shown by chance more often than "
            f"in {share(ALPHA)} of such studies: one finding among many is a hint."
        )


def _data(source: Source) -> Iterator[str]:
    notes: dict[str, None] = {}
    invalid = set()
    for row in source.runs.itertuples():
        summary = source.file(row.run, "summary.json") or {}
        notes.update(dict.fromkeys(f"{row.dataset}: {note}" for note in summary.get("notes", [])))
        if not summary.get("valid_for_reporting", True):
            invalid.add(str(row.method))
    for method in sorted(invalid):
        yield (
            f"INVALID FOR REPORTING: {method} reads the true labels at test time; its scores say "
            "nothing about new patients."
        )
    yield from notes
    yield from unequal_budgets(source)
    yield from told_besides(source)
    empty = int(source.results["value"].isna().sum())
    if empty:
        yield f"{empty} of {len(source.results)} values in results.csv are missing."


def _secondary(source: Source) -> Iterator[str]:
    more = [METRICS.get(name, name) for name in source.metrics if name != "dice"]
    if more:
        yield (
            f"DICE is the headline. Other scores ({', '.join(more)}) are shown beside it; with so "
            "many looks some of them differ by chance, and Holm's correction does not cover that."
        )
    if len(source.results):
        yield (
            "The numbers hold for these data, splits, rates and budgets. They do not say which "
            "method is best after tuning, or on other data."
        )
