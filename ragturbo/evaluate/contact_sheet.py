"""Write DIR/sheet.html: every prompt's images, with seeds, scores and neighbours, and a blind vote between two systems.

The page needs no server; it links the images in DIR/images.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ragturbo.evaluate.images import image_path, neighbor_path, read_notes, write_file
from ragturbo.evaluate.scores import ImageScore
from ragturbo.evaluate.suites import Prompt, Suite
from ragturbo.evaluate.systems import SystemSpec

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 14px system-ui, sans-serif; margin: 1.5rem; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .4rem; vertical-align: top; text-align: left; }}
img {{ width: 192px; image-rendering: pixelated; display: block; }}
small {{ color: #666; display: block; max-width: 192px; }}
td.prompt {{ max-width: 16rem; }}
figure {{ display: inline-block; margin: .3rem .3rem 0 0; width: 92px; vertical-align: top; }}
figure img {{ width: 64px; }} figcaption {{ color: #666; font-size: 11px; }}
#vote img {{ cursor: pointer; width: 256px; }} #vote td {{ padding-right: 1rem; }}
</style>
<h1>{title}</h1>
<h2>Blind vote</h2>
<p>Which shows the prompt better? Click it. Sides are shuffled; votes stay in this browser.
<label>A <select id="a"></select></label> <label>B <select id="b"></select></label>
<button id="even">Neither</button> <button id="reset">Start over</button> <span id="tally"></span></p>
<div id="vote"></div>
<h2>All images</h2>
<table><tr><th>prompt</th>{heads}</tr>
{rows}
</table>
<script>
const data = {data};
const key = "ragturbo-votes:" + data.title;
let votes = JSON.parse(localStorage.getItem(key) || "[]"), shown = null;
const get = id => document.getElementById(id);
for (const id of ["a", "b"]) data.systems.forEach((name, i) => get(id).add(new Option(name, i)));
get("b").selectedIndex = Math.min(1, data.systems.length - 1);
function show() {{
  const pair = [+get("a").value, +get("b").value];
  if (Math.random() < .5) pair.reverse();
  shown = {{prompt: Math.floor(Math.random() * data.prompts.length), pair}};
  const p = data.prompts[shown.prompt], row = document.createElement("table"), tr = row.insertRow();
  pair.forEach((system, side) => {{
    const image = document.createElement("img");
    image.src = p.images[system]; image.onclick = () => vote(side);
    tr.insertCell().append(image);
  }});
  const text = document.createElement("p"); text.textContent = p.text;
  get("vote").replaceChildren(text, row); count();
}}
function vote(side) {{
  votes.push({{prompt: shown.prompt, pair: shown.pair, won: side === null ? null : shown.pair[side]}});
  localStorage.setItem(key, JSON.stringify(votes)); show();
}}
function count() {{
  const a = +get("a").value, b = +get("b").value;
  const held = votes.filter(v => v.pair.includes(a) && v.pair.includes(b));
  const of = w => held.filter(v => v.won === w).length;
  get("tally").textContent = `${{data.systems[a]}} ${{of(a)}}, ${{data.systems[b]}} ${{of(b)}}, neither ${{of(null)}}`;
}}
get("even").onclick = () => vote(null);
get("reset").onclick = () => {{ votes = []; localStorage.removeItem(key); show(); }};
get("a").onchange = get("b").onchange = show;
show();
</script></html>
"""


Scores = Mapping[str, Mapping[str, ImageScore]]
"""By metric and prompt id."""


def write_sheet(
    out: Path,
    suite: Suite,
    specs: Sequence[SystemSpec],
    titles: Sequence[str],
    scores: Sequence[Scores],
    limit: int = 200,
) -> None:
    """Write the page for the first `limit` prompts; thousands of images would load slowly.

    titles, scores: of each system.
    """
    prompts = suite.prompts[:limit]
    notes = [read_notes(out, spec) for spec in specs]
    rows = []
    for prompt in prompts:
        cells = [f'<td class="prompt">{html.escape(prompt.text)}<small>{html.escape(prompt.group)}</small></td>']
        for spec, by_prompt, found in zip(specs, notes, scores, strict=True):
            note = by_prompt.get(prompt.id, {})
            lines = [f"{metric} {of[prompt.id].value:.3f}" for metric, of in found.items() if prompt.id in of]
            lines += [f"seed {note.get('seed', prompt.seed)}", note.get("chosen", "")]
            small = f"<small>{html.escape(' · '.join(filter(None, lines)))}</small>"
            cells.append(
                f'<td><img loading="lazy" src="{_src(out, spec, prompt)}" alt="">{small}{_neighbors(out, note)}</td>'
            )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    data = {
        "title": suite.title,
        "systems": list(titles),
        "prompts": [{"text": p.text, "images": [_src(out, spec, p) for spec in specs]} for p in prompts],
    }
    page = _PAGE.format(
        title=html.escape(suite.title),
        heads="".join(f"<th>{html.escape(title)}</th>" for title in titles),
        rows="\n".join(rows),
        # "</" in a prompt could end the script element.
        data=json.dumps(data).replace("</", "<\\/"),
    )
    write_file(out / "sheet.html", page)


def _neighbors(out: Path, note: Mapping[str, Any]) -> str:
    """The thumbnails of the neighbours, where the database has them, and their captions."""
    cells = []
    captions = note.get("neighbors", [])
    for id, caption in zip(note.get("neighbor_ids", [-1] * len(captions)), captions, strict=True):
        path = neighbor_path(out, id)
        image = f'<img loading="lazy" src="{path.relative_to(out).as_posix()}" alt="">' if path.exists() else ""
        number = "" if id < 0 else f"#{id} "
        cells.append(f"<figure>{image}<figcaption>{number}{html.escape(caption)}</figcaption></figure>")
    return f"<div>{''.join(cells)}</div>" if cells else ""


def _src(out: Path, spec: SystemSpec, prompt: Prompt) -> str:
    return html.escape(image_path(out, spec, prompt).relative_to(out).as_posix(), quote=True)
