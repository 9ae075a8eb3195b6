"""Stand-ins for packages that a bare GPU machine may lack: rich from pip's copy, others in a few lines.

They are written as packages into a folder of the module path, if the real ones are missing.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

__all__ = ["PACKAGES", "write_stand_ins"]

RICH = '''"""rich as pip carries it."""
import pip._vendor.rich as own
from pip._vendor.rich import get_console, print, reconfigure
__path__ = own.__path__
'''

SAFETENSORS = '''"""As much of safetensors as reads and writes bytes."""
class SafetensorError(Exception):
    pass
'''

SAFETENSORS_TORCH = '''"""An 8-byte length, JSON of that length, tensors one after the other."""
import json
import torch

TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64":
    torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL":
    torch.bool,
}

def load(data):
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        flat = torch.frombuffer(bytearray(data[begin:end]) or bytearray(8), dtype=TYPES[entry["dtype"]])
        tensors[name] = (flat if end > begin else flat[:0]).reshape(entry["shape"])
    return tensors

def save(tensors, metadata=None):
    names = {dtype: name for name, dtype in TYPES.items()}
    header, parts, end = ({"__metadata__": metadata} if metadata else {}), [], 0
    for name, tensor in tensors.items():
        part = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        header[name] = {
            "dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + len(part)],
        }
        parts.append(part)
        end += len(part)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(parts)
'''

ANNOTATED_TYPES = '''"""Bounds in annotations, which nothing here checks."""
class _Bound:
    def __init__(self, value):
        self.value = value

class Ge(_Bound):
    pass

class Gt(_Bound):
    pass

class Le(_Bound):
    pass

class Lt(_Bound):
    pass
'''

PACKAGES = {
    "annotated_types": {"__init__.py": ANNOTATED_TYPES},
    "rich": {"__init__.py": RICH},
    "safetensors": {"__init__.py": SAFETENSORS, "torch.py": SAFETENSORS_TORCH},
}


def write_stand_ins(folder: Path, packages: tuple[str, ...] | None = None) -> list[str]:
    """Write those that are missing here, or the named ones; returns their names."""
    written = []
    for name, files in PACKAGES.items():
        if packages is None and importlib.util.find_spec(name) is not None:
            continue
        if packages is not None and name not in packages:
            continue
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (folder / name / file).write_text(text)
        written.append(name)
    return written
