"""The endpoint as a client sees it: OpenAI's client, fields, errors and API keys."""

from __future__ import annotations

import asyncio
import base64
import hmac
import io
import json
import logging
import socket

import httpx
import openai
import pytest
from PIL import Image

from ragturbo.errors import GenerationError, InvalidRequest
from ragturbo.retrieval.features import CacheStats
from ragturbo.serve.app import create_app
from ragturbo.serve.config import ServeConfig, read_keys
from ragturbo.serve.metrics import Metrics
from ragturbo.serve.service import Service

PROMPT = "a red circle left of a blue square"
PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_openais_own_client_gets_the_image_that_generate_makes(client, gen):
    answer = client.images.generate(prompt=PROMPT, response_format="b64_json", extra_body={"seed": 7})
    assert base64.b64decode(answer.data[0].b64_json) == gen(PROMPT, seed=7, output_type="png").images[0]
    assert [model.id for model in client.models.list()] == ["shapes"] and answer.model == "shapes"


def test_ours_beside_openais_fields(client, gen):
    ours = {"seed": 3, "mode": "slerp", "w": 0.6, "num_neighbors": 2, "min_score": -1.0, "compose": True}
    ours["return_neighbors"] = True
    answer = client.images.generate(
        model="shapes", prompt=PROMPT, n=2, size="64x64", output_format="webp", extra_body=ours
    )
    same = gen(
        PROMPT, seed=3, num_images_per_prompt=2, mode="slerp", w=0.6, num_neighbors=2, compose=True, output_type="webp"
    )
    assert len(same.neighbors[0]) == 4
    assert [base64.b64decode(image.b64_json) for image in answer.data] == same.images
    assert [image.seed for image in answer.data] == [3, 4]
    for image, row in zip(answer.data, same.neighbors, strict=True):
        assert [n["id"] for n in image.neighbors] == [n.id for n in row]
        assert image.neighbors[0].keys() == {"id", "caption", "score", "lam", "used", "cosine", "bm25"}
    assert (answer.mode, answer.size, answer.output_format) == ("slerp", "64x64", "webp")
    assert {"queue", "text", "search", "decode", "vae", "total"} <= answer.timings.keys()


@pytest.mark.parametrize(("kind", "name"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP"), (None, "PNG")])
def test_every_format_is_what_it_says(server, kind, name):
    answer = server.post(prompt=PROMPT, seed=1, output_format=kind).json()
    image = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    assert (image.format, image.size) == (name, (64, 64)) and "neighbors" not in answer["data"][0]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"style": "vivid"}, "style"),
        ({"quality": "hd"}, "quality"),
        ({"user": 7}, "user"),
        ({"stream": True}, "stream"),
        ({"image_url": "http://127.0.0.1/"}, "image_url"),
        ({"response_format": "url"}, "response_format"),
        ({"output_format": "gif"}, "output_format"),
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"n": "2"}, "n"),
        ({"size": "64"}, "size"),
        ({"size": "256x64"}, "size"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"num_neighbors": 17}, "num_neighbors"),
        ({"mode": "best"}, "mode"),
        ({"w": 1.5}, "w"),
        ({"prompt": "a" * 4001}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
    ],
)
def test_a_field_that_cannot_be_used_is_refused_by_name(server, body, param):
    answer = server.post(**{"prompt": PROMPT, **body})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param, error
    assert error["type"] == "invalid_request_error" and param in error["message"] + str(error["param"])


@pytest.mark.parametrize(
    "body",
    [
        {"mode": "none", "w": 0.5},
        {"mode": "none", "num_neighbors": 2},
        {"size": "30x64"},
        {"prompt": " \t "},
    ],
)
def test_what_would_have_no_effect_is_refused_by_the_model_itself(server, body):
    answer = server.post(**{"prompt": PROMPT, **body})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_value"


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b'{"prompt": "\\ud800"}', b'{"prompt": "a", "w": NaN}', b"[" * 5000, b"\xff", b"null", b"1" * 5000],
)
def test_what_is_no_request_is_refused_in_openais_form(server, raw):
    answer = server.http.post(PATH, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"].keys() == {"message", "type", "param", "code"}


def test_neighbours_that_nothing_was_blended_with_are_not_promised(server, gen, monkeypatch):
    answer = server.post(prompt=PROMPT, mode="none", return_neighbors=True)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "return_neighbors"
    assert server.post(prompt=PROMPT, mode="none", return_neighbors=False).status_code == 200
    monkeypatch.setattr(gen, "_database", None)
    assert server.post(prompt=PROMPT, return_neighbors=True).json()["error"]["param"] == "return_neighbors"
    assert server.post(prompt=PROMPT).json()["mode"] == "none"


def test_a_query_string_is_refused_where_nothing_reads_it(server):
    answer = server.http.post(f"{PATH}?n=2", json={"prompt": PROMPT})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "unknown_parameter"


def test_other_refusals_have_the_same_form(server):
    refused = {
        404: server.post(prompt=PROMPT, model="dall-e-3"),
        405: server.http.get(PATH),
        413: server.post(prompt="a" * 70_000),
        415: server.http.post(PATH, content=json.dumps({"prompt": PROMPT}), headers={"content-type": "text/plain"}),
    }
    for status, answer in refused.items():
        assert answer.status_code == status and answer.json()["error"]["message"]
    assert refused[404].json()["error"]["code"] == "model_not_found"
    assert server.http.get("/nowhere").json()["error"]["code"] == "not_found"
    # FastAPI's documentation pages, which load scripts from other hosts, are off.
    assert server.http.get("/redoc").status_code == 404


def test_a_body_without_an_announced_length_is_cut_off_at_the_limit(server):
    def endless():
        for _ in range(10_000):
            yield b'{"prompt": "' + b"a" * 10_000

    try:
        answer = server.http.post(PATH, content=endless(), headers={"content-type": "application/json"})
        assert answer.status_code == 413
    except httpx.TransportError:
        # The server may close the connection while the body is being sent.
        pass
    assert server.post(prompt=PROMPT).status_code == 200


def test_a_client_that_sends_too_slowly_is_let_go(gen, kit):
    with kit.served(gen, body_timeout=0.2) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as slow:
            slow.sendall(f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode())
            slow.sendall(b'Content-Length: 20\r\n\r\n{"pro')
            assert b"408" in slow.recv(100)


def test_keys_are_asked_for_and_every_one_is_compared(gen, kit, monkeypatch):
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(len(a)) or compare(a, b))
    with kit.served(gen, api_keys=("first", "second", "third")) as server:

        def client(key: str) -> openai.OpenAI:
            return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)

        assert client("second").images.generate(prompt=PROMPT).data
        for wrong in ("fourth", "secon", "second2", "f" * 5000):
            with pytest.raises(openai.AuthenticationError) as refused:
                client(wrong).images.generate(prompt=PROMPT)
            assert refused.value.response.headers["www-authenticate"] == "Bearer"
        # Every request compares all three keys, by digests of equal length.
        assert compared == [32] * 15
        assert server.post(prompt=PROMPT).status_code == server.http.get("/v1/models").status_code == 401
        assert server.http.get("/health/ready").status_code == server.http.get("/metrics").status_code == 200
        assert server.metrics()['ragturbo_rejections_total{reason="invalid_api_key"}'] == 6


def asked(app, method: str, path: str, **request) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://here") as http:
            return await http.request(method, path, **request)

    return asyncio.run(ask())


def test_keys_are_asked_for_where_the_application_is_mounted_in_another():
    from starlette.applications import Starlette
    from starlette.routing import Mount

    outer = Starlette(
        routes=[Mount("/pictures", app=create_app(ServeConfig(api_keys=("key",), admin_keys=("admin",))))]
    )
    for path, key in ((PATH, "key"), ("/admin/database", "admin")):
        for header, status in (({}, 401), ({"Authorization": f"Bearer {key}"}, 503)):
            answer = asked(
                outer, "POST", f"/pictures{path}", json={"prompt": PROMPT} if key == "key" else {}, headers=header
            )
            assert answer.status_code == status, answer.text
    assert asked(outer, "GET", "/pictures/v1/models").status_code == 401


@pytest.mark.parametrize("error", [ValueError, GenerationError])
def test_an_error_nobody_foresaw_has_the_same_form_and_tells_nobody_the_prompt(gen, monkeypatch, caplog, error):
    app = create_app(ServeConfig(admin_keys=("admin",)), generator=gen)
    service = app.state.service
    service.load()

    def fail(*arguments, **options):
        raise error("a unicorn nobody may read about") from KeyError("unicorn")

    async def afail(*arguments, **options):
        fail()

    monkeypatch.setattr(gen, "agenerate", afail)
    monkeypatch.setattr(service, "swap", fail)
    app.add_api_route("/v1/surprise", lambda: fail())
    admin = {"Authorization": "Bearer admin"}
    answers = [asked(app, "POST", PATH, json={"prompt": "a unicorn"}), asked(app, "GET", "/v1/surprise")]
    if error is GenerationError:
        answers.append(asked(app, "POST", "/admin/database", json={}, headers=admin))
    for answer in answers:
        assert answer.status_code == 500 and answer.json()["error"].keys() == {"message", "type", "param", "code"}
        assert answer.json()["error"]["code"] == "server_error" and "unicorn" not in answer.text
    # The log has the exception types and the location, but not the messages.
    assert error.__name__ in caplog.text and "in fail" in caplog.text and "KeyError" in caplog.text
    assert "unicorn" not in caplog.text.replace(
        'raise error("a unicorn nobody may read about") from KeyError("unicorn")', ""
    )
    counted = service.metrics.text().decode()
    assert f'ragturbo_rejections_total{{reason="server_error"}} {len(answers)}.0' in counted
    assert 'ragturbo_requests_total{path="other",status="500"} 1.0' in counted


def test_prompts_are_not_logged_unless_asked_for(gen, kit, caplog):
    secret = " ".join(["unheardof", *["word"] * 300])
    with caplog.at_level(logging.DEBUG), kit.served(gen) as server:
        answer = server.post(prompt=secret, seed=5)
        # The client gets the warning that the log must not contain.
        assert answer.status_code == 200 and "unheardof" in answer.json()["notes"][0]
        assert server.post(prompt=secret, mode="none", w=0.5).status_code == 400
    assert "unheardof" not in caplog.text
    with caplog.at_level(logging.INFO), kit.served(gen, log_prompts=True) as server:
        server.post(prompt=secret)
    assert "unheardof" in caplog.text


def test_a_safety_filter_has_the_last_word(gen, kit, monkeypatch, tmp_path):
    (tmp_path / "house_rules.py").write_text("def blank(batch):\n    return batch * 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with kit.served(gen, postprocess="house_rules:blank") as server:
        data = base64.b64decode(server.post(prompt=PROMPT).json()["data"][0]["b64_json"])
    assert Image.open(io.BytesIO(data)).getextrema() == ((0, 0),) * 3


def test_a_filter_that_returns_no_images_is_the_servers_mistake(gen, kit, monkeypatch, tmp_path):
    (tmp_path / "forgetful_rules.py").write_text("def nothing(batch):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with kit.served(gen, postprocess="forgetful_rules:nothing") as server:
        answer = server.post(prompt=PROMPT)
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "server_error"


@pytest.mark.parametrize(
    ("distilled", "passed"), [(None, {}), (True, {"distilled": True}), (False, {"distilled": False})]
)
def test_distilled_is_passed_on_only_if_it_was_chosen(monkeypatch, distilled, passed):
    asked = {}

    def load(model, **options):
        asked.update(options)
        raise InvalidRequest("enough")

    monkeypatch.setattr("ragturbo.Generator.from_pretrained", load)
    with pytest.raises(InvalidRequest, match="enough"):
        Service(ServeConfig(distilled=distilled)).load()
    assert {name: value for name, value in asked.items() if name == "distilled"} == passed


def test_metrics_tell_what_an_operator_asks(server, gen):
    before = server.metrics()
    assert server.post(prompt=PROMPT, mode="slerp", n=2).status_code == 200
    assert server.post(prompt=PROMPT, colour="red").status_code == 400
    after = server.metrics()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown('ragturbo_requests_total{path="/v1/images/generations",status="200"}') == 1
    assert grown('ragturbo_images_total{mode="slerp"}') == 2
    assert grown('ragturbo_rejections_total{reason="unknown_parameter"}') == 1
    assert grown('ragturbo_batches_total{rows="2"}') == 1
    for stage in ("queue", "tokenize", "text", "search", "gather", "encode", "adapter", "decode", "vae", "total"):
        assert grown(f'ragturbo_stage_seconds_count{{stage="{stage}"}}') == 1
        assert f'ragturbo_stage_seconds_bucket{{le="0.0005",stage="{stage}"}}' in after
    assert after["ragturbo_database_generation"] == gen.stats()["generation"]
    assert after["ragturbo_queue_waiting"] == after["ragturbo_in_flight"] == after["ragturbo_rows_running"] == 0
    # Unknown paths share one label, so that clients cannot create time series.
    server.http.get("/wp-login.php")
    assert 'ragturbo_requests_total{path="other",status="404"}' in server.metrics()


def test_cache_hits_are_told_by_tier(gen):
    stats = gen.stats() | {"cache": {**CacheStats(device_hits=3, host_hits=2, disk_reads=1).to_dict()}}
    said = Metrics(lambda: stats).text().decode()
    for tier, rows in {"device": 3, "host": 2, "disk": 1}.items():
        assert f'ragturbo_cache_rows_total{{tier="{tier}"}} {rows}.0' in said


def test_the_configuration_refuses_nonsense(tmp_path):
    assert ServeConfig().host == "127.0.0.1" and not ServeConfig().public
    wrong = [
        {"timeout": 0},
        {"timeout": float("inf")},
        {"body_timeout": float("nan")},
        {"drain_delay": float("inf")},
        {"max_side": 0},
        {"port": 70_000},
        {"max_images": 0},
        {"api_keys": "one"},
        {"api_keys": [" a"]},
        {"api_keys": ["a"], "admin_keys": ["a"]},
        {"options": {"turbo": True}},
        {"postprocess": "nowhere"},
    ]
    for settings in wrong:
        with pytest.raises(InvalidRequest):
            ServeConfig.from_dict(settings).load_postprocess()
    with pytest.raises(InvalidRequest, match="unknown setting 'colour'"):
        ServeConfig.from_dict({"colour": 1})
    assert "s3cret" not in repr(ServeConfig(api_keys=("s3cret",)))
    (tmp_path / "keys").write_text("# ours\none\n\n two \n")
    assert read_keys(tmp_path / "keys") == ("one", "two")
    (tmp_path / "keys").write_text("# none\n")
    with pytest.raises(InvalidRequest, match="contains no keys"):
        read_keys(tmp_path / "keys")
