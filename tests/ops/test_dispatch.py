from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ragturbo
from ragturbo import ops
from ragturbo.errors import InvalidRequest
from ragturbo.ops import dispatch

ROOT = Path(ragturbo.__file__).parent.parent


def python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_named_implementation_runs_or_raises_with_the_reason(monkeypatch, randn):
    h = randn(1, 2, 8)
    with pytest.raises(InvalidRequest, match="'fast'.*reference, triton"):
        ops.slerp(h, h, 0.5, impl="fast")
    with pytest.raises(InvalidRequest, match="float64"):
        ops.slerp(h.double(), h.double(), 0.5, impl="triton")
    monkeypatch.setattr(dispatch, "INTERPRET", False)
    with pytest.raises(InvalidRequest, match="run on a GPU.*'cpu'"):
        ops.slerp(h.cpu(), h.cpu(), 0.5, impl="triton")
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with pytest.raises(InvalidRequest, match="not installed"):
        ops.slerp(h, h, 0.5, impl="triton")
    monkeypatch.setattr(dispatch, "HAS_XFORMERS", False)
    with pytest.raises(InvalidRequest, match="xformers is not installed"):
        ops.cross_attention(h, h[:, None], h[:, None], heads=1, impl="xformers")
    with pytest.raises(InvalidRequest, match="GPU"):
        ops.gather_rows(ops.Rows(ops.describe(0, 0, "cpu"), 2, 1, 1), torch.tensor([0]), impl="cuda")


def test_auto_says_what_it_takes_and_why(monkeypatch):
    # A measured GPU would use its fastest implementation.
    monkeypatch.setattr(dispatch, "_measured", {})
    for device, expected in (("cpu", {"reference", "native"}), ("cuda", {"triton"})):
        rows = {row.op: row for row in ops.explain(device)}
        assert set(rows) == set(dispatch.IMPLEMENTATIONS)
        for op, row in rows.items():
            assert row.impl in expected and row.reason
            assert row.impl not in row.unavailable and set(row.unavailable) < set(dispatch.IMPLEMENTATIONS[op])
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    rows = {row.op: row for row in ops.explain("cuda")}
    assert rows["slerp"].impl == "reference" and rows["cross_attention"].impl == "sdpa"
    assert "not installed" in rows["slerp"].reason


def test_sizes_an_implementation_cannot_take_are_refused_by_name_and_passed_over_by_auto(monkeypatch):
    monkeypatch.setattr(dispatch, "native", lambda: type("Built", (), {"gather_rows": 1}))
    monkeypatch.setattr(dispatch, "_measured", {"topk": "cuda"})
    assert dispatch.choose("topk", "auto", "cuda", torch.float16) == "cuda"
    limits = {"cuda": "at most 32 neighbours, k is 33"}
    assert dispatch.choose("topk", "auto", "cuda", torch.float16, limits=limits) == "triton"
    with pytest.raises(InvalidRequest, match="impl='cuda'.*k is 33"):
        dispatch.choose("topk", "cuda", "cuda", torch.float16, limits=limits)
    keys, query = torch.empty(2, dtype=torch.int64, device="meta"), torch.empty(1, 1024, device="meta")
    monkeypatch.setattr(dispatch, "refusal", lambda op, impl, device, dtype=None: None)
    with pytest.raises(InvalidRequest, match="impl='cuda'.*32 neighbours, k is 33"):
        ops.topk(keys, query, 33, impl="cuda")
    with pytest.raises(InvalidRequest, match="impl='cuda'.*not 1023"):
        ops.topk(keys, query[:, :1023], 4, impl="cuda")
    with pytest.raises(InvalidRequest, match="impl='cuda'.*multiples of 16, .*not 1288"):
        ops.gather_rows(ops.Rows(keys, 1 << 20, 64, 1288, "int8"), keys, impl="cuda")
    with pytest.raises(InvalidRequest, match="impl='cuda'.*not 65536"):
        ops.gather_rows(ops.Rows(keys, 1 << 20, 64, 1280), keys.new_empty(65536), impl="cuda")


def test_auto_trains_through_the_reference_where_a_kernel_has_no_backward(device):
    x, w = torch.randn(2, 3, 8, device=device), torch.randn(4, 8, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(ops.linear(x, [w]).sum(), w)
    torch.testing.assert_close(gradient, x.sum((0, 1)).expand(4, 8))
    assert dispatch.choose("linear", "auto", "cuda", torch.float16, w) == "reference"
    with torch.no_grad():
        assert dispatch.choose("linear", "auto", "cuda", torch.float16, w) == "triton"


def test_the_environment_chooses_and_a_wrong_name_is_an_error():
    code = "from ragturbo import ops; print({row.op: (row.impl, row.reason) for row in ops.explain('cuda')})"
    rows = eval(python(code, RAGTURBO_IMPL="slerp=reference, cross_attention=sdpa"))
    assert rows["slerp"][0] == "reference" and "RAGTURBO_IMPL" in rows["slerp"][1]
    assert rows["cross_attention"][0] == "sdpa" and rows["linear"][0] == "triton"
    assert {impl for impl, _ in eval(python(code, RAGTURBO_IMPL="reference")).values()} == {"reference"}
    code = "import ragturbo.errors as e\ntry:\n import ragturbo.ops\nexcept e.InvalidRequest as error: print(error)"
    assert "slerp=fast" in python(code, RAGTURBO_IMPL="slerp=fast")


def test_every_environment_variable_is_in_the_table():
    found = set()
    for folder in (ROOT / "ragturbo" / "ops", ROOT / "kernels"):
        for path in folder.rglob("*.py"):
            found |= set(re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", path.read_text()))
    assert found == set(dispatch.ENVIRONMENT)


def test_importing_the_ops_imports_no_triton_and_they_work_without_it():
    python("import sys, ragturbo.ops; assert 'triton' not in sys.modules and 'torch._dynamo' not in sys.modules")
    python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, ragturbo.ops as ops, ragturbo.errors as errors\n"
        "h = torch.randn(1, 4, 8)\n"
        "assert torch.equal(ops.slerp(h, h, 1.0), h)\n"
        "try: ops.slerp(h, h, 1.0, impl='triton'); raise SystemExit('ran')\n"
        "except errors.InvalidRequest as error: assert 'not installed' in str(error)\n"
    )


def calls(make):
    """name -> (function, tensors made by make(shape))."""
    x, image = make(2, 5, 32), make(1, 32, 3, 4)
    w, c, k = make(16, 32), make(32), make(2, 3, 4, 32)
    lam, valid = make(2).abs(), make(2, 3) > 0
    return {
        "slerp": (lambda t, r, w: ops.slerp(t, r, w, impl="triton"), (x, x.flip(1), lam)),
        "scaled_residual": (lambda h, d, s: ops.scaled_residual(h, d, s, impl="triton"), (x, x.flip(1), lam)),
        "cross_attention": (lambda q, k, v: ops.cross_attention(q, k, v, valid, heads=2, impl="triton"), (x, k, k)),
        "linear": (
            lambda x, w, b: ops.linear(x, [w], b, residual=x[..., :16], lam=lam, impl="triton"), (x, w, make(16)),
        ),
        "project_attention": (
            lambda x, w, k: ops.project_attention(x, w, k, k, valid, heads=2, impl="triton"), (x, make(32, 32), k)
        ),
        "group_norm": (lambda x, s, b: ops.group_norm(x, 4, s, b, silu=True, impl="triton"), (image, c, c)),
        "group_norm_and_sum": (
            lambda x, s: ops.group_norm_and_sum(x, 4, s, s, add=x, impl="triton")[1], (image, c)
        ),
        "layer_norm": (lambda x, s, b: ops.layer_norm(x, s, b, impl="triton"), (x, c, c)),
        "layer_norm_and_sum": (
            lambda x, s, b: ops.layer_norm_and_sum(x, s, b, add=x.flip(1), add_bias=b, impl="triton")[0], (x, c, c)
        ),
        "geglu": (lambda x, b: ops.geglu(x, b, impl="triton"), (x, c)),
        "bias_residual": (lambda x, b: ops.bias_residual(x, b, x.flip(0), impl="triton"), (image, c)),
        "upsample": (lambda x: ops.upsample(x, impl="triton"), (image,)),
        "interleave": (lambda x: ops.interleave(x, impl="triton"), (image,)),
        "softmax": (lambda x: ops.softmax(x, 0.5, torch.float16, impl="triton"), (x,)),
        "to_uint8": (lambda x: ops.to_uint8(x, impl="triton"), (image,)),
    }  # fmt: skip


NAMES = (
    "slerp", "scaled_residual", "cross_attention", "linear", "project_attention", "group_norm", "group_norm_and_sum",
    "layer_norm", "layer_norm_and_sum", "geglu", "bias_residual", "upsample", "interleave", "softmax", "to_uint8",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_each_op_is_one_node_of_a_whole_graph(name, randn):
    function, tensors = calls(randn)[name]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), function(*tensors), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["slerp", "scaled_residual", "cross_attention"])
def test_and_so_is_its_backward(name, randn):
    function, tensors = calls(randn)[name]
    leaves = [x.clone().requires_grad_() for x in tensors]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for a, b in zip(*(torch.autograd.grad(f(*leaves).sum(), leaves) for f in (compiled, function)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_strides_are_known_without_a_gpu(name, randn):
    function, tensors = calls(randn)[name]
    real = function(*tensors)
    with FakeTensorMode():
        function, tensors = calls(lambda *shape: torch.empty(shape, device="cuda"))[name]
        fake = function(*tensors)
    assert fake.device.type == "cuda" and fake.dtype == real.dtype
    assert fake.shape == real.shape and fake.stride() == real.stride()


def test_opcheck_of_every_custom_op(randn, device):
    x, c, k, w = randn(2, 5, 32), randn(32), randn(2, 3, 4, 32), randn(16, 32)
    image, lam = randn(1, 32, 3, 4), torch.tensor([0.3, 0.9], device=device)
    valid = torch.tensor([[True, False, True], [True] * 3], device=device)
    out, softmax = torch.ops.ragturbo.cross_attention(x, k, k, valid, 2)
    table = randn(6, 40).half()
    described = ops.describe(table.data_ptr(), 6, device)
    ids = torch.tensor([3, -1], device=device)
    arguments = {
        "slerp": (x, x.flip(1), lam, False),
        "slerp_backward": (x, x, x.flip(1), lam, True),
        "scaled_residual": (x, x.flip(1), lam),
        "scaled_residual_": (x.clone(), x, lam),
        "scaled_residual_backward": (x, x.flip(1), lam),
        "cross_attention": (x, k, k, valid, 2),
        "cross_attention_backward": (x, x, k, k, valid, out, softmax, 2),
        "linear": (x, [w], None, False, None, None),
        "project_attention": (x, randn(32, 32), k, k, None, 2),
        "group_norm": (image, 4, c, c, 1e-5, True, image, None, True),
        "layer_norm": (x, c, c, 1e-5),
        "layer_norm_and_sum": (x, c, c, 1e-5, x.flip(1), c),
        "geglu": (x, c),
        "bias_residual": (image, c, image.flip(0)),
        "upsample": (image,),
        "interleave": (image,),
        "softmax": (x, 0.5, torch.float16),
        "to_uint8": (image, True),
        "gather_rows": (described, ids, 80, 5, 8, False),
        "topk": (described, randn(2, 40), 3),
    }
    defined = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("ragturbo::")}
    # The CUDA implementations need a GPU.
    assert set(arguments) == defined - {"gather_rows_cuda", "topk_cuda"}
    for name, args in arguments.items():
        torch.library.opcheck(getattr(torch.ops.ragturbo, name).default, args)


def test_where_a_compiler_is_the_native_layers_were_built_so_that_their_tests_do_not_skip():
    from ragturbo.info import native_reason

    if shutil.which("g++") and "RAGTURBO_NATIVE=off" not in native_reason():
        assert all(hasattr(dispatch.native(), op) for op in ("group_norm", "geglu", "interleave")), native_reason()
