"""Build of e2e_fast: CMake and ninja compile csrc/ into ``e2e_fast._C``; metadata lives in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").iterdir())


class CMakeBuild(build_ext):
    """Configures once, then lets ninja rebuild what changed. No torch is linked, so none is needed to build."""

    def build_extension(self, ext: Extension) -> None:
        import ninja
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S", str(ROOT),
            "-B", str(work),
            "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
            f"-DCMAKE_BUILD_TYPE={os.environ.get('CMAKE_BUILD_TYPE', 'Release')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DE2E_FAST_OUTPUT_DIR={target.parent}",
            f"-DE2E_FAST_SUFFIX={''.join(target.suffixes)}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(work), "--target", "_C"], check=True)


setup(
    packages=[
        "e2e_fast",
        "e2e_fast.kernels",
        "e2e_fast.kernels.triton",
        "e2e_fast.compare",
        "e2e_fast.embedded",
        "e2e_fast.formats",
        "e2e_fast.report",
    ],
    # kernels/ stands at the top level and is imported as e2e_fast.kernels; the symlink e2e_fast/kernels serves
    # editable installs and type checkers, this entry serves wheels.
    package_dir={"e2e_fast.kernels": "kernels", "e2e_fast.kernels.triton": "kernels/triton"},
    package_data={"e2e_fast": ["py.typed"], "e2e_fast.embedded": ["*.json", "*.safetensors", "*.md"]},
    # py_limited_api stays off: pybind11 needs the full API.
    ext_modules=[Extension("e2e_fast._C", sources=[s for s in CSRC if s.endswith(".cpp")], depends=CSRC)],
    cmdclass={"build_ext": CMakeBuild},
)
