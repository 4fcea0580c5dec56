"""What the retriever by words must not bring along."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# As the real one does on a GPU, it takes something at its first operation.
JAX = {"__init__.py": "", "lax.py": "def top_k(values, k):\n    print('JAX ran')\n"}


@pytest.mark.parametrize("before", ["", "import jax.lax; "], ids=["not imported yet", "imported by the application"])
def test_the_retriever_does_not_start_jax_which_would_reserve_the_gpu(tmp_path: Path, before: str) -> None:
    (tmp_path / "jax").mkdir()
    for name, text in JAX.items():
        (tmp_path / "jax" / name).write_text(text)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {before}"

    def printed(then: str) -> str:
        return subprocess.run([sys.executable, "-c", code + then], capture_output=True, text=True, check=True).stdout

    pytest.importorskip("bm25s")
    assert printed("import bm25s") == "JAX ran\n"
    then = "from ragturbo.retrieval.bm25 import _bm25s; print(_bm25s().BM25.__name__); "
    assert printed(then + "import jax.lax; print(jax.lax.__name__)") == "BM25\njax.lax\n"
