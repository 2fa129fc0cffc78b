"""What a MONAI bundle says to people."""

from __future__ import annotations

from typing import Any

README = """# {name}

{task}. Network: {network}, {spatial}. Exported by {producer}.

## Use

```bash
pip install "monai[fire,ignite,nibabel]" pillow
python -m monai.bundle run --config_file configs/inference.json \\
    --bundle_root . --dataset_dir FOLDER_OF_{what} --output_dir LABELS
```

Each {one} of the folder becomes `NAME_labels{suffix}`{grid}. Its values are the indices of the
classes: {classes}. The package it was trained with is not needed.

`models/model.ts` is TorchScript. It takes {pieces} (batch, {channels}, rows, columns) with values
from 0 to 1, {size}, and gives the probability of each class.

## Preprocessing

* Values: {scaling}. Unit: {unit}.{limits}
* Size, inside of the network: {how}.
* A file with NaN or infinite values is not refused: check yours.

## Data

{data}. Licence: {licence}. Citation: {citation}.{notes}
The hash of the split into training, validation and test is `{split}`.

## Scores

{scores}

## Check

```bash
pip install "monai[jsonschema]"
python -m monai.bundle verify_metadata --meta_file configs/metadata.json --filepath schema.json
python -m monai.bundle verify_net_in_out network_def --bundle_root . \\
    --meta_file configs/metadata.json --config_file configs/inference.json
```

The first command downloads the schema, unless the file is there already. When this was exported,
probabilities were compared with those of the trained network; a difference above {tolerance:g}
would have stopped it.

Research use. This is not a medical device.
"""

LICENSE = """The licence of these weights is for their owner to state; the export does not know it.

They were trained on {name} (licence: {licence}).
Its terms may bind what is derived from it: see docs/data_license.txt.
"""

DATA = """Data: {name}
Licence, as stated when the data were converted: {licence}
Citation: {citation}
"""


def readme(facts: dict[str, Any], task: str, volume: bool) -> str:
    """Return docs/README.md."""
    steps, data = facts["preprocessing"], facts["data"]
    limits = steps["window"] or steps["percentiles"]
    limits = f" [low, high] = {limits}." if steps["window"] else f" {limits}." if limits else ""
    size = facts["input"]["size"]
    score = facts["scores"]
    return README.format(
        name=facts["run"],
        task=task,
        network=facts["network"]["name"],
        spatial="slice by slice" if volume else "picture by picture",
        producer=facts["producer"],
        what="NIFTI" if volume else "PNG",
        one="volume" if volume else "picture",
        suffix=".nii.gz" if volume else ".png",
        grid=" on its own grid" if volume else " of its own size",
        classes=", ".join(f"{n} {name}" for n, name in enumerate(facts["classes"])),
        pieces=f"{steps['plane'] or 'axial'} slices" if volume else "pictures",
        channels=f"{steps['channels']} channel(s)",
        size=f"{size[0]}x{size[1]}" if isinstance(size, list) else "of any size",
        scaling=steps["scaling"],
        unit=steps["unit"],
        limits=limits,
        how=steps["how"],
        data=data["name"],
        licence=data["licence"],
        citation=data["citation"],
        notes="".join(f"\n* {note}" for note in data["notes"]) + "\n" * bool(data["notes"]),
        split=facts["splits_hash"],
        scores="\n".join(f"* {key}: {value}" for key, value in score.items())
        or "Not evaluated when it was exported.",
        tolerance=facts["check"]["tolerance"],
    )
