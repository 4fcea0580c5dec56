"""The adapter is the identity until it is trained, and attends to valid neighbours only."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Transformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.model.adapter import FILE, HSpaceAdapter, RetrievedKV, default_heads, norm_groups

KINDS = ("transformer", "attention")


def trained(channels: int = 32, heads: int | None = None, kind: str = "transformer", phrases: int = 0) -> HSpaceAdapter:
    """An adapter whose output projection is not zero, so that its attention has an effect."""
    adapter = HSpaceAdapter(channels, heads, kind, phrases).eval()
    torch.nn.init.normal_(adapter.proj_out.weight, std=0.2)
    torch.nn.init.normal_(adapter.proj_out.bias, std=0.2)
    if adapter.phrase is not None:
        torch.nn.init.normal_(adapter.phrase)
    return adapter


def transformer_2d(channels: int, heads: int, groups: int = 32) -> Any:
    return Transformer2DModel(
        heads, channels // heads, in_channels=channels, cross_attention_dim=channels, use_linear_projection=True,
        norm_num_groups=groups,
    ).eval()  # fmt: skip


def test_the_papers_adapter_has_36_million_parameters() -> None:
    with torch.device("meta"):
        adapter = HSpaceAdapter()
        attention = HSpaceAdapter(kind="attention")
    assert (adapter.channels, adapter.heads, adapter.kind) == (1280, 20, "transformer")
    assert sum(p.numel() for p in adapter.parameters()) == 36_071_680
    # Q, K and V alone are 4.9M parameters, not the paper's 36M.
    assert sum(p.numel() for n, p in attention.named_parameters() if "proj_out" not in n) == 3 * 1280**2


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_an_untrained_adapter_is_the_identity(data: st.DataObject) -> None:
    channels = data.draw(st.sampled_from([8, 32, 48, 96]))
    batch, tokens, k, retrieved = (data.draw(st.integers(1, 5)) for _ in range(4))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    adapter = HSpaceAdapter(channels, kind=data.draw(st.sampled_from(KINDS))).to(dtype)
    h_tgt = torch.randn(batch, tokens, channels).to(dtype)
    h_retr = torch.randn(batch, k, retrieved, channels).to(dtype)
    valid = torch.rand(batch, k) < 0.5
    with torch.no_grad():
        assert torch.equal(adapter(h_tgt, h_retr, torch.rand(batch), valid), h_tgt)


@pytest.mark.parametrize("channels, heads, groups", [(64, 4, 32), (320, 5, 32), (48, 6, 24)])
def test_g_is_diffusers_transformer_without_its_residual(channels: int, heads: int, groups: int) -> None:
    theirs = transformer_2d(channels, heads, groups)
    adapter = HSpaceAdapter(channels, heads)
    adapter.load_state_dict(theirs.state_dict())
    h, h_retr, lam = torch.randn(2, channels, 3, 5), torch.randn(2, 1, 7, channels), torch.tensor([0.3, 1.0])
    tokens = h.flatten(2).transpose(1, 2)
    with torch.no_grad():
        outer = theirs(h, encoder_hidden_states=h_retr[:, 0]).sample.flatten(2).transpose(1, 2)
        ours = adapter(tokens, h_retr, lam)
    torch.testing.assert_close(ours, tokens + lam[:, None, None] * (outer - tokens), rtol=1e-4, atol=1e-5)
    # The parameter names are the same.
    theirs.load_state_dict(adapter.state_dict())


def test_kind_attention_is_equation_4() -> None:
    adapter = trained(32, 1, "attention")
    h_tgt, h_retr = torch.randn(2, 6, 32), torch.randn(2, 3, 5, 32)
    with torch.no_grad():
        q = h_tgt @ adapter.to_q.weight.T
        rows = h_retr.flatten(1, 2)
        k, v = rows @ adapter.to_k.weight.T, rows @ adapter.to_v.weight.T
        g = torch.softmax(q @ k.transpose(1, 2) / 32**0.5, dim=-1) @ v
        expected = h_tgt + 0.5 * (g @ adapter.proj_out.weight.T + adapter.proj_out.bias)
        ours = adapter(h_tgt, h_retr, torch.full((2,), 0.5))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_only_valid_neighbours_are_attended_to(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    batch, tokens, k, retrieved = (data.draw(st.integers(1, 4)) for _ in range(4))
    channels = data.draw(st.sampled_from([16, 24, 64]))
    impl = data.draw(st.sampled_from(["auto", "reference", "sdpa"]))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    adapter = trained(channels, kind=kind)
    h_tgt, h_retr, lam = (
        torch.randn(batch, tokens, channels),
        torch.randn(batch, k, retrieved, channels),
        torch.rand(batch),
    )
    valid = torch.tensor(
        data.draw(st.lists(st.lists(st.booleans(), min_size=k, max_size=k), min_size=batch, max_size=batch))
    )
    # Rows that were not gathered are uninitialized memory.
    dirty = torch.where(valid[..., None, None], h_retr, torch.tensor(float("nan")))
    with torch.no_grad():
        got = adapter(h_tgt, dirty, lam, valid, impl)
        delta = adapter.delta(h_tgt, adapter.retrieved_kv(dirty, impl), valid, impl)
        assert torch.isfinite(delta).all()
        for row in range(batch):
            some = valid[row]
            if not some.any():
                assert torch.equal(got[row], h_tgt[row])
                continue
            # The same as without the invalid neighbours.
            one = slice(row, row + 1)
            alone = adapter(h_tgt[one], h_retr[one][:, some], lam[one])
            torch.testing.assert_close(got[one], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["auto", "reference", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_neighbour_or_equal_lambdas_keep_the_bits_of_one_lambda(kind: str, impl: str) -> None:
    adapter = trained(32, kind=kind)
    h_tgt, lam = torch.randn(2, 6, 32), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        for k in (1, 3):
            h_retr = torch.randn(2, k, 4, 32)
            each = lam[:, None].expand(2, k)
            assert torch.equal(adapter(h_tgt, h_retr, each, None, impl), adapter(h_tgt, h_retr, lam, None, impl))


@pytest.mark.parametrize("kind", KINDS)
def test_each_neighbours_values_are_scaled_by_its_share_of_the_largest_lambda(kind: str) -> None:
    adapter = trained(32, kind=kind)
    h_tgt, h_retr = torch.randn(2, 6, 32), torch.randn(2, 3, 4, 32)
    lam, valid = (
        torch.tensor([[0.2, 0.8, 0.9], [0.0, 0.0, 0.5]]),
        torch.tensor([[True, True, False], [True, True, False]]),
    )
    with torch.no_grad():
        kv = adapter.retrieved_kv(h_retr)
        scaled = RetrievedKV(kv.k, kv.v * torch.tensor([0.25, 1, float("nan")])[None, :, None, None])
        got = adapter(h_tgt, kv, lam, valid)
        expected = adapter(h_tgt, scaled, torch.tensor([0.8, 0.0]), valid)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    # No valid neighbour has a λ above 0.
    assert torch.equal(got[1], h_tgt[1])
    weighted, most = kv.weighted(lam)
    assert weighted.k.stride() == weighted.v.stride() and most.tolist() == pytest.approx([0.9, 0.5])


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_lie_side_by_side_and_their_order_does_not_matter(kind: str) -> None:
    adapter = trained(32, kind=kind)
    h_tgt, h_retr, lam = torch.randn(2, 6, 32), torch.randn(2, 3, 4, 32), torch.rand(2)
    with torch.no_grad():
        together = adapter(h_tgt, h_retr, lam)
        as_one = adapter(h_tgt, h_retr.flatten(1, 2)[:, None], lam)
        turned = adapter(h_tgt, h_retr.flip(1), lam)
    torch.testing.assert_close(together, as_one, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together, turned, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["sdpa", "reference", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_phrase_embeddings_tell_which_phrase_a_neighbour_belongs_to(kind: str, impl: str) -> None:
    """Two neighbours of each of two phrases. The second prompt has one phrase, and padding."""
    adapter = trained(64, 4, kind, phrases=2)
    assert adapter.phrase is not None
    h_tgt, h_retr, lam = torch.randn(2, 6, 64), torch.randn(2, 4, 3, 64), torch.tensor([0.5, 0.9])
    phrases = torch.tensor([[True, True], [True, False]])
    valid = phrases.repeat_interleave(2, 1)
    told = h_retr.clone()
    told[0, :2] += adapter.phrase[0].detach()
    told[0, 2:] += adapter.phrase[1].detach()
    with torch.no_grad():
        got = adapter(h_tgt, h_retr, lam, valid, impl, phrases)
        torch.testing.assert_close(got, adapter(h_tgt, told, lam, valid, impl), rtol=1e-4, atol=1e-5)
        assert (got[0] - adapter(h_tgt, h_retr, lam, valid, impl)[0]).abs().max() > 1e-3


def test_phrases_beyond_the_table_share_its_last_embedding() -> None:
    adapter = trained(32, phrases=2)
    h_retr, four = torch.zeros(1, 4, 3, 32), torch.ones(1, 4, dtype=torch.bool)
    with torch.no_grad():
        k = adapter.retrieved_kv(h_retr, "sdpa", four).k[0, :, 0]
    assert torch.equal(k[1], k[2]) and torch.equal(k[2], k[3]) and not torch.equal(k[0], k[1])


@pytest.mark.parametrize("kind", KINDS)
def test_another_neighbour_or_lambda_changes_the_result(kind: str) -> None:
    adapter = trained(32, kind=kind)
    h_tgt, h_retr, lam = torch.randn(2, 6, 32), torch.randn(2, 3, 4, 32), torch.tensor([0.5, 0.9])
    other = h_retr.clone()
    other[0, 1] = torch.randn(4, 32)
    with torch.no_grad():
        base = adapter(h_tgt, h_retr, lam)
        changed = adapter(h_tgt, other, lam)
        assert (changed[0] - base[0]).abs().max() > 1e-3 and torch.equal(changed[1], base[1])
        assert torch.equal(adapter(h_tgt, h_retr, torch.zeros(2)), h_tgt)
        assert not torch.allclose(adapter(h_tgt, h_retr, lam * 0.5), base, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_retrieval_branch_can_run_first(kind: str) -> None:
    adapter = trained(32, kind=kind)
    h_tgt, h_retr, lam = torch.randn(2, 6, 32), torch.randn(2, 3, 4, 32), torch.rand(2)
    valid = torch.tensor([[True, False, True], [True, True, True]])
    with torch.no_grad():
        kv = adapter.retrieved_kv(h_retr)
        assert kv.k.shape == kv.v.shape == h_retr.shape
        assert torch.equal(adapter(h_tgt, kv, lam, valid), adapter(h_tgt, h_retr, lam, valid))


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_give_one_result(kind: str) -> None:
    adapter = trained(32, kind=kind)
    h_retr, lam = torch.randn(2, 2, 4, 32), torch.rand(2)
    h = torch.randn(2, 32, 3, 3).to(memory_format=torch.channels_last)
    view, copied = h.permute(0, 2, 3, 1).flatten(1, 2), h.contiguous().flatten(2).transpose(1, 2)
    assert view.is_contiguous() and not copied.is_contiguous()
    with torch.no_grad():
        torch.testing.assert_close(adapter(view, h_retr, lam), adapter(copied, h_retr, lam), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns(kind: str) -> None:
    adapter = trained(32, kind=kind, phrases=2).train()
    phrases = torch.ones(2, 2, dtype=torch.bool)
    out = adapter(torch.randn(2, 6, 32), torch.randn(2, 2, 4, 32), torch.rand(2), phrases=phrases)
    out.square().sum().backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@settings(deadline=None, max_examples=100)
@given(channels=st.integers(1, 2048))
def test_heads_and_groups_divide_any_width(channels: int) -> None:
    heads, groups = default_heads(channels), norm_groups(channels)
    assert channels % heads == 0 and channels % groups == 0 and 1 <= groups <= 32
    if channels % 64 == 0:
        assert heads == channels // 64
    if channels % 32 == 0 and channels >= 64:
        assert groups == 32
    assert channels == 1 or channels // groups >= 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_comes_back_as_it_was(tmp_path: Path, kind: str) -> None:
    adapter = trained(48, 6, kind, phrases=3)
    adapter.save(tmp_path)
    for path in (tmp_path, tmp_path / FILE):
        again = HSpaceAdapter.load(path, channels=48)
        assert (again.kind, again.channels, again.heads) == (kind, 48, 6)
        for name, value in adapter.state_dict().items():
            assert torch.equal(again.state_dict()[name], value)
    # fp16 stays fp16 on disk.
    copy.deepcopy(adapter).half().save(tmp_path / "half")
    assert HSpaceAdapter.load(tmp_path / "half").to_q.weight.dtype == torch.float16 if kind == "attention" else True


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    trained(48).save(tmp_path)
    with pytest.raises(ModelError, match="width 48.*64 channels"):
        HSpaceAdapter.load(tmp_path, channels=64)
    with pytest.raises(ModelError, match="width 48.*32"):
        trained(48)(torch.randn(1, 2, 32), torch.randn(1, 1, 2, 32), torch.ones(1))
    data = (tmp_path / FILE).read_bytes()
    for cut in (0, 5, 200, len(data) - 1):
        (tmp_path / "cut.safetensors").write_bytes(data[:cut])
        with pytest.raises(ModelError, match="cut.safetensors is not a complete safetensors file"):
            HSpaceAdapter.load(tmp_path / "cut.safetensors")
    with pytest.raises(ModelError, match="ragturbo convert"):
        HSpaceAdapter.load(tmp_path / "adapter.pt")
    with pytest.raises(ModelError, match="no file"):
        HSpaceAdapter.load(tmp_path / "nowhere")
    state = load_file(tmp_path / FILE)
    save_file(state, tmp_path / "bare.safetensors")
    with pytest.raises(ModelError, match="not an adapter"):
        HSpaceAdapter.load(tmp_path / "bare.safetensors")
    newer = {"version": "2", "kind": "transformer", "channels": "48", "heads": "1"}
    save_file(state, tmp_path / "newer.safetensors", metadata=newer)
    with pytest.raises(ModelError, match="'2'"):
        HSpaceAdapter.load(tmp_path / "newer.safetensors")
    state.pop("proj_in.weight")
    save_file(state, tmp_path / "holes.safetensors", metadata={**newer, "version": "1"})
    with pytest.raises(ModelError, match="proj_in.weight"):
        HSpaceAdapter.load(tmp_path / "holes.safetensors")
    for wrong in ({"heads": "five"}, {"kind": "mlp"}, {"channels": "-3"}):
        save_file(state, tmp_path / "odd.safetensors", metadata={**newer, "version": "1", **wrong})
        with pytest.raises(ModelError):
            HSpaceAdapter.load(tmp_path / "odd.safetensors")


def test_wrong_shapes_are_requests_refused() -> None:
    adapter = trained(32)
    h_tgt, h_retr, lam = torch.randn(2, 6, 32), torch.randn(2, 3, 4, 32), torch.rand(2)
    bad: list[tuple[Tensor, ...]] = [
        (h_tgt[0], h_retr, lam),
        (h_tgt, h_retr[0], lam),
        (h_tgt, h_retr[:1], lam),
        (h_tgt, h_retr, lam[:1]),
        (h_tgt, h_retr, lam[:, None]),
        (h_tgt, h_retr, lam, torch.ones(2, 2, dtype=torch.bool)),
    ]
    for arguments in bad:
        with pytest.raises(InvalidRequest):
            adapter(*arguments)
    with pytest.raises(InvalidRequest, match="impl"):
        adapter(h_tgt, h_retr, lam, None, "fastest")
    with pytest.raises(ModelError, match="30 channels.*4 heads"):
        HSpaceAdapter(30, 4)
    with pytest.raises(ModelError, match="mlp"):
        HSpaceAdapter(32, kind="mlp")


def test_the_softmax_is_taken_over_all_neighbours_together() -> None:
    """It is not an average of one softmax per neighbour: a better match draws attention from the others."""
    adapter = trained(32, 1, "attention")
    torch.nn.init.eye_(adapter.to_q.weight)
    torch.nn.init.eye_(adapter.to_k.weight)
    torch.nn.init.eye_(adapter.to_v.weight)
    torch.nn.init.eye_(adapter.proj_out.weight)
    torch.nn.init.zeros_(adapter.proj_out.bias)
    target = F.one_hot(torch.tensor([[0]]), 32).float() * 30
    fits, other = target, F.one_hot(torch.tensor([[1]]), 32).float() * 30
    with torch.no_grad():
        got = adapter(target, torch.stack([fits, other], dim=1), torch.ones(1))
    torch.testing.assert_close(got, target + fits, rtol=1e-4, atol=1e-4)


# Without a GPU, the kernels run in Triton's interpreter.
@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_ops_are_the_module(kind: str, impl: str) -> None:
    adapter = trained(64, 4, kind)
    h_tgt, h_retr, lam = torch.randn(3, 6, 64), torch.randn(3, 2, 4, 64), torch.tensor([0.5, 0.9, 0.3])
    valid = torch.tensor([[True, False], [True, True], [False, False]])
    h_retr[0, 1] = float("nan")
    with torch.no_grad():
        expected = adapter(h_tgt, h_retr, lam, valid, "sdpa")
        fused = adapter(h_tgt, h_retr, lam, valid, impl)
        assert torch.equal(fused[2], h_tgt[2])
        torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(adapter(h_tgt, adapter.retrieved_kv(h_retr, impl), lam, valid, impl), fused)


def test_kernels_without_a_backward_pass_do_not_train() -> None:
    with pytest.raises(InvalidRequest, match="backward"):
        trained(32)(torch.randn(1, 2, 32), torch.randn(1, 1, 2, 32), torch.ones(1), None, "triton")
