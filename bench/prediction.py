"""Speed and memory of prediction over large sets: ``python -m bench.prediction arrays|photos|memory|ray``.

- *arrays*: the whole pipeline on an npz file of 32 × 32 images, beside the engine alone on the same images.
- *photos*: a folder of JPEG files, beside the same job written plainly: a DataLoader, Pillow, the largest
  network.
- *memory*: resident memory over a million images, in an npz, an npy and a Parquet file (``--kinds``).
- *ray*: a run into a folder on a Ray cluster of this machine, with one and two workers, beside a local run.

Every contestant runs in turns, and labels are compared before times are printed.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import fastcascade as fc
from fastcascade.data.sources import load_inputs
from fastcascade.model.cost import eval_mode
from fastcascade.prediction.inputs import MAX_BATCH_ROWS
from fastcascade.prediction.pipeline import Waits
from fastcascade.prediction.runs import RunOptions, Tally, predict_to_folder

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "cifar10"
ROUNDS = 3


def arrays(folder: Path, n: int, points: list[str]) -> None:
    """The pipeline beside the engine, on the example's images repeated to n."""
    images = np.load(EXAMPLE / "test-images.npz")["images"]
    images = np.ascontiguousarray(np.resize(images, (n, *images.shape[1:])))
    np.savez(folder / "x.npz", images=images)
    model = fc.compile(EXAMPLE / "model")
    data = load_inputs(folder / "x.npz", model.plan.input.shape)
    for point in points:
        labels: dict[str, Any] = {}

        def engine(point: str = point, labels: dict[str, Any] = labels) -> None:
            parts = [model(images[i : i + MAX_BATCH_ROWS], point) for i in range(0, n, MAX_BATCH_ROWS)]
            labels["engine"] = np.concatenate([part.label for part in parts])

        def pipeline(point: str = point, labels: dict[str, Any] = labels) -> None:
            with tempfile.TemporaryDirectory(dir=folder) as out:
                predict_to_folder(model, data, out, point)
                labels["pipeline"] = _labels(Path(out))

        seconds = _race({"engine": engine, "pipeline": pipeline})
        assert (labels["engine"] == labels["pipeline"]).all()
        share = statistics.median(e / p for e, p in zip(*seconds.values(), strict=True))
        print(f"{point}: {_rates(seconds, n)}; pipeline at {share:.1%} of the engine")


class Photos(Dataset[Any]):
    """JPEG files as people usually read them."""

    def __init__(self, paths: list[Path], size: tuple[int, int]) -> None:
        self.paths = paths
        self.size = size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        image = Image.open(self.paths[i]).convert("RGB").resize(self.size, Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def photos(folder: Path, n: int, side: int) -> None:
    """A folder of JPEGs: this library, and a DataLoader with the largest network on every image."""
    images = np.load(EXAMPLE / "test-images.npz")["images"]
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    paths = [folder / "photos" / f"{i:06d}.jpg" for i in range(n)]
    for i, path in enumerate(paths):
        large = Image.fromarray(images[i % len(images)]).resize(
            (side * 4 // 3, side), Image.Resampling.BICUBIC
        )
        noise = rng.integers(-8, 9, (side, side * 4 // 3, 3))
        Image.fromarray((np.asarray(large) + noise).clip(0, 255).astype(np.uint8)).save(path, quality=90)
    cascade = fc.load(EXAMPLE / "model")
    model = fc.compile(EXAMPLE / "model")
    alone = fc.Cascade(
        [cascade.stage(-1)],
        None,
        cascade.num_classes,
        cascade.input.shape,
        preprocess=cascade.input.preprocess,
    )
    limits = []

    def plainly() -> None:
        loader = DataLoader(Photos(paths, (32, 32)), batch_size=256, num_workers=os.cpu_count() or 1)
        with torch.inference_mode(), eval_mode(alone):
            for batch in loader:
                alone(batch)

    def cascade_run() -> None:
        waits = Waits()

        def keep(_: Tally, running: Waits) -> None:
            nonlocal waits
            waits = running

        data = load_inputs(folder / "photos", model.plan.input.shape)
        with tempfile.TemporaryDirectory(dir=folder) as out:
            predict_to_folder(model, data, out, "default", RunOptions(), started=keep)
        limits.append(waits.limit())

    seconds = _race({"plainly": plainly, "fastcascade": cascade_run})
    ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
    size = sum(path.stat().st_size for path in paths) / n / 1024
    print(f"{n:,} JPEGs of {side * 4 // 3} × {side}, {size:.0f} KiB each: {_rates(seconds, n)}; {ratio:.2f}×")
    print(f"limited by {limits[-1]}")


def memory(folder: Path, n: int, kinds: list[str]) -> None:
    """Resident memory while n tiny images are classified by a linear model."""
    torch.manual_seed(0)
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
    preprocess = fc.Normalize((0.5,) * 3, (0.25,) * 3)
    model = fc.compile(fc.Cascade([linear], None, 10, (3, 32, 32), preprocess=preprocess))
    for name in (f"x.{kind}" for kind in kinds):
        _WRITERS[name](folder / name, n)
        data = load_inputs(folder / name, (3, 32, 32))
        seen: list[int] = []

        def watch(_: Tally, seen: list[int] = seen) -> None:
            seen.append(_resident_bytes())

        start = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=folder) as out:
            predict_to_folder(model, data, out, watch=watch)
        tenths = [max(seen[i * len(seen) // 10 : (i + 1) * len(seen) // 10]) / 2**20 for i in range(10)]
        seconds, growth = time.perf_counter() - start, tenths[-1] / tenths[1] - 1
        print(f"{name}: {n:,} images in {seconds:.0f} s; MiB resident, highest in each tenth of the run:")
        print(f"  {' '.join(f'{mib:.0f}' for mib in tenths)}; the last over the second {growth:+.1%}")


def on_ray(folder: Path, n: int) -> None:
    """A local run, and the same on Ray with one and two workers, each of one thread.

    Workers take seconds to start, so the time per image is counted from the first part to the last.
    """
    import ray

    images = np.load(EXAMPLE / "test-images.npz")["images"]
    np.save(folder / "x.npy", np.ascontiguousarray(np.resize(images, (n, *images.shape[1:]))))
    model = fc.compile(EXAMPLE / "model", threads=1)
    source = fc.ray.Images(str(folder / "x.npy"), model.plan.input.shape)
    options = RunOptions(rows_per_file=4096)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    labels = []
    for workers, name in enumerate(("local, one thread", "Ray, one worker", "Ray, two workers")):
        seen: list[tuple[float, int]] = []

        def watch(counted: Tally, seen: list[tuple[float, int]] = seen) -> None:
            seen.append((time.perf_counter(), counted.rows))

        start = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=folder) as out:
            if workers:
                fc.ray.predict_to_folder(model, source, out, "fast", options, None, watch, workers=workers)
            else:
                predict_to_folder(model, source.load(), out, "fast", options, None, watch)
            labels.append(_labels(Path(out)))
        (first, rows), (last, _) = seen[0], seen[-1]
        per_image = (last - first) / (n - rows)
        print(f"{name}: {1e6 * per_image:.1f} µs per image; the first part after {first - start:.1f} s")
    assert all((found == labels[0]).all() for found in labels)
    ray.shutdown()


def _write_npy(path: Path, n: int) -> None:
    images = np.lib.format.open_memmap(path, "w+", np.uint8, (n, 32, 32, 3))  # sparse: zeros
    del images


def _write_npz(path: Path, n: int) -> None:
    np.savez(path, images=np.broadcast_to(np.zeros((1, 32, 32, 3), np.uint8), (n, 32, 32, 3)))


def _write_parquet(path: Path, n: int) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rng = np.random.default_rng(0)
    cells = []
    for _ in range(500):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(file, "JPEG")
        cells.append({"bytes": file.getvalue(), "path": None})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    block = pa.table({"image": pa.array(cells * 100, kind)})
    with parquet.ParquetWriter(path, block.schema, use_dictionary=False) as writer:
        for _ in range(0, n, len(block)):
            writer.write_table(block)


_WRITERS = {"x.npz": _write_npz, "x.npy": _write_npy, "x.parquet": _write_parquet}


def _labels(out: Path) -> np.ndarray[Any, Any]:
    from pyarrow import parquet

    labels: np.ndarray[Any, Any] = parquet.read_table(out)["label"].to_numpy()
    return labels


def _race(contestants: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Seconds of each, in turns, after a warm-up. Prints CPU time too, which other programs hardly change."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(ROUNDS + 1):
        for name, run in contestants.items():
            start, cpu_start = time.perf_counter(), _cpu_seconds()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
                cpu[name].append(_cpu_seconds() - cpu_start)
    print("CPU seconds:", ", ".join(f"{name} {statistics.median(times):.2f}" for name, times in cpu.items()))
    return seconds


def _cpu_seconds() -> float:
    """Of this process and the children that have ended, such as a DataLoader's workers."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _rates(seconds: dict[str, list[float]], n: int) -> str:
    return ", ".join(
        f"{name} {n / statistics.median(times):,.0f} images/s" for name, times in seconds.items()
    )


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Measure one thing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["arrays", "photos", "memory", "ray"])
    parser.add_argument("--images", type=int, default=0)
    parser.add_argument("--points", default="fast,default", help="operating points for arrays")
    parser.add_argument("--side", type=int, default=480, help="height of the photos")
    parser.add_argument("--kinds", default="npz,npy,parquet", help="files for memory")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if chosen.what == "arrays":
            arrays(Path(name), chosen.images or 16_384, chosen.points.split(","))
        elif chosen.what == "photos":
            photos(Path(name), chosen.images or 1024, chosen.side)
        elif chosen.what == "ray":
            on_ray(Path(name), chosen.images or 32_768)
        else:
            memory(Path(name), chosen.images or 1_000_000, chosen.kinds.split(","))


if __name__ == "__main__":
    main()
