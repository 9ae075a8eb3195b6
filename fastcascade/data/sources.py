"""Image sets on disk: which kind a path holds, and reading it."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeAlias

from fastcascade.data.cifar import LAYOUTS, cifar_kind, load_cifar
from fastcascade.data.image_data import ImageData
from fastcascade.data.image_files import escaped, find_files, is_image_name, load_files, load_folder
from fastcascade.data.npz import load_npy, load_npz
from fastcascade.data.parquet import load_parquet
from fastcascade.data.tar_shards import load_tar
from fastcascade.errors import DataError, InvalidArgument

__all__ = ["Split", "load_data", "load_inputs"]

Split: TypeAlias = Literal["train", "test"]

KINDS = ("cifar10", "cifar100", "npz", "npy", "folder", "parquet", "tar")
_KIND = re.compile(rf"({'|'.join(KINDS)}):(.+)", re.DOTALL)
_ARRAY_SUFFIXES = (".npz", ".npy", ".bin")
_MAX_SHARDS = 100_000


def load_data(
    source: str | Path,
    split: Split | None = None,
    shape: tuple[int, int, int] | None = None,
    resize: bool = False,
    classes: Sequence[str] | None = None,
) -> ImageData:
    """An image set from disk: CIFAR-10/100 in binary layout, an npz file, or a folder of images.

    Images stay on disk and are read when needed, except in compressed npz files. Those are loaded, with
    labels and class names up to 4 GiB (``fastcascade.data.npz.MAX_MEMORY_BYTES``).

    Args:
        source: a path, or a kind and a path: ``cifar10:DIR``, ``cifar100:DIR`` (or one of their .bin
            files), ``npz:FILE``, ``npy:FILE``, ``folder:DIR``. Without a kind, it is inferred from the path.

            An npz file holds ``x_train``, ``y_train``, ``x_test``, ``y_test``, or ``images`` and ``labels``;
            labels and ``classes`` are optional. A folder holds one sub-folder per class, or unlabelled
            images; it may be divided into ``train`` and ``test``.
        split: "train" or "test"; None reads the test part of a divided set, else everything.
        shape: (C, H, W) of the images in a folder; by default RGB in the size of the first readable one.
        resize: scale images in a folder to ``shape`` (antialiased bilinear; the aspect ratio is not kept).
        classes: names in label order. The labels of a folder follow this order; if none of its sub-folders
            is among the names, its images are unlabelled. Other sources must have the same names.

    Raises:
        DataError: missing, truncated, corrupt, too large, without this split, or with other classes.
        InvalidArgument: ``resize`` without ``shape``, or for a source that is not a folder.
    """
    kind, path = _kind_and_path(source)
    if kind == "folder":
        if resize and shape is None:
            raise InvalidArgument("resize=True needs shape=(C, H, W), the size to scale to")
        return load_folder(path, split, shape, resize, classes)
    if resize:
        raise InvalidArgument(f"resize=True works on folders of images; {source} is {kind}")
    if kind not in ("cifar10", "cifar100", "npz", "npy"):
        raise DataError(f"{source} holds images without labels; fc.predict reads it")
    if kind == "npz":
        data = load_npz(path, split)
    else:
        data = load_npy(path) if kind == "npy" else load_cifar(path, split, LAYOUTS[kind])
    if classes is not None and data.classes is not None and data.classes != tuple(classes):
        raise DataError(f"{source} has the classes {list(data.classes)}; expected {list(classes)}")
    return data


def load_inputs(
    source: str | Path | Sequence[str | Path],
    shape: tuple[int, int, int],
    resize: bool = True,
    split: Split | None = None,
) -> ImageData:
    """Unlabelled images to classify, from whatever a path names.

    Args:
        source: an image file; a folder, with images at any depth, or else with Parquet or tar files; a .npz,
            .npy, .parquet or .tar file; CIFAR binaries; a pattern such as ``"photos/**/*.jpg"`` or
            ``"shard-{000..009}.tar"``; a list of image files, of Parquet files or of tar files; or one of
            :func:`load_data`'s kinds with its path.
        shape: (C, H, W) of the images that the model reads.
        resize: scale encoded images of other sizes; if False, they are error rows.
        split: of a divided set.

    Raises:
        DataError: there are no images, or a file cannot be read at all.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        ...     np.save(file, np.zeros((3, 8, 8, 3), np.uint8))
        ...     file.flush()
        ...     load_inputs(file.name, (3, 8, 8)).ids[:2]
        ['0', '1']
    """
    if not isinstance(source, str | Path):
        return _load_list([Path(path) for path in source], [str(path) for path in source], shape, resize)
    if _KIND.fullmatch(str(source)) is None and not os.path.lexists(source):
        return _load_pattern(str(source), shape, resize)
    kind, path = _kind_and_path(source)
    if kind in ("cifar10", "cifar100", "npz", "npy"):
        return replace(load_data(source, split), labels=None)
    if kind == "parquet":
        return load_parquet([path], shape, resize)
    if kind == "tar":
        return load_tar([path], shape, resize)
    if kind == "image":
        return load_files(path.parent, [path.name], shape, resize)
    return _load_any_folder(path, shape, resize, split)


def _load_list(paths: list[Path], ids: list[str], shape: tuple[int, int, int], resize: bool) -> ImageData:
    """Files of one kind."""
    if not paths:
        raise DataError("the list of files is empty; expected at least one image")
    suffixes = {path.suffix.lower() for path in paths}
    if suffixes == {".parquet"}:
        return load_parquet(paths, shape, resize)
    if suffixes == {".tar"}:
        return load_tar(paths, shape, resize)
    if whole := [path for path in paths if path.suffix.lower() in _ARRAY_SUFFIXES or path.is_dir()]:
        raise DataError(
            f"the list holds {str(whole[0])!r}; expected image files, or only .parquet or only .tar files. "
            "Give a folder, an npz or an npy file alone"
        )
    return load_files(Path(), [str(path) for path in paths], shape, resize, [escaped(name) for name in ids])


def _load_pattern(pattern: str, shape: tuple[int, int, int], resize: bool) -> ImageData:
    found = sorted({path for part in _expanded(pattern) for path in _matches(part)})
    files = [str(path) for path in found if not path.is_dir()]
    if not files:
        what = "matches no file" if glob.has_magic(pattern) or "{" in pattern else "does not exist"
        raise DataError(f"{pattern} {what}; expected a path, a pattern, or KIND:PATH with {', '.join(KINDS)}")
    return _load_list([Path(path) for path in files], files, shape, resize)


def _matches(pattern: str) -> Iterator[Path]:
    """Like ``glob.glob``, but ``**`` does not follow links to folders, which may form a loop."""
    parts = Path(pattern).parts
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), parts))
    if len(fixed) == len(parts):
        return iter([Path(pattern)] if os.path.lexists(pattern) else [])
    return Path(*fixed).glob(str(Path(*parts[len(fixed) :])))


def _expanded(pattern: str) -> list[str]:
    """WebDataset's ``{000..009}`` written out."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match[1], match[2]
    if int(last) - int(first) >= _MAX_SHARDS:
        raise DataError(f"{match[0]} names more than {_MAX_SHARDS} files")
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [p for n in numbers for p in _expanded(pattern[: match.start()] + n + pattern[match.end() :])]


def _load_any_folder(path: Path, shape: tuple[int, int, int], resize: bool, split: Split | None) -> ImageData:
    root = path if split is None else path / split
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; expected a folder of images")
    for suffix, load in ((".parquet", load_parquet), (".tar", load_tar)):
        files = sorted(file for file in root.rglob(f"*{suffix}") if file.is_file())
        if files and not any(is_image_name(name) for name in os.listdir(root)):
            return load(files, shape, resize)
    return load_files(root, find_files(root), shape, resize)


def _kind_and_path(source: str | Path) -> tuple[str, Path]:
    named = _KIND.fullmatch(str(source))
    if named:
        return named[1], Path(named[2])
    path = Path(source)
    if not path.exists():
        raise DataError(f"{path} does not exist; give a path, or KIND:PATH with {', '.join(KINDS)}")
    if kind := cifar_kind(path):
        return kind, path
    if path.is_dir():
        return "folder", path
    suffix = path.suffix.lower().removeprefix(".")
    if suffix in ("npz", "npy", "parquet", "tar"):
        return suffix, path
    if is_image_name(path.name):
        return "image", path
    raise DataError(
        f"cannot infer the kind of {path}; write {', '.join(f'{k}:' for k in KINDS)} before the path"
    )
