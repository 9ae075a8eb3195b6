"""Which engines stand against each other in which case."""

from __future__ import annotations

from bench.cases import Case
from bench.measure import Engine
from bench.peers import PEERS, Peer
from bench.worker import OURS

__all__ = ["AVX2_OURS", "AVX2_PEER", "FP32_PEERS", "LAST", "ONE_THREAD", "OURS", "engines_for"]

FP32_PEERS = tuple(peer.name for peer in PEERS if peer.counts_as_fp32)
ONE_THREAD = "fastcascade, 1 thread"
AVX2_OURS, AVX2_PEER = "fastcascade, AVX2", "OpenVINO, AVX2"
LAST = "plain eager, last network on everything"

_QUICK = ("ONNX Runtime", "OpenVINO", "OpenVINO bf16", "ncnn")
"""The peers that are ever fastest."""
_COMPILED_BATCHES = (8, 256)
"""torch.compile needs up to a minute for each network and batch, and was never the fastest."""


def engines_for(case: Case, everyone: bool) -> list[Engine]:
    """Ours, the fast peers, and on ResNet-20 (or for ``everyone``) the slow ones too."""
    if case.is_cascade:
        peers = [_engine(peer) for peer in PEERS if peer.name in _QUICK and peer.counts_as_fp32]
        return [Engine(OURS, OURS), *peers, Engine(LAST, "plain eager", last_only=True)]
    slow_too = everyone or case.model == "resnet_cifar:20"
    peers = [
        _engine(peer)
        for peer in PEERS
        if peer.name in _QUICK
        or (slow_too and (everyone or peer.name != "torch.compile" or case.batch in _COMPILED_BATCHES))
    ]
    engines = [Engine(OURS, OURS), *peers]
    if case.batch in (1, 256):
        engines.append(Engine(ONE_THREAD, OURS, threads=1))
    if case.batch == 256 and case.model in ("resnet_cifar:20", "resnet_cifar:56"):
        engines.append(Engine(AVX2_OURS, OURS, environment={"FASTCASCADE_ISA": "avx2"}))
        engines.append(Engine(AVX2_PEER, "OpenVINO", environment={"ONEDNN_MAX_CPU_ISA": "AVX2"}))
    return engines


def _engine(peer: type[Peer]) -> Engine:
    return Engine(peer.name, peer.name, peer.tolerance)
