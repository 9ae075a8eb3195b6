"""Compile the resident kernel for whole cascades without a GPU and read the machine code.

NVRTC compiles (as for ``offline_cuda.py``), and the disassembler in the triton wheel reads the result. The
gates: no spills; registers and shared memory that let as many blocks run on a multiprocessor as the planner
counted on; at least as many tensor-core instructions, ldmatrix and 16-byte loads as the unrolled loops of the
plan's layers must have. Run as a program, it prints a table and fails on a gate.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import fastcascade as fc
from fastcascade.backends.gpu.resident_stage import choose_resident
from fastcascade.kernels.cuda.launch import COMPILE_OPTIONS
from fastcascade.kernels.cuda.machine import A100, H100, Machine
from fastcascade.kernels.cuda.resident import KERNEL, resident_source
from fastcascade.kernels.cuda.resident_plan import ResidentPlan
from fastcascade.kernels.cuda.resident_steps import Step
from fastcascade.kernels.cuda.resident_table import resident_table
from fastcascade.model.pooled_net import PooledNet, mirrored_pooled_net, pooled_net
from fastcascade.model.resnet import resnet9, resnet_cifar

MACHINES = {"sm_80": A100, "sm_90": H100}
REGISTER_FILE = 65_536

NETWORKS: dict[str, Callable[[], list[nn.Module]]] = {
    "ResNet-8": lambda: [resnet_cifar(8)],
    "ResNet-20": lambda: [resnet_cifar(20)],
    "ResNet-20, shortcut B": lambda: [resnet_cifar(20, shortcut="B")],
    "ResNet-20 of twice the width": lambda: [resnet_cifar(20, width=32)],
    "three ResNet-9": lambda: [resnet9(8, stem=16), resnet9(16), resnet9(32)],
    "the shipped cascade": lambda: [pooled_net(16), pooled_net(32), pooled_net(64), mirrored_pooled_net(64)],
    "GELU": lambda: [PooledNet(widths=(64, 256, 256), activation="gelu")],
}


class Code(NamedTuple):
    """The compiled kernel: registers of a thread, bytes of local memory, instructions by name."""

    registers: int
    local_bytes: int
    instructions: Counter[str]


def resident_plan(name: str, machine: Machine) -> ResidentPlan:
    """The plan of one of :data:`NETWORKS`."""
    torch.manual_seed(0)
    networks = NETWORKS[name]()
    selector = fc.MLPSelector() if len(networks) > 1 else None
    cascade = fc.Cascade(
        networks, selector, 10, (3, 32, 32), preprocess=fc.Normalize((0.5,) * 3, (0.25,) * 3)
    )
    choice = choose_resident(fc.plan(cascade), machine)
    assert choice.plan is not None, choice.reasons
    assert choice.stages == len(networks), choice.reasons
    return choice.plan


def compile_text(text: str, target: str) -> Code:
    """Compile for "sm_80" or "sm_90".

    Raises:
        RuntimeError: the compiler refused; its messages are quoted.
    """
    from cuda.bindings import nvrtc

    _, program = nvrtc.nvrtcCreateProgram(text.encode(), b"resident.cu", 0, [], [])
    options = [*COMPILE_OPTIONS, f"--gpu-architecture={target}", "--ptxas-options=-v"]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    log = b" " * nvrtc.nvrtcGetProgramLogSize(program)[1]
    nvrtc.nvrtcGetProgramLog(program, log)
    account = log.decode(errors="replace")
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"{error.name} for {target}:\n{account}")
    cubin = b" " * nvrtc.nvrtcGetCUBINSize(program)[1]
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(program)
    own = account[account.index(KERNEL) :]
    stack = re.search(r"(\d+) bytes stack frame", own)
    used = re.search(r"Used (\d+) registers", own)
    assert used is not None
    return Code(int(used[1]), int(stack[1]) if stack else 0, instructions(cubin))


def disassembler() -> Path | None:
    """nvdisasm of the triton wheel; None without triton."""
    import importlib.util

    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return path if path.exists() else None


def instructions(cubin: bytes) -> Counter[str]:
    """Names → how often, widths of memory accesses kept: "LDG.128"."""
    program = disassembler()
    if program is None:
        return Counter()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([program, "-c", file.name], check=True, capture_output=True, text=True).stdout
    found: Counter[str] = Counter()
    for line in re.finditer(r"/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", text):
        parts = line[1].split(".")
        found[parts[0] + ".128" * ("128" in parts)] += 1
    return found


def least(plan: ResidentPlan) -> Counter[str]:
    """Instructions that the loops of the plan's layers unroll to, one trip each."""
    steps: dict[str, tuple[Step, int]] = {}
    for entry in plan.entries:
        if entry.step.kind in ("conv", "stem"):
            for images in (1, entry.step.images):
                steps.setdefault(entry.step.type_name(plan.warps, images), (entry.step, images))
    total: Counter[str] = Counter()
    for step, n in steps.values():
        groups = step.groups(plan.warps)
        if step.kind == "stem":
            taps = -(-step.kernel * step.kernel // 2)
            total += Counter({"HMMA": 2 * taps * step.tiles, "LDSM": taps * step.tiles, "LDG.128": taps})
            continue
        rows = step.tiles if step.kernel < step.stride else (step.tiles - 1) * step.stride + step.kernel
        batch = step.kernel * groups
        total += Counter({"HMMA": 2 * batch * step.tiles * n, "LDSM": rows * n, "LDG.128": batch})
    return total


def failures(plan: ResidentPlan, code: Code) -> list[str]:
    """Which gates fail, in words."""
    found = []
    if code.local_bytes or code.instructions["LDL"] or code.instructions["STL"]:
        found.append(f"{code.local_bytes} bytes of local memory; none allowed")
    resident = REGISTER_FILE // (-(-code.registers // 8) * 8 * plan.threads)
    if resident < plan.blocks:
        found.append(f"{code.registers} registers let {resident} blocks run at once; {plan.blocks} wanted")
    if plan.shared_bytes > plan.machine.shared_block:
        found.append(f"{plan.shared_bytes} bytes of shared memory")
    if code.instructions:
        for name, count in least(plan).items():
            if code.instructions[name] < count:
                found.append(f"{code.instructions[name]} {name}; at least {count} expected")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", default=["sm_90"], choices=MACHINES)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    arguments = parser.parse_args()
    failed = []
    for name in arguments.networks:
        for target in arguments.targets:
            plan = resident_plan(name, MACHINES[target])
            code = compile_text(resident_source(resident_table(plan)), target)
            failed += [f"{name} on {target}: {reason}" for reason in failures(plan, code)]
            counts = " ".join(
                f"{code.instructions[k]} {k}" for k in ("HMMA", "LDSM", "LDG.128", "LDL", "STL", "BAR")
            )
            print(
                f"{name:30} {target} {plan.warps} warps × {plan.blocks} blocks, {plan.shared_bytes:7,} B, "
                f"{code.registers:3} registers, {code.local_bytes} B local, {counts}",
                flush=True,
            )
    print(*failed, sep="\n", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
