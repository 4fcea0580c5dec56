"""The arenas of one spec: where a request's values are written, and where its results are read."""

from __future__ import annotations

import torch

from ragturbo.engine.arena import Arena
from ragturbo.engine.spec import Spec
from ragturbo.model.bundle import Bundle

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Buffers:
    """Five arenas, each copied as a whole: text_inputs and inputs to the device, to_host and from_host around the
    host's part of a split retrieval, out back to the host."""

    def __init__(self, spec: Spec, bundle: Bundle, *, page_locked: bool) -> None:
        def arena(layout: Layout) -> Arena:
            return Arena(layout, bundle.device, page_locked=page_locked)

        self.text_inputs = arena(_text_inputs(spec, bundle))
        self.inputs = arena(_inputs(spec, bundle))
        self.to_host = arena(_to_host(spec, bundle))
        self.from_host = arena(_from_host(spec, bundle))
        self.out = arena(_out(spec, bundle))


def _text_inputs(spec: Spec, bundle: Bundle) -> Layout:
    """What the text encoder reads, or what replaces its output."""
    text, n, layout = bundle.text, spec.rows, Layout()
    if spec.has_ids:
        layout["input_ids"] = ((n, spec.length), torch.int64)
    elif not spec.cached:
        layout["text"] = ((n, spec.length, text.width), bundle.dtype)
    if spec.query == "ids":
        layout["query_ids"] = ((n, spec.phrases, text.max_length), torch.int64)
    elif spec.query == "key":
        layout["query_key"] = ((n, text.key_dim), torch.float32)
    return layout


def _inputs(spec: Spec, bundle: Bundle) -> Layout:
    """The request's other inputs."""
    n, k, width = spec.rows, spec.k, bundle.text.key_dim
    layout: Layout = {"latents": ((n, *spec.latents), torch.float32)}
    if spec.mode != "none":
        layout |= {name: ((n,), torch.float32) for name in ("lam", "w", "min_score")}
    if spec.searches:
        layout["tables"] = ((4, 2), torch.int64)
    if spec.phrases > 1:
        layout["searched"] = ((n, spec.phrases), torch.bool)
    if spec.centred:
        layout["mean"] = ((width,), torch.float32)
    if spec.retrieval == "given":
        assert spec.stored is not None
        layout |= _found(n, k, width) | {"h_retr": ((n, k, *spec.stored[2:]), bundle.dtype)}
    return layout


def _to_host(spec: Spec, bundle: Bundle) -> Layout:
    """What the host needs in a split retrieval: the search key, or the rows that the device found."""
    if spec.retrieval == "host":
        return {"key": (spec.key_shape(bundle.text.key_dim), torch.float32)}
    if spec.retrieval == "fetched":
        shape = (spec.rows, spec.k)
        return {"rows": (shape, torch.int64), "scores": (shape, torch.float32)}
    return {}


def _from_host(spec: Spec, bundle: Bundle) -> Layout:
    """Results of the host's part of a split retrieval, and the addresses of the features."""
    if not spec.split:
        return {}
    n, k = spec.rows, spec.k
    slots: Layout = {name: ((n, k), torch.int64) for name in ("slots", "hot")}
    return _found(n, k, bundle.text.key_dim) | slots | {"tables": ((4, 2), torch.int64)}


def _out(spec: Spec, bundle: Bundle) -> Layout:
    n, k, factor = spec.rows, spec.k, bundle.vae.factor
    layout: Layout = {"ok": ((n,), torch.bool), "latents_ok": ((n,), torch.bool)}
    if spec.mode != "none":
        layout |= {"lam": ((n,), torch.float32), "valid": ((n, k), torch.bool)}
        layout |= {name: ((n, k), torch.float32) for name in ("scores", "cosine", "lams")}
    if spec.searches:
        layout["rows"] = ((n, k), torch.int64)
    height, width = (side * factor for side in spec.latents[1:])
    if spec.want == "latent":
        layout["latents"] = ((n, *spec.latents), torch.float32)
    elif spec.want == "float":
        layout["image"] = ((n, 3, height, width), torch.float32)
    else:
        layout["uint8"] = ((n, height, width, 3), torch.uint8)
    return layout


def _found(rows: int, k: int, width: int) -> Layout:
    return {
        "ids": ((rows, k), torch.int64),
        "scores": ((rows, k), torch.float32),
        "rare_share": ((rows, k), torch.float32),
        "keys": ((rows, k, width), torch.float32),
    }
