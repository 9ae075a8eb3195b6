"""Whether the device tests ran, which an exit status of 0 does not say: skipped tests pass too.

``python tests/helpers/ran.py report.xml`` checks a run on a GPU; ``tests/gpu/test_interpreter.py`` checks its
own processes.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

QUICK = {
    "test_compact": 30,
    "test_exit_head": 60,
    "test_layer_stages": 55,
    "test_persistent": 27,
    "test_triton_backend": 30,
}
"""The least number of quick tests that must pass, by file of ``tests/gpu/device``."""
SLOW = {"test_exit_head": 6, "test_triton_backend": 12}
NVIDIA = {"test_resident_device": 20}
"""The same for the files that need an NVIDIA GPU; Triton's interpreter does not run their kernel."""


def shortfall(report: Path, least: Mapping[str, int]) -> list[str]:
    """What a JUnit report lacks, in words: files with too few passed tests, and skips in those files."""
    passed: Counter[str] = Counter()
    complaints = []
    for case in ElementTree.parse(report).iter("testcase"):
        file = (case.get("classname") or case.get("name") or "").rpartition(".")[2]
        skipped = case.find("skipped")
        if skipped is not None and file in least:
            complaints.append(f"{file}::{case.get('name')} was skipped: {skipped.get('message')}")
        passed[file] += len(case) == 0 or all(part.tag.startswith("system-") for part in case)
    complaints += [
        f"{file}: {passed[file]} of at least {n} passed" for file, n in least.items() if passed[file] < n
    ]
    return complaints


if __name__ == "__main__":
    import torch

    least = Counter(QUICK) + Counter(SLOW) + Counter({} if torch.version.hip else NVIDIA)
    sys.exit("\n".join(shortfall(Path(sys.argv[1]), least)) or 0)
