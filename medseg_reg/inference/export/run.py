"""A finished run, exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from medseg_reg.engine.network import load_run_network
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.export_formats import Format
from medseg_reg.files import replacing, require_writable
from medseg_reg.inference.export.bundle import check_bundle, write_bundle
from medseg_reg.inference.export.facts import facts_of, interface
from medseg_reg.inference.export.onnx_file import open_onnx, require_packages, write_onnx
from medseg_reg.inference.export.plan import Plan, plans_of, require_equal
from medseg_reg.inference.export.program import open_pt2, program_of, write_pt2
from medseg_reg.inference.export.script import open_script, script_of, write_script
from medseg_reg.inference.predictor import cheating_layers
from medseg_reg.networks.build import Network, usual_size
from medseg_reg.networks.reuse import coarse_of

SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torchscript": ".ts", "pt2": ".pt2"}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file, or the folder of a bundle.
        difference: the largest difference of a probability to PyTorch's.
        size: rows and columns that the network takes, or which ones in words.
        notes: what a person should know of it.
    """

    path: Path
    difference: float
    size: tuple[int, int] | str
    notes: tuple[str, ...]


def export_run(run: RunDirectory, form: Format, out: Path | None = None) -> Exported:
    """Export the trained network of a finished run, in evaluation mode, without regularizers.

    Args:
        run: a finished run.
        form: one of `medseg_reg.export_formats.FORMATS`.
        out: a file with the suffix of the format, or a folder for a bundle; by default in the
            folder `export` of the run.

    Raises:
        MedsegError: the run is not finished, `out` exists, a package is missing, or the network
            cannot be exported so that it gives what PyTorch gives. Nothing is written then.
    """
    if form == "onnx":
        require_packages()
    config = run.config()
    network = load_run_network(run)
    if (coarse := coarse_of(network)) is not None:
        coarse.show()  # what is exported holds both
    _refuse_cheating(run, network)
    target = _target(run, config.name, form, out)
    if form == "monai-bundle":
        check_bundle(run)
    image = config.data.image
    size = image.size or (usual_size(network)[0], usual_size(network)[1])
    plans = list(plans_of(network, run.data_facts().channels, size, form))
    if form == "monai-bundle" and image.size is not None:
        plans = plans[-1:]  # the bundle gives slices that size itself
    facts, notes = facts_of(run), []
    for plan, after in zip(plans, [*plans[1:], None], strict=True):
        try:
            difference = _attempt(run, network, form, plan, facts, target)
        except (MedsegError, OSError):
            raise
        except Exception as error:
            # Whatever torch says, and there is no telling what: the next plan asks for less.
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            if after is None:
                raise MedsegError(
                    f"{run.path}: the network {config.network.name} cannot be exported as {form}: "
                    f"{reason}. Nothing was written; try another --format."
                ) from error
            takes = after.takes
            takes = takes if isinstance(takes, str) else f"{takes[0]}x{takes[1]} alone"
            notes.append(
                f"this network cannot be exported as {form} for images of any size ({reason}); it "
                f"takes {takes}"
            )
            continue
        bundled = form == "monai-bundle" and image.size is not None
        return Exported(target, difference, "any" if bundled else plan.takes, tuple(notes))
    raise AssertionError("there is always a plan")


def _attempt(
    run: RunDirectory,
    network: Network,
    form: Format,
    plan: Plan,
    facts: dict[str, Any],
    target: Path,
) -> float:
    """Export by one plan; the file gets its name only if it gives what PyTorch gives."""
    if form == "monai-bundle":
        return write_bundle(run, network, plan, facts, target)
    outputs = 1 if run.config().network.head == "sigmoid" else len(facts["classes"])
    text = json.dumps({**facts, **interface(plan, outputs)}, allow_nan=False)
    with replacing(target) as temporary:
        reopen: Callable[[Path], Callable[[Tensor], Tensor]]
        if form == "torchscript":
            write_script(script_of(network, plan), temporary, text)
            reopen = open_script
        elif form == "pt2":
            write_pt2(program_of(network, plan), temporary, text)
            reopen = open_pt2
        else:
            write_onnx(program_of(network, plan), plan, temporary, text)
            reopen = open_onnx
        return require_equal(network, reopen(temporary), plan)


def _refuse_cheating(run: RunDirectory, network: Network) -> None:
    for layer in cheating_layers(network):
        raise MedsegError(
            f"{run.path}: {type(layer).__name__} of this network reads the true labels at test "
            "time (eval_mode 'true_label'), which an exported network is not given. Train with "
            "another eval_mode."
        )


def _target(run: RunDirectory, name: str, form: Format, out: Path | None) -> Path:
    suffix = SUFFIXES.get(form, "")
    target = out or run.path / "export" / f"{name}{suffix or '_bundle'}"
    if suffix and target.suffix != suffix:
        raise MedsegError(f"--out {target}: expected a name that ends in {suffix}.")
    if target.exists():
        raise MedsegError(
            f"{target}: exists and is left as it is. Delete it, or choose another place with --out."
        )
    require_writable(target.parent)
    return target
