"""Write docs/methods, a page and a picture for every registered method, and docs/systems.md.

    python docs/make_methods.py                      # all pages and pictures; about a minute
    python docs/make_methods.py drop_block dropout   # the pictures of these alone
    python docs/make_methods.py --no-pictures        # the pages alone
    python docs/make_methods.py --check              # only says whether the pages are up to date

Pages come from the docstrings and class attributes; what is said here beside them is what no
docstring can say, and in `systems.py` what each was verified against. Pictures are drawn anew by
the same seed, and are not compared.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

from docstring_markdown import Docstring, cell, inline, items, markdown, parse
from systems_page import check_systems, systems_page

from medseg_reg.regularizers import regularizer_class
from medseg_reg.regularizers.catalogue import Entry, entries

FOLDER = Path(__file__).with_name("methods")
SYSTEMS = "../systems.md"  # as seen from there

SELECTIVITY = """\
![Drop frequency against correlation](corrdrop_selectivity.png)

How often a unit is dropped, against its mean correlation with the others: on a synthetic map of
which one half is correlated, and on a map of a trained network. The published rule
(`faithful=True`) is nearly flat; the default drops what correlates little."""

NOTES = {
    "corrdrop_channel": SELECTIVITY,
    "corrdrop_spatial": f"""\
{SELECTIVITY}

On the trained map the blocks of highest correlation are the empty background, which is alike
everywhere: at p = 0.25 the default drops a block of the body in 39 % of the passes and an empty one
in 7 % (the published rule both in 25 %). So the default takes more of what matters than p says; for
images with much background choose p with that in mind.

CorrDrop was published between convolution and normalization in the deeper stages of residual
networks. In a U-Net `after_block` of the deeper levels is nearest.

The published rate also rises over the first 200 calls of the layer, not epochs; here a schedule
does that.""",
    "drop_head": """\
```yaml
regularization:
  architecture:
    - {name: drop_head, p: 0.2, schedule: {name: v_shape, turn: 0.1}}
```

is Scheduled DropHead: the rate falls from 0.2 to 0 in the first tenth of the training, which should
be that of the learning rate's warm-up, and rises to 0.2 until the end. That `turn` is the warm-up,
and that both ends are equal, is known from summaries of the paper alone.""",
    "drop_key": """\
The published rate falls with the depth and ends with a few epochs without. A ramp over the places
does the first:

```yaml
regularization:
  architecture:
    - {name: drop_key, p: 0.1, depth_ramp: {first: 1.0, last: 0.0}}
```

Random numbers for every weight cost something where the weights are many: the training step of a
ViT (6 blocks of width 192, 196 patches, batch 4, one CPU core) took 1.3 times as long.

Where an attention is fused, as in timm's ViT, its weights are never computed; the layer then hides
the same keys by a mask. See [attention](../insertion.md#attention).""",
    "drop_path": """\
In a transformer, `residual` names the branches of its blocks too: two a block, or one layer for
both where the network has one module for both. Timm, segmentation-models-pytorch and MONAI's
SwinUNETR have a `drop_path_rate` of their own; where it is not 0, both rates act, and the report of
`insert` says so. MONAI's ViT and UNETR have none.""",
    "dropout": """\
Neighbouring pixels of a map are alike, so dropping single elements takes little information away.
Dropping channels ([spatial_dropout](spatial_dropout.md)) or blocks takes more.""",
    "guided_key_dropout": """\
Compare it with `beta: 0`, with [drop_key](drop_key.md) and with no dropout, over equal seeds; and
several `beta` at equal p as well as at an equal share of the attention dropped, which is
`(guided_rates(u, p, beta) * u).mean()`. On scores u of a log-normal distribution (standard
deviation of the logarithm 1.5, 196 tokens, p = 0.2, p_max = 0.9) that share is 0.03, 0.20, 0.63 and
0.67 for beta -1, 0, 1 and 2.

The attention of an untrained network is even, so a rate that rises with it is a natural schedule:

```yaml
regularization:
  architecture:
    - {name: guided_key_dropout, p: 0.2, beta: -1, schedule: {name: linear, duration: 0.3}}
```

No scores are learned. What helps, and whether anything does, is open: no result was published.

Timm's ViT and the DPT of segmentation-models-pytorch have a fused attention, whose weights are
never computed; the error says how to take it apart. It saves no time: all tokens are computed.""",
    "guided_residual_dropout": """\
It goes into MONAI's ViT and UNETR and, with an attention that is not fused, timm's ViT and DPT. In
the windows of a Swin transformer, and over the reduced keys of Segformer, tokens of a block get no
attention of their own: there [guided_key_dropout](guided_key_dropout.md) is the way.

The layer is a child of the module that hands the weights on, so no block is wrapped and no weight
changes its name.""",
    "gating_dropout": """\
```yaml
network:
  name: monai.UNETR
  img_size: 96
  experts: {count: 4, exchange: true}
regularization:
  architecture:
    - {name: gating_dropout, p: 0.3}
```

Checked with two processes over gloo: both toss the same coins; a step that takes part makes no
all-to-all where the others make three there and two back; answers and gradients with the exchange
are those without it. The exchange costs time and saves no memory, because every process holds all
weights: it is for those who want to measure what the paper measured.

The picture above shows the layer on a map that is not one of gates, with one sample and two virtual
machines; in a network it goes to `routing` alone.""",
    "heuristic_dropout": """\
At usual scales of a map the term k / V decides, and the entropy hardly counts. The table of the
paper agrees with k = 2, the value fixed in its code; its text finds 3 slightly better on average.

The method expects rectified maps: `between_convs` or `after_block`.""",
    "patch_dropout": """\
It goes into MONAI's ViT and UNETR, timm's ViT and the DPT of segmentation-models-pytorch: networks
whose blocks get the same tokens one after the other. The windows of a Swin transformer and the
reduced keys of Segformer cannot leave tokens out one by one. Timm's own `patch_drop_rate` gives
wrong maps in a network for segmentation, and `insert` refuses it.

An attention over N tokens of width d takes 2 N^2 d + 4 N d^2 multiplications, and the tests count
exactly that with k for N. At the sizes of medical slices the second term prevails, so the savings
are nearly proportional to p: a training step of a ViT (6 blocks of width 192, 196 patches, batch 4,
one CPU core) took 0.76 of its time at p = 0.25 and 0.51 at p = 0.5, where the formula says 0.72 and
0.46 for the blocks alone. UNETR's first encoder sees the image itself, so the network is never
blind at a dropped patch.

In a decoder with batch normalization, as that of DPT, mask tokens shift the statistics that
evaluation uses.

With `vary` the number of tokens changes from pass to pass, which breaks the graph of
`torch.compile`.""",
    "token_merging": """\
```python
import torch
from monai.networks.nets import UNETR

from medseg_reg.insertion import insert

network = UNETR(
    1, 2, (64, 64), feature_size=4, hidden_size=24, mlp_dim=48, num_heads=3, spatial_dims=2
)
example = torch.rand(1, 1, 64, 64)
insert(network, "token_merging", "tokens", example=example, p=0.25, in_evaluation=True)
assert network.eval()(example).shape == (1, 2, 64, 64)
```

By default a regularizer, for training alone. With `in_evaluation=True` it makes a trained network
faster, also one that was trained without: build it, load its weights, insert. What that costs in
accuracy is to be measured on your data.

It goes where [patch_dropout](patch_dropout.md) goes: MONAI's ViT and UNETR, timm's ViT and the DPT
of segmentation-models-pytorch. The windows of a Swin transformer, the reduced keys of Segformer,
and blocks that get positions or need the whole grid are refused when the layer is placed; so is a
fused attention that takes no mask, unless `proportional=False`. A network takes one layer that
changes the number of its tokens.

The weights of a group in the attention are changed behind the softmax, or by timm's `attn_mask`;
that equal tokens may be merged without any change is tested to 1e-5.

Attention and MLP then take the operations of N - r tokens, which the tests count. Matching takes
about N^2 C / 4 multiplications more, and sorting: it pays for many tokens and wide blocks. Over
the time without, in one run on one core of a busy CPU (`python -m benchmarks.tokens`, a ViT of 6
blocks of width 192, batch 4):

| | 196 patches | 1024 patches |
|---|---|---|
| training step, p = 0.25 | 0.81 | 0.72 |
| training step, p = 0.5 | 0.54 | 0.37 |
| evaluation, p = 0.25 | 1.0 | 0.9 |
| evaluation, p = 0.5 | 0.73 | 0.56 |

Networks that do the same work came out between 0.9 and 1.07 there, so no second digit of these
counts.""",
    "tree_dropout": """\
![Errors over the training for 4, 16 and 64 experts](../tree_dropout.png)

The regression of the paper in the small: solid the error on new points, dashed that on the 40
points trained on (`python benchmarks/tree_dropout.py`).
With 64 experts the error on new points ends at 0.30 without dropout, and at 0.16 with p = 0.05 or
0.1, where the noise alone makes 0.09. The smallest error on the way, 0.14, is reached without it:
early stopping would do as well. With 4 experts dropout does harm, 0.32 against 0.21: a small tree
needs all of its leaves.

The picture above shows the layer on a map that is not one of gates; in a network it goes to
`tree_gates` alone.""",
    "input_dropout": """\
The paper's erosion and Canny edges are options of the [converters](../data.md).""",
}
"""What is worth knowing beside the docstring, by name of the method."""

INDEX = """\
# Methods

Every layer by the name that configurations, MONAI's factory and `build` know it by. What all of
them have in common, and where they go in a network, is in [regularizers](../regularizers.md).

```bash
python -m medseg_reg.regularizers                      # this list
python -m medseg_reg.regularizers heuristic_dropout    # arguments and docstring of one
```

{table}

`p` is the default of the first argument; "random" says whether two training passes differ enough
for MC-dropout.

The pictures on the pages show one training pass through the layer, on a map of a small U-Net that
was trained for half a minute on the generated phantom: no patient's image. All 16 channels of the
map are shown; p and the measured rate stand below. Of twenty draws the one whose rate is nearest to
p, but not 0, is shown. Pages and pictures are written by `docs/make_methods.py`.
"""


def pages() -> dict[str, str]:
    """Return the text of every page by file name.

    Raises:
        SystemExit: a note names no method.
    """
    found = [one for one in entries() if not one.plugin]
    names = {one.name for one in found}
    if not NOTES.keys() <= names:
        odd = ", ".join(sorted(NOTES.keys() - names))
        raise SystemExit(f"docs/make_methods.py: NOTES names no method: {odd}")
    links = {one.class_name: f"{one.name}.md" for one in found}
    for one in found:
        links |= {name: f"{one.name}.md#{name}" for name in _functions(one, found)}
    texts = {f"{one.name}.md": _page(one, found, links) for one in found}
    table = _table(found, links)
    return {"index.md": INDEX.format(table=table), SYSTEMS: systems_page(found), **texts}


def _table(found: Sequence[Entry], links: dict[str, str]) -> str:
    lines = [
        "| method | effect | random | p | default place | paper |",
        "|---|---|---|---|---|---|",
    ]
    for one in found:
        effect = cell(inline(one.summary, {}))
        places = ", ".join(f"`{place}`" for place in one.default_places)
        random = "yes" if one.stochastic else "no"
        lines.append(
            f"| [{one.name}]({one.name}.md) | {effect} | {random} | {one.parameters[0].default} "
            f"| {places} | {cell(one.paper)} |"
        )
    return "\n".join(lines)


def _page(one: Entry, found: Sequence[Entry], links: dict[str, str]) -> str:
    cls = regularizer_class(one.name)
    text = parse(cls)
    links = {name: link for name, link in links.items() if name != one.class_name}
    random = "yes" if one.stochastic else "no, by default: MC-dropout sees one network"
    facts = {
        "in a configuration": f"`{one.name}`",
        "in Python": f"`from medseg_reg.regularizers import {one.class_name}`",
        "drops": one.unit,
        "random": random,
        "spatial axes": ", ".join(map(str, one.spatial_dims)),
        "default places": ", ".join(f"`{place}`" for place in one.default_places),
        "needs": one.needs or "nothing beside its input",
        "paper": one.paper,
    }
    parts = [
        f"# {one.class_name}",
        markdown(text.summary, links),
        "| | |\n|---|---|\n" + "\n".join(f"| {k} | {cell(v)} |" for k, v in facts.items()),
        f"![A feature map before and after {one.class_name}]({one.name}.png)",
        "## What it does",
        *(markdown(part, links) for part in text.body),
    ]
    if one.name in NOTES:
        parts += ["## Worth knowing", NOTES[one.name]]
    parts += _sections(text, cls, "##", links)
    functions = _functions(one, found)
    if functions:
        parts.append("## Functions")
        for name, function in functions.items():
            mine = {k: v for k, v in links.items() if k != name}
            described = parse(function)
            parts += [f"### {name}", f"```py\n{_signature(name, function)}\n```"]
            parts += [markdown(part, mine) for part in (described.summary, *described.body)]
            parts += _sections(described, function, "####", mine)
    parts.append(f"Written by `docs/make_methods.py` from `{_path(cls)}`.")
    return "\n\n".join(parts) + "\n"


def _sections(
    text: Docstring, documented: Callable[..., object], level: str, links: dict[str, str]
) -> Iterator[str]:
    """Yield the sections of a docstring, each with its heading."""
    arguments = items(text.sections.get("Args", ""))
    if "Args" in text.sections:
        given = inspect.signature(documented).parameters
        yield f"{level} Arguments"
        rows = ["| argument | default | meaning |", "|---|---|---|"]
        for name, meaning in arguments.items():
            default = given[name].default if name in given else inspect.Parameter.empty
            shown = "" if default is inspect.Parameter.empty else f"`{default!r}`"
            rows.append(f"| `{name}` | {shown} | {cell(inline(meaning, links))} |")
        yield "\n".join(rows)
    if "Attributes" in text.sections:
        yield f"{level} Attributes"
        listed = items(text.sections["Attributes"]).items()
        rows = [f"| `{name}` | {cell(inline(meaning, links))} |" for name, meaning in listed]
        yield "\n".join(["| attribute | meaning |", "|---|---|", *rows])
    for title, heading in (("Returns", "Returns"), ("Shapes", "Shapes"), ("Raises", "Errors")):
        if title in text.sections:
            yield f"{level} {heading}"
            body = text.sections[title]
            if title == "Raises":
                body = "\n".join(f"* ``{k}``: {v}" for k, v in items(body).items())
            for part in body.split("\n\n"):
                yield markdown(part, links)
    if "Paper" in text.sections:
        yield f"{level} Paper, and what differs from it"
        for part in text.sections["Paper"].split("\n\n"):
            yield markdown(part, links)
    if "Example" in text.sections:
        yield f"{level} Example"
        yield f"```pycon\n{text.sections['Example']}\n```"


def _functions(one: Entry, found: Sequence[Entry]) -> dict[str, Callable[..., object]]:
    """Return the public functions of a method's module that are described on its page.

    Of several methods in one module, the page is that of the function's own name, else of the
    first class that mentions it, else of the first class.
    """
    module = sys.modules[one.module]
    public = {
        name: getattr(module, name)
        for name in getattr(module, "__all__", ())
        if inspect.isfunction(getattr(module, name))
    }
    beside = sorted((e for e in found if e.module == one.module), key=lambda e: _line(e.name))

    def page_of(name: str) -> str:
        own = [e.name for e in beside if e.name == name]
        told = [e.name for e in beside if f"`{name}`" in (regularizer_class(e.name).__doc__ or "")]
        return (own or told or [beside[0].name])[0]

    return {name: function for name, function in public.items() if page_of(name) == one.name}


@functools.cache
def _line(name: str) -> int:
    return inspect.getsourcelines(regularizer_class(name))[1]


def _signature(name: str, function: Callable[..., object]) -> str:
    """Return the signature as written, on one line if that is short enough."""
    given = inspect.signature(function)
    text = f"{name}{given}".replace("'", "")
    if len(text) <= 88:
        return text
    lines, keyword = [], False
    for one in given.parameters.values():
        if one.kind is one.KEYWORD_ONLY and not keyword:
            lines.append("*")
            keyword = True
        lines.append(str(one).replace("'", ""))
    returned = str(given.return_annotation).replace("'", "")
    return f"{name}(\n" + "".join(f"    {line},\n" for line in lines) + f") -> {returned}"


def _path(cls: type) -> str:
    return cls.__module__.replace(".", "/") + ".py"


def check(wanted: dict[str, str]) -> None:
    """Compare the pages with what would be written.

    Raises:
        SystemExit: names the pages that differ, are missing or belong to no method.
    """
    there = {path.name for path in FOLDER.glob("*.md")}
    there |= {SYSTEMS} if (FOLDER / SYSTEMS).is_file() else set()
    odd = {name for name, text in wanted.items() if name not in there or _read(name) != text}
    odd |= there - wanted.keys()
    odd |= {f"{name[:-3]}.png" for name in wanted if name not in ("index.md", SYSTEMS)} - {
        path.name for path in FOLDER.glob("*.png")
    }
    if odd:
        raise SystemExit(
            f"{FOLDER}: out of date or missing: {', '.join(sorted(odd))}; "
            "run python docs/make_methods.py"
        )


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _pictures() -> ModuleType:
    import method_pictures  # it needs the whole package; the pages do not

    return method_pictures


def main(arguments: Sequence[str]) -> None:
    """Write pages and pictures, or check the pages."""
    parser = argparse.ArgumentParser(prog="python docs/make_methods.py", description=__doc__)
    parser.add_argument("names", nargs="*", help="draw the pictures of these methods alone")
    parser.add_argument("--no-pictures", action="store_true", help="write the pages alone")
    parser.add_argument("--check", action="store_true", help="say whether pages are up to date")
    options = parser.parse_args(arguments)
    wanted = pages()
    if options.check:
        check_systems([one for one in entries() if not one.plugin])
        return check(wanted)
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*.md"):
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    if not options.no_pictures:
        found = [one for one in entries() if f"{one.name}.md" in wanted]
        chosen = [one for one in found if one.name in options.names or not options.names]
        _pictures().draw_all(chosen, FOLDER)
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
