"""Image sets on disk: CIFAR binaries, npz files, folders of images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from fastcascade.data.cifar import LAYOUTS, cifar_kind, load_cifar
from fastcascade.data.image_data import ImageData
from fastcascade.data.image_files import load_folder
from fastcascade.data.npz import load_npz
from fastcascade.errors import DataError, InvalidArgument

__all__ = ["Split", "load_data"]

Split: TypeAlias = Literal["train", "test"]


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
            files), ``npz:FILE``, ``folder:DIR``. Without a kind, it is inferred from the path.

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
    data = load_npz(path, split) if kind == "npz" else load_cifar(path, split, LAYOUTS[kind])
    if classes is not None and data.classes is not None and data.classes != tuple(classes):
        raise DataError(f"{source} has the classes {list(data.classes)}; expected {list(classes)}")
    return data


def _kind_and_path(source: str | Path) -> tuple[str, Path]:
    named = re.fullmatch(r"(cifar100?|npz|folder):(.+)", str(source), re.DOTALL)
    if named:
        return named[1], Path(named[2])
    path = Path(source)
    if not path.exists():
        raise DataError(
            f"{path} does not exist; give a path, or KIND:PATH with cifar10, cifar100, npz, folder"
        )
    if kind := cifar_kind(path):
        return kind, path
    if path.is_dir():
        return "folder", path
    if path.suffix == ".npz":
        return "npz", path
    raise DataError(
        f"cannot infer the kind of {path}; write cifar10:, cifar100:, npz: or folder: before the path"
    )
