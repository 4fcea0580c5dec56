"""Ops in a CUDA graph: replays read current device memory, and are bit-identical to an eager run."""

from __future__ import annotations

import pytest
import torch

from ragturbo import ops
from ragturbo.model.adapter import HSpaceAdapter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs are captured on a GPU"),
]


def captured(call):
    """Warm up on a side stream, then capture: (replay, the result of the captured call)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph.replay, out


def follows(call, changes):
    """After each change the replay equals an eager run and differs from the previous result."""
    replay, out = captured(call)
    replay()
    before = out.clone()
    for change in changes:
        change()
        replay()
        assert torch.equal(out, call())
        assert not torch.equal(out, before)
        before = out.clone()


@pytest.mark.parametrize("per", ["sample", "token"])
def test_slerp_follows_w_and_the_features(per, dtype, randn, device):
    t, r, w = randn(2, 64, 1280, dtype=dtype), randn(2, 64, 1280, dtype=dtype), torch.tensor([0.8, 0.2], device=device)
    changes = [lambda: w.fill_(0.5), lambda: r.copy_(t.flip(1))]
    follows(lambda: ops.slerp(t, r, w, per=per, impl="triton"), changes)


@pytest.mark.parametrize("kind", ["attention", "transformer"])
def test_the_adapter_follows_lambda_validity_features_and_weights(kind, randn, device):
    adapter = HSpaceAdapter(1280, 20, kind).to(device).half().requires_grad_(False)
    torch.nn.init.normal_(adapter.proj_out.weight, std=0.02)
    h_tgt, h_retr = randn(2, 64, 1280).half(), randn(2, 4, 64, 1280).half()
    lam, valid = torch.full((2,), 0.7, device=device), torch.ones(2, 4, dtype=torch.bool, device=device)
    changes = [
        lambda: lam.fill_(0.3),
        lambda: valid[:, 1].fill_(False),
        lambda: h_retr[:, 0].normal_(),
        lambda: h_tgt.mul_(0.5),
        lambda: adapter.proj_out.weight.mul_(2),
    ]
    follows(lambda: adapter(h_tgt, h_retr, lam, valid, "triton"), changes)


def test_gather_and_search_follow_a_new_descriptor(randn, device):
    small, large = randn(9, 1280 * 4).half(), randn(50, 1280 * 4).half()
    rows = ops.Rows(ops.describe(small.data_ptr(), 9, device), 1280 * 8, 4, 1280)
    ids = torch.tensor([8, 20], device=device)
    moved = ops.describe(large.data_ptr(), 50, device)
    changes = [lambda: rows.descriptor.copy_(moved), lambda: ids.fill_(3)]
    follows(lambda: ops.gather_rows(rows, ids, impl="triton"), changes)
    few, many, query = randn(9, 1024).half(), randn(5000, 1024).half(), randn(2, 1024)
    keys, others = ops.describe(few.data_ptr(), 9, device), ops.describe(many.data_ptr(), 5000, device)
    changes = [lambda: keys.copy_(others), lambda: query.neg_()]
    follows(lambda: ops.topk(keys, query, 4, impl="triton")[0], changes)


@pytest.mark.parametrize("shape", [(1, 1280, 8, 8), (1, 128, 128, 128)])
def test_group_norm_and_bytes_follow_the_image(shape, randn, device):
    x, weight = randn(*shape).half().contiguous(memory_format=torch.channels_last), randn(shape[1]).half()
    follows(lambda: ops.group_norm(x, 32, weight, weight, silu=True, impl="triton"), [lambda: x.normal_()])
    follows(lambda: ops.to_uint8(x[:, :3], impl="triton"), [lambda: x.normal_()])
