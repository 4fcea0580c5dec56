"""`ragturbo data relabel`: teacher latents with other prompts for the student.

The student learns to draw from a new prompt what the teacher drew from its own, without drawing it again: from a short
caption in place of a detailed one, or from a name in place of a description.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ragturbo.model.bundle import Bundle
from ragturbo.train.folder import Plan, check_relabel, remaining
from ragturbo.train.progress import loading, local_device, rank_and_world, track
from ragturbo.train.report import DataReport, Left, gather
from ragturbo.train.shards import Shards, digest, write_shard


@torch.no_grad()
def relabel(
    data: str | Path, prompts: Sequence[str | None], out: str | Path, *, model: str, batch: int = 256,
    device: str | None = None,
) -> DataReport:  # fmt: skip
    """Write this process's share of the missing shards.

    Args:
        data: a folder made by `ragturbo data teacher`.
        prompts: for each of its samples in order; None or "" leaves the sample out.
        model: its text encoder is used.
    """
    began, source = time.monotonic(), Shards(data)
    check_relabel(source.folder, prompts)
    with loading(model):
        bundle = Bundle.load(model, device=device or local_device(), adapter=False)
    store_text = "text" in source.fields
    made_by = source.plan.made_by | {"relabelled": digest([text or "" for text in prompts])}
    plan = Plan("teacher", source.plan.inputs, source.plan.shard_size, made_by)
    folder = Path(out).expanduser()
    plan.check(folder)
    todo = remaining(folder, plan.shards, *rank_and_world())
    for shard in track(todo, len(todo), "relabel"):
        start, records = int(source.starts[shard]), source.records(shard)
        rows, left = [row for row in range(len(records)) if prompts[start + row]], Left()
        for row in sorted(set(range(len(records))).difference(rows)):
            left.skip(start + row, records[row]["caption"], "the prompt is empty")
        texts = [str(prompts[start + row]) for row in rows]
        kept = torch.tensor(rows, dtype=torch.int64)
        names = {"latents": "latents", "noise": "noise", "input_ids": "teacher_ids"}
        names |= {"text": "teacher_text"} if store_text else {}
        fields = {new: source.tensor(shard, old)[kept] for old, new in names.items()}
        fields |= _encode(bundle, texts, batch, left, fields["teacher_text"].dtype if store_text else None)
        own = [{**records[row], "caption": text, "teacher_caption": records[row]["caption"]} for row, text in
               zip(rows, texts, strict=True)]  # fmt: skip
        plan.write_or_check(folder)
        write_shard(folder, shard, fields, own, left.to_dict())
    return gather(folder, "sample", plan.shards, len(todo), began)


def _encode(bundle: Bundle, texts: list[str], batch: int, left: Left, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tokens of the texts and, in `dtype`, their states and keys."""
    tokens = bundle.text.tokenize(texts)
    left.note_tokens(texts, tokens)
    ids = tokens.input_ids
    fields = {"input_ids": ids.to(torch.int32)}
    if dtype is None or not texts:
        return fields
    states = [bundle.text.encode(part.to(bundle.device)) for part in ids.split(batch)]
    fields["text"] = torch.cat([part.hidden_states.to(dtype).cpu() for part in states])
    fields["key"] = torch.cat([part.key.cpu() for part in states])
    return fields
