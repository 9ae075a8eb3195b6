"""The engines of each case."""

from __future__ import annotations

from bench.cases import Case
from bench.measure import Engine
from bench.peers import PEERS
from bench.worker import OURS

__all__ = [
    "AVX2_OURS",
    "AVX2_PEER",
    "BEST_LAST",
    "BF16_PEERS",
    "FP32_PEERS",
    "LAST",
    "ONE_THREAD",
    "OURS",
    "PYTORCH",
    "engines_for",
    "left_out",
]

FP32_PEERS = tuple(peer.name for peer in PEERS if peer.counts_as_fp32)
BF16_PEERS = tuple(peer.name for peer in PEERS if not peer.counts_as_fp32)
ONE_THREAD = "fastcascade, 1 thread"
AVX2_OURS, AVX2_PEER = "fastcascade, AVX2", "OpenVINO, AVX2"
LAST = "plain eager, last network on everything"
_TUNED_LAST = ("eager channels_last", "torch.compile")
BEST_LAST = tuple(f"{name}, last network on everything" for name in _TUNED_LAST)
"""PyTorch on the last network of a cascade, for every image, at its best schedule."""

PYTORCH = ("plain eager", "eager", "eager channels_last", "torch.compile")
"""PyTorch's own fp32 engines."""
_SLOW = ("plain eager", "eager", "eager channels_last", "eager bf16", "torch.compile")
"""PyTorch's own engines, never the fastest. The standard set measures them on ResNet-20 only, and two of them
on the last network of the cascade."""
_ONE_SHAPE = "torch.compile"
"""Takes up to a minute to compile for one number of rows, so no cascade runs on it."""


def engines_for(case: Case, everyone: bool) -> list[Engine]:
    """Ours, the fast peers, and on ResNet-20 (or with ``everyone``) the slow ones too."""
    skipped = left_out(case, everyone)
    peers = [Engine(p.name, p.name, p.tolerance) for p in PEERS if p.name not in skipped]
    engines = [Engine(OURS, OURS), *peers]
    if case.is_cascade:
        last = [Engine(name, p, last_only=True) for name, p in zip(BEST_LAST, _TUNED_LAST, strict=True)]
        return [*engines, Engine(LAST, "plain eager", last_only=True), *last]
    if case.batch in (1, 256):
        engines.append(Engine(ONE_THREAD, OURS, threads=1))
    if case.batch == 256:
        engines.append(Engine(AVX2_OURS, OURS, environment={"FASTCASCADE_ISA": "avx2"}))
        engines.append(Engine(AVX2_PEER, "OpenVINO", environment={"ONEDNN_MAX_CPU_ISA": "AVX2"}))
    return engines


def left_out(case: Case, everyone: bool) -> tuple[str, ...]:
    """The peers that are not measured in this case; the results name them."""
    if case.is_cascade:
        return tuple(dict.fromkeys((*BF16_PEERS, *(() if everyone else _SLOW), _ONE_SHAPE)))
    if everyone or case.model == "resnet_cifar:20":
        return () if everyone or case.batch != 1 else (_ONE_SHAPE,)
    return _SLOW
