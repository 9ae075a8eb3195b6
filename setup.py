"""Build of the C++ extension, and the list of packages; the metadata is in pyproject.toml.

``kernels/`` is installed as ``fastcascade.kernels``. Packages are listed one by one, because automatic
discovery does not support that mapping.
"""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

sources = sorted(str(path) for path in Path("csrc").glob("**/*.cpp") if "driver" not in path.parts)
headers = sorted(str(path) for pattern in ("**/*.h", "**/*.inl") for path in Path("csrc").glob(pattern))

# No instruction-set flags: the kernels are compiled in target regions and chosen at run time.
kernels = Pybind11Extension(
    "fastcascade._C",
    sources,
    depends=headers,
    cxx_std=17,
    extra_compile_args=["-O3", "-fno-math-errno"],
)

setup(
    packages=[
        *find_packages(include=["fastcascade", "fastcascade.*"]),
        "fastcascade.kernels",
        *(f"fastcascade.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"fastcascade.kernels": "kernels"},
    package_data={
        "fastcascade": ["py.typed", "*.pyi", "benchmarking/*.css"],
        "fastcascade.kernels": ["cuda/*.cu", "cuda/*.cuh"],
    },
    include_package_data=False,
    ext_modules=[kernels] if sources else [],
    cmdclass={"build_ext": build_ext},
)
