"""Turn a Google docstring into Markdown that renders on GitHub; used by make_methods.py."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field

SECTION = re.compile(r"^(Args|Attributes|Returns|Shapes|Raises|Paper|Example|Examples):$")
CODE = re.compile(r"``(.+?)``|`(.+?)`", re.DOTALL)
BOLD = re.compile(r"\*\*\w[^*]*\*\*")
CALL = re.compile(r"\b[A-Za-z_]\w*\((?:[^()]|\([^()]*\))*\)")
SHAPE = re.compile(r"\(B,[^()]*\)")
PRODUCT = re.compile(r"(?<![\w*])\w+(?:\*\w+)+")
LEFT_SIDE = re.compile(
    r"(?<![\w\])])(?:\w*_\w+ (?:[*/+-] )?)*\w+(?:\[[^\]]*\])?(?:\([^()]*\))? = (?=\S)"
)
TOKEN = re.compile(r"\s*(\d*\.?\d+(?:e-?\d+)?|[A-Za-z_]\w*|[-+*/^|<>=~]+|\S)")
PHRASE = re.compile(r"(?:[^.,;:(]|\([^()]*\)|[.,](?=\d))+")
WORDS = {"is", "of", "in", "at", "by", "to", "or", "if", "as", "an", "on", "it", "no", "so", "we"}
FUNCTIONS = {"exp", "ln", "log", "sqrt", "tanh", "sign", "inf", "lambda", "gamma", "alpha", "mask"}
REDUCTIONS = {"sum", "mean", "max", "min", "std"}


@dataclass
class Docstring:
    """The parts of a docstring.

    Attributes:
        summary: its first line.
        body: the paragraphs after it, one string each, lines kept.
        sections: text of the sections, by title, without the indentation.
    """

    summary: str
    body: list[str] = field(default_factory=list)
    sections: dict[str, str] = field(default_factory=dict)


def parse(documented: object) -> Docstring:
    """Split the docstring of a class or function."""
    lines = (inspect.getdoc(documented) or "").splitlines()
    found = Docstring(lines[0] if lines else "")
    title, free = "", []
    for line in lines[1:]:
        match = SECTION.match(line)
        if match:
            title = match[1].removesuffix("s") if match[1] == "Examples" else match[1]
            found.sections[title] = ""
        elif title and (line.startswith(" ") or not line):
            found.sections[title] += f"{line}\n"
        else:
            title = ""
            free.append(line)
    found.sections = {k: textwrap.dedent(v).strip("\n") for k, v in found.sections.items()}
    found.body = [part for part in "\n".join(free).strip("\n").split("\n\n") if part.strip()]
    return found


def items(text: str) -> dict[str, str]:
    """Read `name: text` entries with indented continuation lines."""
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", text):
        name, _, meaning = entry.partition(":")
        found[name.strip()] = " ".join(meaning.split())
    return found


def markdown(paragraph: str, links: Mapping[str, str] | None = None) -> str:
    """Return a paragraph, a list or an indented block in Markdown, lines of at most 100."""
    lines = paragraph.splitlines()
    if all(line.startswith("    ") for line in lines) or lines[0].startswith("==="):
        return "```text\n" + textwrap.dedent(paragraph) + "\n```"
    if re.match(r"[*-] ", lines[0]):
        entries = re.split(r"\n(?=[*-] )", paragraph)
        return "\n".join(_fill(inline(" ".join(e[2:].split()), links), "* ") for e in entries)
    return _fill(inline(" ".join(paragraph.split()), links))


def inline(text: str, links: Mapping[str, str] | None = None) -> str:
    r"""Return running text in Markdown: code and equations in backticks, names linked.

    >>> inline("y = x * m / (1 - p), with the ``p*C`` of `Dropout`; a * b", {"Dropout": "d.md"})
    '`y = x * m / (1 - p)`, with the `p*C` of [`Dropout`](d.md); a \\* b'
    """
    done, place = [], 0
    for match in CODE.finditer(text):
        done.append(_equations(text[place : match.start()]))
        code = match[1] or match[2]
        link = (links or {}).get(code) if match[2] else None
        done.append(f"[`{code}`]({link})" if link else f"`{code}`")
        place = match.end()
    return "".join([*done, _equations(text[place:])])


def cell(text: str) -> str:
    """Make Markdown fit for a cell of a table."""
    return text.replace("|", "\\|")


def _equations(text: str) -> str:
    match = LEFT_SIDE.search(text)
    if match:
        end = _end_of_equation(text, match.end())
        if end > match.end():
            before, equation = text[: match.start()], text[match.start() : end]
            return f"{_terms(before)}`{equation}`{_equations(text[end:])}"
        return _terms(text[: match.end()]) + _equations(text[match.end() :])
    return _terms(text)


def _terms(text: str) -> str:
    """Put calls, shapes and products in backticks, keep what is bold, and escape the rest."""
    for pattern, mark in ((BOLD, ""), (SHAPE, "`"), (CALL, "`"), (PRODUCT, "`")):
        match = pattern.search(text)
        if match:
            before, after = text[: match.start()], text[match.end() :]
            return f"{_terms(before)}{mark}{match[0]}{mark}{_terms(after)}"
    return re.sub(r"([*<\\]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def _end_of_equation(text: str, start: int) -> int:
    """Return where an equation ends whose right side begins at `start`; `start` if none does."""
    depth, place, end, operand = 0, start, start, False
    while match := TOKEN.match(text, place):
        part, after = match[1], text[match.end() :]
        if part in "([{":
            depth += 1
        elif part in ")]}":
            depth -= 1
            if depth < 0:
                break
        elif depth == 0:
            stop = part in ",;:" or (part == "." and not match[0][0].isspace())
            if stop or (part[0].isalpha() and not _is_operand(part, after, operand)):
                break
            phrase = PHRASE.match(after) if part in REDUCTIONS else None
            if phrase and not after.startswith(("(", "[")):  # "mean of x over the channels"
                return match.end() + phrase.end()
        place = match.end()
        operand = part[-1].isalnum() or part in ")]}|"
        if depth == 0 and operand:
            end = place
    return end


def _is_operand(part: str, after: str, second: bool) -> bool:
    """Whether a word belongs to the equation, or is where the sentence goes on."""
    if part in WORDS or (part == "a" and re.match(r" [a-z]{2}", after)):
        return False
    if re.search(r"[\d_]", part) or part in FUNCTIONS | REDUCTIONS:
        return True
    if re.match(r"(?: \w+){0,2} [*/+] ", after):  # "channel mask * position mask"
        return True
    return not second and (len(part) <= 2 or after[:1] in ("(", "["))


def _fill(text: str, bullet: str = "") -> str:
    """Wrap at 100, but never so that a line begins like a list, a heading or a quotation."""
    width, indent = 100, " " * len(bullet)
    lines: list[str] = []
    for line in textwrap.wrap(
        text, width - len(bullet), break_long_words=False, break_on_hyphens=False
    ):
        while lines and re.match(r"([-+*#>=|]|\d+[.)])", line):
            lines[-1], _, word = lines[-1].rpartition(" ")
            line = f"{word} {line}"
        lines.append(line)
    return "\n".join((bullet if not i else indent) + line for i, line in enumerate(lines))
