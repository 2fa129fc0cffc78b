"""What a command takes to say its help, beside `import torch`."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from benchmarks.ratios import Row, rows_of

COMMANDS = (
    "medseg_reg.train",
    "medseg_reg.predict",
    "medseg_reg.config",
    "medseg_reg.data.verify",
    "data_prep.pancreas_ct",
)


def rows(options: argparse.Namespace) -> list[Row]:
    """Return the rows of this part for `python -m benchmarks`."""
    calls = {
        "import torch": ["-c", "import torch"],
        "import medseg_reg": ["-c", "import medseg_reg"],
        "import medseg_reg.regularizers": ["-c", "import medseg_reg.regularizers"],
    }
    calls |= {f"{command} --help": ["-m", command, "--help"] for command in COMMANDS}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(16 if options.full else 6):
        for name, words in calls.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, capture_output=True)
            if number:  # the first reads the files from the disk
                times[name].append(time.perf_counter() - start)
    return rows_of("start", times, "import torch")
