"""Write docs/methods, a page and a picture for every registered method, and docs/systems.md.

    python docs/make_methods.py                      # all pages and pictures; about a minute
    python docs/make_methods.py drop_block dropout   # the pictures of these alone
    python docs/make_methods.py --no-pictures        # the pages alone
    python docs/make_methods.py --check              # only says whether the pages are up to date

Pages come from the docstrings and class attributes; what `method_notes.py` says beside them is
what no docstring can say, and in `systems_layers.py` what each was verified against. Pictures are
drawn anew by the same seed, and are not compared.
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
from method_notes import NOTES
from systems_page import check_systems, systems_page

from medseg_reg.regularizers import regularizer_class
from medseg_reg.regularizers.catalogue import Entry, entries

FOLDER = Path(__file__).with_name("methods")
SYSTEMS = "../systems.md"  # as seen from there

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
        raise SystemExit(f"docs/method_notes.py: NOTES names no method: {odd}")
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
