"""The page at /docs: plain HTML made from the OpenAPI schema, without scripts, styles or fonts of other hosts."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from html import escape
from typing import Any

from ragturbo.serve.config import ServeConfig
from ragturbo.serve.field_errors import allowed
from ragturbo.serve.paths import IMAGES

HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}
STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
pre { background: #f3f3f3; padding: 1rem; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
td, th { border-bottom: 1px solid #ddd; padding: .3rem .6rem .3rem 0; text-align: left; vertical-align: top; }
"""
UNKNOWN = {
    False: "Refused with status 400, as are query parameters.",
    True: "Ignored, as are query parameters; <code>notes</code> in the response lists them.",
}
PROMPT = "a red circle left of a blue square"


def render(openapi: dict[str, Any], config: ServeConfig, sizes: dict[str, int] | None, *, base_url: str) -> str:
    """Return the page.

    Args:
        sizes: `Service.sizes()`, or None while the model is being loaded.
        base_url: where this server was asked, for the examples.
    """
    schema = f"<a href='{escape(base_url)}/openapi.json'>openapi.json</a>"
    parts = [
        f"<h1>{escape(config.model_id)} on ragturbo {escape(openapi['info']['version'])}</h1>",
        f"<p>Images from text, for OpenAI's clients. The same in JSON: {schema}.</p>",
        "<h2>Examples</h2>",
        f"<pre>{escape(_curl(base_url, config))}</pre><pre>{escape(_python(base_url, config))}</pre>",
        "<h2>Sizes</h2>",
        f"<p>{escape(_sizes(sizes))}</p>",
        "<h2>Unknown fields</h2>",
        f"<p>{UNKNOWN[config.lenient]}</p>",
    ]
    described: set[str] = set()
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2>{method.upper()} {escape(path)}</h2><p>{escape(operation['summary'])}</p>")
            parts += _operation(operation, openapi["components"]["schemas"], described)
    parts += [
        "<h2>Errors</h2>",
        "<p>Every error is a JSON object of this form, where <code>param</code> names the field at fault, or is null:"
        '</p><pre>{"error": {"message": "…", "type": "invalid_request_error", "param": "size", "code": '
        '"invalid_value"}}</pre>',
    ]
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(config.model_id)}</title>"
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )


def _operation(operation: dict[str, Any], schemas: dict[str, Any], described: set[str]) -> Iterable[str]:
    """described: the schemas that have a table already; this adds to it."""
    if "requestBody" in operation:
        body = operation["requestBody"]["content"]["application/json"]["schema"]
        yield "<h3>Fields of the request</h3><p>Null is the same as leaving a field out.</p>"
        yield _fields(body, required=body.get("required", []))
    success = operation["responses"]["200"].get("content", {}).get("application/json", {}).get("schema", {})
    for name in _names_below(success, schemas):
        if name not in described:
            described.add(name)
            yield f"<h3>Response: {escape(name)}</h3>"
            yield _fields(schemas[name])
    rows = [(code, answer.get("description", "")) for code, answer in operation["responses"].items()]
    yield "<h3>Statuses</h3>" + _table(("status", "meaning"), rows)


def _fields(schema: dict[str, Any], required: Iterable[str] = ()) -> str:
    rows = [
        (name, _kind(field) + (" (required)" if name in required else ""), field.get("description", ""))
        for name, field in schema["properties"].items()
    ]
    return _table(("field", "value", "meaning"), rows)


def _kind(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return _name(field)
    if isinstance(items := field.get("items"), dict):
        kind = _kind(items)
        return f"a list of {kind.removeprefix('a ')}s" if kind.startswith("a ") else f"a list of {kind}"
    kinds = [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]
    if kinds and kinds[0] is not field:
        return _kind(kinds[0])
    values = allowed(field)
    return "not supported" if values == "null" else values


def _names_below(schema: dict[str, Any], schemas: dict[str, Any]) -> list[str]:
    """Return the names of the schema and of all that it refers to, outermost first."""
    names: list[str] = []

    def visit(node: Any) -> None:
        if isinstance(node, dict):
            if "$ref" in node and (name := _name(node)) not in names:
                names.append(name)
                visit(schemas[name])
            for value in node.values():
                visit(value)
        elif isinstance(node, list):
            for value in node:
                visit(value)

    visit(schema)
    return names


def _name(reference: dict[str, Any]) -> str:
    return str(reference["$ref"]).rpartition("/")[2]


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _sizes(sizes: dict[str, int] | None) -> str:
    if sizes is None:
        return "The model is being loaded; its sizes are not known yet."
    text = "'auto' is {default}x{default}; sides are multiples of {step} from {step} to {most} pixels."
    return text.format(**sizes)


def _curl(base_url: str, config: ServeConfig) -> str:
    key = " -H 'Authorization: Bearer KEY'" if config.api_keys else ""
    body = f'{{"prompt": "{PROMPT}", "seed": 7}}'
    url = shlex.quote(base_url + IMAGES)
    return (
        f"curl -s {url}{key} -H 'Content-Type: application/json' \\\n  -d '{body}' \\\n"
        "  | python3 -c 'import base64, json, sys; "
        'sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))\' > image.png'
    )


def _python(base_url: str, config: ServeConfig) -> str:
    key = "KEY" if config.api_keys else "unused"
    return (
        "import base64\n"
        "from openai import OpenAI\n\n"
        f'client = OpenAI(base_url={base_url + "/v1"!r}, api_key="{key}")\n'
        f'answer = client.images.generate(prompt="{PROMPT}", extra_body={{"seed": 7}})\n'
        'open("image.png", "wb").write(base64.b64decode(answer.data[0].b64_json))'
    )
