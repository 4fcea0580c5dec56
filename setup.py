"""The parts of the build that pyproject.toml cannot express: package map, licence and native extension.

RAGTURBO_NATIVE=auto (default) builds ragturbo._native; if that fails, it warns and installs pure Python. `require`
makes a failure an error, `off` skips the build. `ragturbo info` shows the result and the reason.
RAGTURBO_ARCHS="90" builds the CUDA part for these compute capabilities only (default "80 89 90").
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPP_NAMES = ("bindings", "store", "mapped", "crc32", "pool", "pinned", "threads", "norm", "layers")
CPP = [f"csrc/{name}.cpp" for name in CPP_NAMES]
CUDA = ["csrc/gather.cu", "csrc/topk.cu"]
HEADERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.hpp"))
# Machine code for Ampere (A100), Ada (L40S) and Hopper (H100, H200); newer GPUs compile the PTX on first load.
ARCHS = (os.environ.get("RAGTURBO_ARCHS") or "80 89 90").split()
REASON_FILE = "_native_off.txt"


def native_mode() -> str:
    mode = os.environ.get("RAGTURBO_NATIVE", "auto")
    if mode not in ("auto", "require", "off"):
        sys.exit(f"RAGTURBO_NATIVE={mode!r}: give auto, require or off")
    return mode


class CudaToolkit:
    """nvcc and its folders. `top` is what nvcc reports, because the nvcc on PATH may be a wrapper script."""

    def __init__(self, nvcc: str) -> None:
        self.nvcc = nvcc
        empty = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=True, cwd=ROOT
        ).stderr
        top = re.search(r"^#\$ TOP=(.+)$", empty, re.MULTILINE)
        if top is None:
            raise RuntimeError(f"{nvcc} --dryrun does not say where its toolkit is")
        self.top = Path(top.group(1).strip()).resolve()
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        release = re.search(r"release ([0-9.]+)", version)
        self.version = release.group(1) if release else "unknown"

    def static_runtime(self) -> Path:
        for folder in ("lib64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "lib"):
            library = self.top / folder / "libcudart_static.a"
            if library.exists():
                return library
        raise RuntimeError(f"no libcudart_static.a under {self.top}")

    def compile(self, source: str, target: Path) -> None:
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS]
        codes.append(f"-gencode=arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}")
        flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-cudart=static"]
        command = [self.nvcc, *flags, *codes, "-c", str(ROOT / source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def find_cuda() -> CudaToolkit | str:
    """Return the toolkit, or the reason why there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    tried = [str(Path(home, "bin", "nvcc"))] if home else []
    tried += [shutil.which("nvcc") or "nvcc", "/usr/local/cuda/bin/nvcc"]
    for nvcc in tried:
        if shutil.which(nvcc):
            try:
                return CudaToolkit(nvcc)
            except (OSError, subprocess.CalledProcessError, RuntimeError) as error:
                return f"nvcc was found but not usable when ragturbo was installed: {error}"
    return "nvcc was not found when ragturbo was installed (CUDA_HOME, PATH, /usr/local/cuda)"


class BuildNative(build_ext):
    """Build the extension, or write the reason for its absence to `_native_off.txt`."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        reason_file = target.parent / REASON_FILE
        target.parent.mkdir(parents=True, exist_ok=True)
        reason_file.unlink(missing_ok=True)
        if native_mode() == "off":
            reason_file.write_text("RAGTURBO_NATIVE=off when ragturbo was installed\n")
            return
        try:
            self.compile_native(ext)
        except Exception as error:
            if native_mode() == "require":
                raise
            reason_file.write_text(f"building it failed when ragturbo was installed: {error}\n")
            self.warn(f"ragturbo._native was not built, the pure-Python paths will be used: {error}")

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        # Editable install: put the reason where the module would be, and delete an older build.
        source = ROOT / "ragturbo"
        reason_file = Path(self.build_lib, "ragturbo", REASON_FILE)
        (source / REASON_FILE).unlink(missing_ok=True)
        if reason_file.exists():
            shutil.copy(reason_file, source / REASON_FILE)
            for ext in self.extensions:
                (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)

    def compile_native(self, ext: Extension) -> None:
        import pybind11

        cuda = find_cuda()
        objects: list[str] = []
        if isinstance(cuda, CudaToolkit):
            try:
                objects = self.cuda_objects(cuda)
            except (OSError, RuntimeError) as error:
                if native_mode() == "require":
                    raise
                self.warn(f"the CUDA part of ragturbo._native was not built: {error}")
                cuda = f"nvcc {cuda.version} failed when ragturbo was installed"
        version, reason = (cuda.version, "") if isinstance(cuda, CudaToolkit) else ("", cuda)
        macros = [
            ("RAGTURBO_CUDA", c_string(version)),
            ("RAGTURBO_CUDA_OFF", c_string(reason)),
            ("RAGTURBO_ARCHS", c_string(" ".join("sm_" + arch for arch in ARCHS) if version else "")),
        ]
        if version:
            macros.append(("RAGTURBO_HAS_CUDA", "1"))
        folder = self.object_folder(sys.version, pybind11.__version__, *ext.extra_compile_args, *map(str, macros))

        def compile_cpp(source: str, target: Path) -> None:
            # distutils writes <output_dir>/csrc/store.o.
            self.compiler.compile(
                [source],
                output_dir=str(folder),
                macros=macros,
                include_dirs=[*self.compiler.include_dirs, pybind11.get_include()],
                extra_postargs=ext.extra_compile_args,
            )

        objects += compile_stale(CPP, folder, compile_cpp)
        ext.sources = []
        ext.extra_objects += objects
        super().build_extension(ext)

    def cuda_objects(self, cuda: CudaToolkit) -> list[str]:
        folder = self.object_folder(cuda.version, cuda.nvcc, *ARCHS)
        return [*compile_stale(CUDA, folder, cuda.compile), str(cuda.static_runtime())]

    def object_folder(self, *settings: str) -> Path:
        """Folder of the objects for these settings. They are kept, so that a small change compiles quickly."""
        tag = hashlib.sha256("\n".join(settings).encode()).hexdigest()[:12]
        return ROOT / "build" / "native" / tag


def compile_stale(sources: list[str], folder: Path, compile_one: Callable[[str, Path], None]) -> list[str]:
    """Compile the sources that changed, in parallel, and return all objects. Headers and this file count as sources."""
    shared = max((ROOT / name).stat().st_mtime for name in [*HEADERS, "setup.py"])
    targets = [(folder / source).with_suffix(".o") for source in sources]
    stale = [
        (source, target)
        for source, target in zip(sources, targets, strict=True)
        if not target.exists() or target.stat().st_mtime < max(shared, (ROOT / source).stat().st_mtime)
    ]
    for _, target in stale:
        target.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(lambda pair: compile_one(*pair), stale))
    return [str(target) for target in targets]


def c_string(text: str) -> str:
    """Return `text` as a C string literal."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'


native = Extension(
    "ragturbo._native",
    CPP,
    # distutils ignores the failure of an optional extension only.
    optional=native_mode() != "require",
    language="c++",
    extra_compile_args=["-std=c++17", "-O3", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"],
    extra_link_args=["-pthread"],
    libraries=["rt", "dl"] if sys.platform == "linux" else [],
)

setup(
    license="Apache-2.0",
    packages=[*find_packages(include=["ragturbo", "ragturbo.*"]), "ragturbo.kernels"],
    # Hugging Face's libraries look for a package named `kernels`, so ours must not be installed under that name.
    package_dir={"ragturbo.kernels": "kernels"},
    ext_modules=[native],
    cmdclass={"build_ext": BuildNative},
)
