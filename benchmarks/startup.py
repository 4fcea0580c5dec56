"""Time imports and the first image, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Without the interpreter's start and `site`.
_IMPORT = "import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
_FIRST_IMAGE = """
import json, sys, time
start = time.perf_counter()
import ragturbo
imported = time.perf_counter()
import torch
torch_imported = time.perf_counter()
gen = ragturbo.Generator.from_pretrained({model!r}, device={device!r}, **{options!r})
if {device!r} == "cuda":
    torch.cuda.synchronize()
loaded = time.perf_counter()
gen("a boat on the water with a lighthouse", seed=0, output_type="uint8")
first = time.perf_counter()
gen("a red fox beside a river", seed=1, output_type="uint8")
second = time.perf_counter()
print(json.dumps({{"import_s": imported - start, "torch_s": torch_imported - imported, "load_s": loaded - imported,
                   "first_s": first - loaded, "second_s": second - first, "loaded_to_first_s": first - loaded,
                   "total_s": first - start, "beyond_torch_s": first - start - (torch_imported - imported)}}))
gen.close()
"""


def import_time(module: str) -> float:
    """Return the seconds of `import module` in a fresh interpreter."""
    return float(_python(_IMPORT.format(module=module)))


def empty_package_time() -> float:
    """Return the same for an empty package."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "ragturbo_empty"
        package.mkdir()
        (package / "__init__.py").write_text("")
        return float(_python(_IMPORT.format(module="ragturbo_empty"), path=folder))


def first_image(model: str, device: str, **options: Any) -> dict[str, Any]:
    """Return the seconds from a fresh process to the first image, by part. "load_s" includes torch's own import, which
    is "torch_s". options: of from_pretrained."""
    return json.loads(_python(_FIRST_IMAGE.format(model=model, device=device, options=options)).splitlines()[-1])


def _python(code: str, path: str | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))}
    # Compiled modules are read from disk, as of an installed package.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    # In an empty folder: nothing else than installed packages and `path` can be imported, and "shapes" cannot be
    # mistaken for a folder of that name.
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=empty, env=environment)
    if done.returncode:
        raise RuntimeError(f"a measured process failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip()
