"""The expressions of a bundle are read as Python reads them, and code of another kind is found."""

from __future__ import annotations

import pytest

from tests.inference.bundles import require_harmless

HARMFUL = (
    "$import os",
    "$import glob, os",
    "$__import__('os').system('true')",
    "$open('x', 'w')",
    "$eval('1')",
    "$torch.load('x')",
    "$torch.hub.load('owner/name', 'network')",
    "$torch.jit.load(@bundle_root + '/../other.ts')",
    "$glob.os.system('true')",
    "$list.__subclasses__",
    "$[i for i in ().__class__.__bases__]",
    "$[print(i) for i in @datalist]",
    "$[i for i in @datalist if print(i)]",
    "$@evaluator.run(@evaluator.other())",
    "$@network.to(@device)",
    "$f'{open(1)}'",
    "$(lambda image: open(image))('x')",
    "$lambda image: image.save('x')",
    "$lambda image=open('x'): image.convert('L')",
    "$(glob := open)('x')",
    "$[glob for glob in @datalist]",
)


@pytest.mark.parametrize("expression", HARMFUL)
def test_an_expression_that_runs_other_code_is_found(expression: str) -> None:
    with pytest.raises((AssertionError, SyntaxError)):
        require_harmless(expression)
