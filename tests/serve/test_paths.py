"""Paths and methods: model ids, trailing slashes, HEAD, what OpenAI has and this server does not, and /docs."""

from __future__ import annotations

import base64
import html
import io
import re
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from PIL import Image

from ragturbo.serve.schema import ImageRequest

PROMPT = "a red circle left of a blue square"
PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def named(gen, kit):
    """A server whose model has an id of the hub, with a slash."""
    with kit.served(gen, timeout=300, name="stabilityai/sd-turbo") as server:
        yield server


def client_of(server, **options) -> openai.OpenAI:
    # Retries would make these tests slow, so they also show that nothing here is retried.
    return openai.OpenAI(**{"base_url": f"{server.url}/v1", "api_key": "unused", **options})


def error_of(answer, status: int) -> dict:
    assert answer.status_code == status, answer.text
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    return answer.json()["error"]


def test_a_model_is_found_by_its_id_with_or_without_an_encoded_slash(named):
    assert client_of(named).models.retrieve("stabilityai/sd-turbo").id == "stabilityai/sd-turbo"
    for path in ("stabilityai/sd-turbo", "stabilityai%2Fsd-turbo", "stabilityai/sd-turbo/"):
        assert named.http.get(f"/v1/models/{path}").json()["object"] == "model"
    assert client_of(named).images.generate(model="stabilityai/sd-turbo", prompt=PROMPT).data


def test_an_unknown_model_is_404_with_the_one_there_is(server):
    with pytest.raises(openai.NotFoundError, match="this server has 'shapes'") as caught:
        client_of(server).models.retrieve("stabilityai/sd-turbo")
    assert caught.value.param == "model" and caught.value.code == "model_not_found"
    error = error_of(server.post(prompt=PROMPT, model="dall-e-3"), 404)
    assert error["param"] == "model" and "'shapes'" in error["message"]


def test_edits_and_variations_are_not_supported_and_openais_client_does_not_retry(server):
    picture = io.BytesIO()
    Image.new("RGB", (64, 64)).save(picture, "PNG")
    large = picture.getvalue() + bytes(5_000_000)
    counter = 'ragturbo_requests_total{path="other",status="404"}'
    before = server.metrics().get(counter, 0)
    client = client_of(server)
    for content in (picture.getvalue(), large):
        file = ("picture.png", content)
        with pytest.raises(openai.NotFoundError, match="image edits are not supported: this server only generates"):
            client.images.edit(image=file, prompt=PROMPT)
        with pytest.raises(openai.NotFoundError, match="image variations are not supported"), pytest.deprecated_call():
            client.images.create_variation(image=file)
    assert server.metrics()[counter] == before + 4


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings", "/v1/responses", "/v1/files"])
def test_what_else_openai_has_is_not_supported(server, path):
    error = error_of(server.http.post(path, json={}), 404)
    assert error["code"] == "not_supported" and PATH in error["message"]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/images/generations", "a client's base URL ends in /v1"),
        ("/v1/images/generations/images/generations", "a client's base URL ends in /v1"),
        ("/v1/image/generations", f"did you mean {PATH}?"),
        ("/v1/model", "did you mean /v1/models?"),
        ("/admin/database", "--admin-keys"),
        ("/nowhere", "see /docs"),
        ("/" + "a" * 5000, "see /docs"),
    ],
)
def test_a_wrong_path_is_answered_with_the_right_one(server, path, said):
    error = error_of(server.http.post(path, json={}), 404)
    assert said in error["message"] and len(error["message"]) < 300


def test_a_trailing_slash_works_on_every_route(server):
    answer = server.http.post(f"{PATH}/", json={"prompt": PROMPT, "seed": 2})
    assert answer.status_code == 200 and not answer.history
    assert answer.json()["data"] == server.post(prompt=PROMPT, seed=2).json()["data"]
    for path in ("/v1/models", "/v1/models/shapes", "/health/live", "/health/ready", "/metrics", "/docs"):
        assert server.http.get(f"{path}/").status_code == 200, path
    assert client_of(server, base_url=f"{server.url}/v1/").images.generate(prompt=PROMPT).data


def test_a_trailing_slash_does_not_avoid_the_api_key(gen, kit):
    with kit.served(gen, api_keys=("key",)) as server:
        for path in ("/v1/models/", "/v1/models/shapes/", "/v1/images/generations/", "/v1/images/edits"):
            assert server.http.get(path).status_code == 401
        # As /openapi.json, which it is made from, the page needs no key, and it does not show one.
        page = server.http.get("/docs")
        assert page.status_code == server.http.get("/openapi.json").status_code == 200
        assert "Authorization: Bearer KEY" in html.unescape(page.text)


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_another_method_is_405_with_the_one_to_use(server, method):
    answer = server.http.request(method, PATH)
    assert "use POST" in error_of(answer, 405)["message"] and answer.headers["allow"] == "POST"


def test_head_is_get_without_the_body(server):
    for path in ("/health/ready", "/v1/models", "/docs"):
        head, get = server.http.head(path), server.http.get(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(get.content))
    head = server.http.head(PATH)
    assert (head.status_code, head.content, head.headers["allow"]) == (405, b"", "POST")


def test_query_parameters_are_refused_where_they_would_have_no_effect(server):
    error = error_of(server.http.get("/v1/models?limit=2"), 400)
    assert error["param"] == "limit" and "'limit=2'" in error["message"]
    assert error_of(server.http.get("/v1/models/shapes?x=1"), 400)["param"] == "x"


def test_the_documentation_is_one_page_without_anything_from_other_hosts(server):
    answer = server.http.get("/docs")
    page = html.unescape(answer.text)
    assert answer.headers["content-type"].startswith("text/html")
    assert "<script" not in page and "default-src 'none'" in answer.headers["content-security-policy"]
    assert set(re.findall(r"https?://[^/\"' ]+", page)) == {server.url}
    for said in (*ImageRequest.model_fields, "from 4 to 128 pixels", "a whole number from 1 to 10", "Retry-After"):
        assert said in page
    assert server.http.get("/").text == answer.text


def test_the_examples_of_the_documentation_run(server, tmp_path: Path):
    pages = re.findall(r"<pre>(.*?)</pre>", server.http.get("/docs").text, re.DOTALL)
    shell, program, _ = map(html.unescape, pages)
    for command in (["sh", "-c", shell], [sys.executable, "-c", program]):
        subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
        picture = Image.open(tmp_path / "image.png")
        assert picture.size == (64, 64)
        picture.close()
        (tmp_path / "image.png").unlink()


def test_the_documentation_says_what_a_lenient_server_does(gen, kit):
    with kit.served(gen, lenient=True) as server:
        assert "<code>notes</code> in the response lists them" in server.http.get("/docs").text


def test_a_page_asked_for_with_a_made_up_host_has_nothing_of_it_unescaped(server):
    page = server.http.get("/docs", headers={"host": "a\"'><script>alert(1)</script>"}).text
    assert "<script>" not in page


def test_an_image_after_all_of_this(server):
    data = client_of(server).images.generate(prompt=PROMPT, response_format="b64_json").data[0].b64_json
    assert Image.open(io.BytesIO(base64.b64decode(data))).format == "PNG"
