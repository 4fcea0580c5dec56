"""Start-up, each measurement in a process of its own: importing, and the way to the first image."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Imports another interpreter's `site` runs for everybody are paid before; what is measured is the import alone.
_IMPORT = "import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
_FIRST_IMAGE = """
import json, sys, time
start = time.perf_counter()
import ragturbo
imported = time.perf_counter()
gen = ragturbo.Generator.from_pretrained({model!r}, device={device!r})
if {device!r} == "cuda":
    import torch
    torch.cuda.synchronize()
loaded = time.perf_counter()
gen("a boat on the water with a lighthouse", seed=0, output_type="uint8")
first = time.perf_counter()
gen("a red fox beside a river", seed=1, output_type="uint8")
second = time.perf_counter()
print(json.dumps({{"import_s": imported - start, "load_s": loaded - imported, "first_s": first - loaded,
                   "second_s": second - first, "loaded_to_first_s": first - loaded, "total_s": first - start}}))
gen.close()
"""


def import_time(module: str) -> float:
    """Seconds of `import module` in a fresh interpreter."""
    return float(_python(_IMPORT.format(module=module)))


def empty_package_time() -> float:
    """The same for a package that holds nothing: what any import costs."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "ragturbo_empty"
        package.mkdir()
        (package / "__init__.py").write_text("")
        return float(_python(_IMPORT.format(module="ragturbo_empty"), path=folder))


def first_image(model: str, device: str) -> dict[str, Any]:
    """Seconds from a fresh process to the first image, by part. The disk cache is as warm as the caller made it."""
    import json

    return json.loads(_python(_FIRST_IMAGE.format(model=model, device=device)).splitlines()[-1])


def process_time(code: str) -> float:
    """Wall seconds of a whole process that runs `code`."""
    start = time.perf_counter()
    _python(code)
    return time.perf_counter() - start


def _python(code: str, path: str | None = None) -> str:
    # Run in a folder of no meaning, so that only what is installed or given can be imported.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tempfile.gettempdir(), env=environment
    )
    if done.returncode:
        raise RuntimeError(f"a measured process failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip()
