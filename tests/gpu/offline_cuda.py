"""Compile the CUDA C++ kernels without a GPU, and check registers, spills and instructions.

NVRTC and its Python bindings come from PyPI (nvidia-cuda-nvrtc, cuda-bindings) and need no driver. The gates
are those of ``offline.py``, on what the compiler itself says and on the PTX: no disassembler is needed. Run
as a program, it prints a table and fails on a gate.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
from offline import Configuration, Report, failures

from fastcascade.kernels.cuda.launch import COMPILE_OPTIONS, FILES, source

TARGETS = ("sm_80", "sm_90")


def configurations() -> dict[str, Configuration]:
    """The gates of each kernel: no spills, and 16-byte loads where rows are 16-byte words."""
    return {
        name: Configuration(name, None, {}, {}, wide_loads=name.endswith("_quad"))
        for names in FILES.values()
        for name in names
    }


def compile_cuda(text: str, target: str) -> list[Report]:
    """Compile one source for "sm_80" or "sm_90"; one report per kernel, in any order.

    ``spills`` counts four-byte words of local memory, whatever they are for.

    Raises:
        RuntimeError: the compiler refused; its messages are quoted.
    """
    from cuda.bindings import nvrtc

    def text_of(size, content) -> str:
        buffer = b" " * size(program)[1]
        content(program, buffer)
        return buffer.decode()

    _, program = nvrtc.nvrtcCreateProgram(text.encode(), b"kernels.cu", 0, [], [])
    options = [*COMPILE_OPTIONS, f"--gpu-architecture={target}", "--ptxas-options=-v"]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    log = text_of(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"{error.name} for {target}:\n{log}")
    ptx = text_of(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
    nvrtc.nvrtcDestroyProgram(program)

    bodies = dict(re.findall(r"\.entry (\w+)\((.*?)\n}", ptx, re.S))
    accounts = re.findall(r"Compiling entry function '(\w+)'(.*?)Compile time", log, re.S)
    return [_report(name, target, account, bodies[name]) for name, account in accounts]


def _report(name: str, target: str, account: str, ptx: str) -> Report:
    def number(pattern: str) -> int:
        found = re.search(pattern, account)
        return int(found[1]) if found else 0

    return Report(
        name,
        target,
        registers=number(r"Used (\d+) registers"),
        spills=number(r"(\d+) bytes stack frame") // 4,
        wide_loads=len(re.findall(r"\bld\.global\S*\.v(?:4\.\w32|2\.\w64)", ptx)),
        tensor_ops=len(re.findall(r"\bmma\.sync|\bwgmma", ptx)),
        shared_bytes=number(r"(\d+) bytes smem"),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", default=["sm_90"], choices=TARGETS)
    arguments = parser.parse_args()
    wanted, failed = configurations(), []
    for file, target in ((file, target) for file in FILES for target in arguments.targets):
        for report in compile_cuda(source(file), target):
            failed += failures(wanted[report.name], report)
            print(
                f"{report.name:24} {target:7} {report.registers:4} registers {report.spills:4} spills "
                f"{report.wide_loads:4} wide loads {report.shared_bytes:5} B shared",
                flush=True,
            )
    print(*failed, sep="\n", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
