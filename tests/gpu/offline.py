"""Compile the Triton kernels without a GPU, and check registers, spills and instructions.

Run as a program (triton must not be in interpreter mode) it compiles the shipped configurations for one
architecture or all, prints a table, and fails on a gate: local-memory traffic beyond the stated allowance,
no 16-byte loads where rows allow them, no tensor-core instruction where the kernel multiplies matrices.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TARGETS = ("sm_80", "sm_90", "gfx942")


@dataclass(frozen=True)
class Configuration:
    """One specialisation of a Triton kernel, as the library launches it.

    Attributes:
        types: type of every run-time argument, in triton's notation ("*fp16", "i32").
        constants: the tl.constexpr arguments.
        num_warps, amd_warps: of a program on NVIDIA and on AMD GPUs.
        default: compiled by ``make test`` (the others by ``make test-all``).
        wide_loads, tensor_cores: whether these must appear.
        spills: allowed local-memory instructions (NVIDIA) or spilled registers (AMD), per target.
            Some kernels spill a little at 96 or 128 registers of 255: NVIDIA's assembler chooses so.
        barriers: exactly so many stand in the source. No interpreter and no compiler sees a race when one is
            taken out; this does.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    amd_warps: int = 4
    num_stages: int = 2
    default: bool = False
    wide_loads: bool = False
    tensor_cores: bool = False
    barriers: int = 0
    spills: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Resources of a compiled kernel; ``spills`` counts local-memory instructions or spilled registers.

    ``barriers``: in the source, as the first intermediate form has them; ``machine_barriers``: in the machine
    code, where the compiler adds its own.
    """

    name: str
    target: str
    registers: int
    spills: int
    wide_loads: int
    tensor_ops: int
    shared_bytes: int
    barriers: int = 0
    machine_barriers: int = 0


def compile_triton(configuration: Configuration, target: str) -> Report:
    """Compile for "sm_80", "sm_90" or "gfx942"; no driver or device is needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = configuration.kernel
    names = kernel.arg_names
    signature = {name: configuration.types.get(name, "constexpr") for name in names}
    # Allocators align to at least 16 bytes; without this hint there are no 16-byte loads.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] == "*"}
    source = ASTSource(kernel, signature, configuration.constants, aligned)
    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target[3:]), 32)
    warps = configuration.amd_warps if amd else configuration.num_warps
    options = {"num_warps": warps, "num_stages": configuration.num_stages}
    compiled = triton.compile(source, target=gpu, options=options)
    read = _read_amd if amd else _read_nvidia
    report = read(configuration.name, target, compiled)
    own = len(re.findall(r"\b(?:gpu|ttg)\.barrier\b", compiled.asm["ttir"]))
    code = compiled.asm["amdgcn" if amd else "ptx"]
    machine = len(re.findall(r"\bs_barrier\b|\bbar(?:rier)?(?:\.cta)?\.sync\b", code))
    return dataclasses.replace(report, barriers=own, machine_barriers=machine)


def _read_amd(name: str, target: str, compiled: Any) -> Report:
    text = compiled.asm["amdgcn"]
    values = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text)}
    return Report(
        name,
        target,
        registers=values["vgpr_count"],
        spills=values["vgpr_spill_count"],
        wide_loads=len(re.findall(r"(?:global|buffer|flat)_load_dwordx4", text)),
        tensor_ops=text.count("v_mfma"),
        shared_bytes=compiled.metadata.shared,
    )


def _read_nvidia(name: str, target: str, compiled: Any) -> Report:
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    return read_cubin(name, target, compiled.asm["cubin"], tools, compiled.metadata.shared)


def read_cubin(name: str, target: str, cubin: bytes, tools: Path, shared_bytes: int = 0) -> Report:
    """Disassemble a cubin with the cuobjdump and nvdisasm in ``tools``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(*command: str) -> str:
            return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout

        usage = run(str(tools / "cuobjdump"), "-res-usage")
        listing = run(str(tools / "nvdisasm"), "-c")

    def count(pattern: str) -> int:
        return len(re.findall(pattern, listing))

    registers = re.search(r"REG:(\d+)", usage)
    assert registers, usage
    return Report(
        name,
        target,
        registers=int(registers[1]),
        spills=count(r"\bLDL\b|\bSTL\b"),
        wide_loads=count(r"\bLDG\S*\.128\b|\bLDGSTS\S*\.128\b|\bUTMALDG"),
        tensor_ops=count(r"\bHMMA\b|\bHGMMA\b|\bIMMA\b"),
        shared_bytes=shared_bytes,
    )


def failures(configuration: Configuration, report: Report) -> list[str]:
    """The gates that a report fails, in words."""
    allowed = configuration.spills.get(report.target, 0)
    found = []
    if report.spills > allowed:
        found.append(f"{report.spills} spills, {allowed} allowed")
    if configuration.wide_loads and report.wide_loads == 0:
        found.append("no 16-byte loads")
    if configuration.tensor_cores and report.tensor_ops == 0:
        found.append("no tensor-core instruction")
    if report.barriers != configuration.barriers:
        found.append(f"{report.barriers} barriers in the source, {configuration.barriers} expected")
    if report.machine_barriers < configuration.barriers:
        found.append(
            f"{report.machine_barriers} barriers in the machine code, {configuration.barriers} expected"
        )
    return [f"{report.name} on {report.target}: {reason}" for reason in found]


def configurations() -> list[Configuration]:
    """All configurations that the triton backend launches."""
    return [
        *exit_head_configurations(),
        *compact_configurations(),
        *conv_configurations(),
        *persistent_configurations(),
    ]


TABLE_TYPES = {
    "log_sum": "*fp32",
    "weight_sum": "*fp32",
    "previous_label": "*i32",
    "out_log_probs": "*fp32",
    "out_label": "*i64",
    "out_stage": "*i64",
    "threshold": "*fp32",
    **dict.fromkeys(("mean", "std", "w1", "b1", "w2", "b2"), "*fp32"),
    "stage": "i32",
    "stage_weight": "fp32",
}


def exit_constants(selector: str, num_classes: int, combine: str) -> dict[str, Any]:
    """The constants of an exit head that depend on the selector."""
    return {
        "SELECTOR": selector,
        "MEAN": combine == "mean",
        "CLASSES": num_classes,
        "FEATURES": num_classes if selector == "probs" else 4,
        "HIDDEN": 16,
        "BLOCK_HIDDEN": 16,
    }


def exit_head_configurations() -> list[Configuration]:
    from fastcascade.kernels.triton.exit_head import exit_head_kernel, exit_tile

    types = {
        **TABLE_TYPES,
        "index": "*i32",
        "count": "*i32",
        "keep": "*i8",
        "block_counts": "*i32",
    }
    cases = [("stats", 10, "last", "fp16"), ("stats", 1000, "mean", "fp16")]
    cases += [(s, 100, "last", "fp16") for s in ("topk", "max_prob", "margin", "entropy", "last")]
    cases += [("probs", c, "mean", "fp16") for c in (10, 1000)]
    cases += [("stats", c, "last", "fp16") for c in (1001, 21_841)]
    cases += [("stats", 10, "last", "fp32"), ("stats", 10, "last", "bf16")]
    return [
        Configuration(
            f"exit_head {selector} C={classes} {combine} {dtype}",
            exit_head_kernel,
            {**types, "logits": f"*{dtype}"},
            {
                **exit_constants(selector, classes, combine),
                "BLOCK_ROWS": exit_tile(classes).rows,
                "BLOCK_CLASSES": exit_tile(classes).classes,
            },
            default=(selector, classes) == ("stats", 1000),
            spills={"sm_80": 8} if (selector, classes) == ("probs", 1000) else {},
            barriers=2 if combine == "mean" else 1,
            # Rows of fp16 logits are 16-byte aligned only if the class count is a multiple of 8.
            wide_loads=classes == 1000,
        )
        for selector, classes, combine, dtype in cases
    ]


def compact_configurations() -> list[Configuration]:
    from fastcascade.kernels.triton import compact

    flags = {"count": "*i32", "flags": "*i8", "block_counts": "*i32", "out_count": "*i32"}
    lists = dict.fromkeys(("index", "out_index", "holes", "tail", "moves"), "*i32")
    bucket = dict.fromkeys(("chunk", "bucket_index", "bucket_count"), "*i32")
    words = dict.fromkeys(("rows", "source", "bucket"), "*i64")
    types = {**flags, **lists, **bucket, **words}
    row = {"ROW": 32 * 32 * 16 * 2 // 8, "BLOCK": 1024}
    cases: list[tuple[Any, dict[str, int], bool]] = [
        (compact.compact_index_kernel, {"BLOCK_ROWS": 64}, False),
        (compact.plan_holes_kernel, {"BLOCK_ROWS": 64}, False),
        (compact.move_rows_kernel, row, True),
        (compact.gather_rows_kernel, {"BUCKET": 1024, **row}, True),
    ]
    return [
        Configuration(
            f"compact {kernel.fn.__name__}",
            kernel,
            {name: types[name] for name in kernel.arg_names if name in types},
            constants,
            default=True,
            wide_loads=wide,
        )
        for kernel, constants, wide in cases
    ]


def conv_configurations() -> list[Configuration]:
    """Convolutions of CIFAR ResNets of width 16 and 64, pooling, and an elementwise layer."""
    from fastcascade.kernels import layers as la
    from fastcascade.kernels.triton.conv import conv_kernel, conv_tile
    from fastcascade.kernels.triton.elementwise import elementwise_kernel
    from fastcascade.kernels.triton.layer_launch import kind
    from fastcascade.kernels.triton.pool import pool_kernel

    def conv(name: str, work: la.Conv, dtype: str, **changes: Any) -> Configuration:
        shape = work.shape
        tile = conv_tile(shape.channels, la.padded(shape.out_channels), work.image)
        types = {
            **dict.fromkeys(("weight", "residual"), f"*{dtype}"),
            "x": "*u8" if work.image else f"*{dtype}",
            "out": "*fp32" if work.logits else f"*{dtype}",
            **dict.fromkeys(("bias", "pixel_table"), "*fp32"),
            **dict.fromkeys(("index", "count"), "*i32"),
            **dict.fromkeys(("x_image", "x_row", "x_column", "x_channel"), "i32"),
        }
        return Configuration(
            f"conv {name} {dtype}",
            conv_kernel,
            types,
            {"KIND": kind(work, byte_images=True)},
            tile.num_warps,
            tile.num_warps,
            tile.num_stages,
            wide_loads=not work.image,
            tensor_cores=dtype == "fp16",
            **changes,
        )

    def block(h: int, ci: int, co: int, stride: int = 1, k: int = 3, view: la.View | None = None) -> la.Conv:
        sizes = (h * stride, h * stride, ci, h, h, co, (k, k), (stride, stride))
        return la.Conv(la.ConvShape(*sizes, corner=(k // 2, k // 2)), view, "relu", image=ci % 16 != 0)

    whole = la.View(16, 16, 32, 32)
    shortcut = la.View(32, 32, 16, 16, step=(2, 2), before=8)
    logits = la.Conv(la.ConvShape(1, 1, 64, 1, 1, 10, (1, 1)), None, "none", logits=True)
    rows = {**dict.fromkeys(("x", "other", "out"), "*fp16"), "vectors": "*fp32", "count": "*i32"}
    maps = ((32, 32, 64), (16, 16, 64))
    window = ((2, 2), (2, 2), (0, 0, 0, 0), True)
    add = la.Elementwise(*maps, (64, 64), affine=True, other=True, activation="relu")
    return [
        conv("image 3→16", block(32, 3, 16), "fp16"),
        conv("16→16 on 32", block(32, 16, 16), "fp16"),
        conv("32→32 on 16, residual", block(16, 32, 32, view=whole), "fp16", default=True),
        conv("32→32 on 16, shortcut A", block(16, 32, 32, view=shortcut), "fp16"),
        conv("32→64 on 8, stride 2", block(8, 32, 64, 2), "fp16"),
        conv("64→64 on 8", block(8, 64, 64), "fp16"),
        conv("128→128 on 16", block(16, 128, 128), "fp16"),
        conv("256→256 on 8", block(8, 256, 256), "fp16"),
        conv("1×1 64→256 on 8", block(8, 64, 256, 1, 1), "fp16"),
        conv("logits 64→10", logits, "fp16", spills={"sm_80": 14}),
        conv("32→32 on 16, residual", block(16, 32, 32, view=whole), "fp32"),
        *(
            Configuration(
                f"pool {reduction}",
                pool_kernel,
                {k: v for k, v in rows.items() if k in pool_kernel.arg_names},
                {"KIND": kind(la.Pooling(*maps, reduction, *window))},
                default=reduction == "max",
                wide_loads=True,
            )
            for reduction in ("max", "average")
        ),
        Configuration(
            "elementwise", elementwise_kernel, rows, {"KIND": kind(add)}, default=True, wide_loads=True
        ),
    ]


def persistent_configurations() -> list[Configuration]:
    """Whole CIFAR networks, and the shortest stage with an image, a residual, a pool and logits."""
    import torch

    import fastcascade as fc
    from fastcascade.backends.gpu.layer_lowering import stage_layers
    from fastcascade.kernels.triton import persistent as p
    from fastcascade.lowering.export import plan
    from fastcascade.model.resnet import BasicBlock, Head, ResNet, resnet_cifar

    def network(name: str, module: torch.nn.Module, dtype: str = "fp16", **changes: Any) -> Configuration:
        stage = plan(fc.Cascade([module], None, 10, (3, 32, 32))).stages[0]
        stored = torch.float16 if dtype == "fp16" else torch.float32
        table = p.layer_table(stage_layers(stage, stored, torch.device("cpu")), None)
        types = {
            **dict.fromkeys(("rows", "features", "weights", "scratch"), f"*{dtype}"),
            **dict.fromkeys(("pixel_table", "logits", "vectors"), "*fp32"),
            **dict.fromkeys(("index", "count", "entries", "queue"), "*i32"),
            **dict.fromkeys(("x_image", "x_row", "x_column", "x_channel"), "i32"),
            "images": "*u8",
        }
        constants = p.constants(table, byte_images=True)
        return Configuration(
            f"persistent {name} {dtype}",
            p.persistent_kernel,
            types,
            constants,
            p.num_warps(hip=False),
            p.num_warps(hip=True),
            p.NUM_STAGES,
            barriers=1,
            wide_loads=True,
            tensor_cores=dtype == "fp16",
            **changes,
        )

    short = ResNet(torch.nn.Conv2d(3, 16, 3, padding=1), [BasicBlock(16, 16)], Head(16, 10))
    return [
        network("one block", short, default=True),
        network("ResNet-20 A", resnet_cifar(20), spills={"sm_80": 8, "gfx942": 64}),
        network("one block", short, "fp32", spills={"sm_80": 20, "sm_90": 26}),
        # Not tuned for AMD.
        network("ResNet-20 A", resnet_cifar(20), "fp32", spills={"sm_80": 18, "gfx942": 280}),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", default=["sm_90"], choices=TARGETS)
    parser.add_argument("--all", action="store_true", help="every configuration, not one per kernel")
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    parser.add_argument("--json", type=Path, help="write the reports here")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    reports, failed = [], []
    for configuration in configurations():
        if arguments.only not in configuration.name or not (configuration.default or arguments.all):
            continue
        for target in arguments.targets:
            report = compile_triton(configuration, target)
            reports.append(report)
            failed += failures(configuration, report)
            print(
                f"{report.name:44} {target:7} {report.registers:4} registers {report.spills:4} spills "
                f"{report.wide_loads:4} wide loads {report.tensor_ops:4} tensor ops "
                f"{report.shared_bytes:7} B shared",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps([dataclasses.asdict(r) for r in reports], indent=1))
    print(*failed, sep="\n", file=sys.stderr)
    return 1 if failed or not reports else 0


if __name__ == "__main__":
    sys.exit(main())
