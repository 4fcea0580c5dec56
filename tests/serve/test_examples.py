"""The examples for other servers, run through those servers' interfaces."""

from __future__ import annotations

import base64
import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples" / "serving"
PROMPT = "a red circle left of a blue square"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(path):
    assert len(path.read_text("utf-8").splitlines()) < 40


@pytest.fixture
def loaded(gen, monkeypatch):
    """Give the examples the Generator that is already loaded."""
    import ragturbo

    monkeypatch.setattr(ragturbo.Generator, "from_pretrained", lambda *a, **o: gen)
    return gen


def test_the_litserve_example_answers_what_came_together(loaded):
    pytest.importorskip("litserve", reason="litserve is not installed: pip install -e '.[dev]'")
    api = load(EXAMPLES / "litserve_app.py").Images(max_batch_size=8, batch_timeout=0.005)
    api.setup("cpu")
    requests = [api.decode_request({"prompt": PROMPT, "seed": seed}) for seed in range(3)]
    answers = [api.encode_response(png) for png in api.predict(requests)]
    images = [Image.open(io.BytesIO(base64.b64decode(answer["b64_json"]))) for answer in answers]
    assert [image.size for image in images] == [(64, 64)] * 3


def test_the_triton_example_answers_each_request_for_itself(loaded, monkeypatch):
    """The backend module exists only inside Triton, so the names that the example uses are faked as documented."""

    class Tensor(SimpleNamespace):
        def __init__(self, name: str, array: np.ndarray) -> None:
            super().__init__(name=name, as_numpy=lambda: array)

    backend = ModuleType("triton_python_backend_utils")
    backend.Tensor = Tensor
    backend.get_input_tensor_by_name = lambda request, name: request[name]
    backend.InferenceResponse = lambda output_tensors=(), error=None: SimpleNamespace(out=output_tensors, error=error)
    backend.TritonError = str
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    model = load(EXAMPLES / "triton" / "images" / "1" / "model.py").TritonPythonModel()
    model.initialize({"model_instance_kind": "CPU", "model_instance_device_id": "0"})

    def request(*prompts: str) -> dict[str, Tensor]:
        texts = np.array([[p.encode()] for p in prompts], object)
        return {"PROMPT": Tensor("PROMPT", texts), "SEED": Tensor("SEED", np.arange(len(prompts), dtype=np.uint64))}

    # Invalid UTF-8, which fails before ragturbo sees it.
    broken = {"PROMPT": Tensor("PROMPT", np.array([[b"\xff"]], object)), "SEED": Tensor("SEED", np.zeros(1, np.uint64))}
    one, empty, bad, two = model.execute([request(PROMPT), request(" "), broken, request(PROMPT, PROMPT)])
    assert [r.out[0].as_numpy().shape for r in (one, two)] == [(1, 64, 64, 3), (2, 64, 64, 3)]
    assert "prompt is empty" in empty.error and not empty.out
    assert "utf-8" in bad.error and not bad.out
