"""The fields of an image request: what OpenAI's clients send by habit, and what is said of a wrong one."""

from __future__ import annotations

import logging

import openai
import pytest

from ragturbo.errors import InvalidRequest
from ragturbo.retrieval import Database
from ragturbo.serve.api_errors import to_api_error
from ragturbo.serve.config import ServeConfig
from ragturbo.serve.schema import NULL_ONLY, ImageRequest
from ragturbo.serve.service import MAX_LOGGED_NAMES, Service

PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def lenient(gen, kit):
    with kit.served(gen, timeout=300, lenient=True) as server:
        yield server


def refused(server, **body) -> dict:
    answer = server.post(**{"prompt": PROMPT, **body})
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


def test_what_openais_clients_send_by_habit_is_accepted(client):
    habits = {
        "model": "shapes", "n": 1, "size": "auto", "quality": "auto", "moderation": "auto", "background": "auto",
        "user": "someone", "stream": False, "partial_images": 0, "response_format": "b64_json", "output_format": "png",
    }  # fmt: skip
    assert client.images.generate(prompt=PROMPT, **habits).data
    others = {"quality": "standard", "background": "opaque", "safety_identifier": "someone"}
    assert client.images.generate(prompt=PROMPT, **others).data


def test_null_is_the_same_as_leaving_a_field_out(server):
    nothing = dict.fromkeys(set(ImageRequest.model_fields) - {"prompt"})
    answer = server.post(prompt=PROMPT, **nothing | {"seed": 3}).json()
    assert answer["data"] == server.post(prompt=PROMPT, seed=3).json()["data"] and answer["notes"] == []


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"quality": "hd"}, "one quality"),
        ({"moderation": "low"}, "no moderation"),
        ({"background": "transparent"}, "opaque"),
        ({"stream": True}, "not streamed"),
        ({"stream": 0}, "must be false, not 0"),
        ({"partial_images": 2}, "not streamed"),
        ({"partial_images": False}, "must be 0, not false"),
        ({"style": "vivid"}, "in the prompt"),
        ({"output_compression": 80}, "jpeg 95, webp 90"),
        ({"response_format": "url"}, "has no URLs"),
        ({"output_format": "jpg"}, "did you mean 'jpeg'?"),
        ({"mode": "SLERP"}, "did you mean 'slerp'?"),
        ({"frame_count": 3}, "GIF"),
    ],
)
def test_a_value_this_server_does_not_have_is_refused_with_the_reason(server, body, why):
    error = refused(server, **body)
    assert error["param"] == next(iter(body)) and why in error["message"], error


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"n": "2"}, "'n' must be a whole number from 1 to 10, not the text '2'"),
        ({"n": True}, "'n' must be a whole number from 1 to 10, not true"),
        ({"n": 2.5}, "'n' must be a whole number from 1 to 10, not 2.5"),
        ({"n": 11}, "'n' must be a whole number from 1 to 10, not 11"),
        ({"seed": 2**64}, f"'seed' must be a whole number from 0 to 2**64 - 1, not {2**64}"),
        ({"w": "0.5"}, "'w' must be a number from 0 to 1, not the text '0.5'"),
        ({"compose": "yes"}, "'compose' must be true or false, not the text 'yes'"),
        ({"prompt": None}, "'prompt' must be a text of 1 to 4000 characters, not null"),
        ({"prompt": ["a", "b"]}, "not a list; send one request for each prompt"),
        ({"prompt": "a" * 4001}, "'prompt' must be a text of 1 to 4000 characters; this one has 4001"),
        ({"prompt": ""}, "'prompt' is empty"),
        ({"user": {}}, "'user' must be a text, not an object"),
        ({"size": 64}, "'size' must be 'auto' or a text such as '512x512', not 64"),
    ],
)
def test_a_wrong_type_or_value_is_answered_in_the_fields_own_words(server, body, message):
    error = refused(server, **body)
    assert message in error["message"] and error["param"] == next(iter(body)), error


def test_a_missing_prompt_is_named(server):
    answer = server.http.post("/v1/images/generations", json={})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == "prompt" and "'prompt' is missing" in error["message"]
    assert error["code"] == "missing_required_parameter"


@pytest.mark.parametrize(
    ("field", "meant"),
    [
        ("sed", "did you mean 'seed'?"),
        ("Seed", "did you mean 'seed'?"),
        ("numNeighbors", "did you mean 'num_neighbors'?"),
        ("output-format", "did you mean 'output_format'?"),
        ("num_images_per_prompt", "use 'n'"),
        ("width", "use 'size'"),
        ("output_type", "use 'output_format'"),
        ("num_inference_steps", "cannot be set over HTTP"),
        ("guidance_scale", "cannot be set over HTTP"),
        ("negative_prompt", "not available over HTTP"),
        ("mask", "cannot be edited"),
        ("colour", "the fields are prompt, model, n, size"),
    ],
)
def test_a_misspelled_field_is_refused_with_the_nearest_name(server, field, meant):
    error = refused(server, **{field: 1})
    assert error["param"] == field and meant in error["message"] and error["code"] == "unknown_parameter", error


def test_a_misspelled_prompt_is_not_called_missing(server):
    answer = server.http.post("/v1/images/generations", json={"promt": PROMPT})
    assert answer.json()["error"]["message"] == "unknown field 'promt': did you mean 'prompt'?"


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ("1024x1024", "sides are multiples of 4 from 4 to 128 pixels, and 'auto' is 64x64"),
        ("512", "from 4 to 128 pixels"),
        ("0x0", "from 4 to 128 pixels"),
        ("-64x64", "from 4 to 128 pixels"),
        ("9" * 5000 + "x1", "from 4 to 128 pixels"),
        ("30x64", "the nearest is '32x64'"),
        ("127x128", "the nearest is '128x128'"),
        ("64", "must be written '64x64'"),
        ("64X64", "must be written '64x64'"),
        ("64 x 64", "must be written '64x64'"),
        ("64×64", "must be written '64x64'"),
        ("064x64", "must be written '64x64'"),
        ("٦٤x٦٤", "'auto' or '<width>x<height>'"),
        ("AUTO", "'auto' or '<width>x<height>'"),
        ("64x", "'auto' or '<width>x<height>'"),
        ("64x64x64", "'auto' or '<width>x<height>'"),
        ("large", "'auto' or '<width>x<height>'"),
        ("", "'auto' or '<width>x<height>'"),
    ],
)
def test_a_size_is_refused_with_the_sizes_this_server_makes(server, size, said):
    error = refused(server, size=size)
    assert error["param"] == "size" and said in error["message"] and len(error["message"]) < 300, error


def test_the_operators_limit_on_the_side_is_the_one_that_is_told(gen, kit):
    with kit.served(gen, timeout=300, max_side=96) as server:
        assert "from 4 to 96 pixels" in refused(server, size="128x64")["message"]
        assert server.post(prompt=PROMPT, mode="adapter", size="96x64").json()["size"] == "96x64"


@pytest.mark.parametrize(
    ("option", "field"),
    [
        ("num_images_per_prompt", "n"),
        ("width", "size"),
        ("height", "size"),
        ("output_type", "output_format"),
        ("w", "w"),
        ("prompt", "prompt"),
        ("reservation", None),
        (None, None),
    ],
)
def test_an_option_of_the_generator_is_named_as_the_field_that_sets_it(option, field):
    assert to_api_error(InvalidRequest("wrong", option=option)).detail.param == field


def test_a_mode_that_needs_what_the_server_lacks_is_refused_in_its_clients_words(server, gen, monkeypatch):
    monkeypatch.setattr(gen, "_database", None)
    error = refused(server, mode="slerp")
    assert error["param"] == "mode" and "this server has none" in error["message"]


def test_with_a_database_and_no_mode_it_retrieves(gen):
    service = Service(ServeConfig())
    service.generator, service.warm = gen, True
    assert isinstance(gen.database, Database)
    assert service.retrieves(None) and service.retrieves("slerp") and not service.retrieves("none")


def test_a_lenient_server_ignores_unknown_fields_and_says_so(lenient, caplog):
    body = {"prompt": PROMPT, "seed": 4, "colour": "red", "style": "vivid", "quality": "hd", "num_inference_steps": 9}
    with caplog.at_level(logging.WARNING):
        answers = [lenient.post(**body).json() for _ in range(2)]
        queried = lenient.http.post("/v1/images/generations?api-version=1", json={"prompt": PROMPT}).json()
    assert answers[0]["notes"] == ["ignored: 'colour', 'style', 'quality', 'num_inference_steps'"]
    assert answers[0]["data"] == answers[1]["data"] == lenient.post(prompt=PROMPT, seed=4).json()["data"]
    assert queried["notes"] == ["ignored: 'api-version'"]
    logged = [record.getMessage() for record in caplog.records if "lenient" in record.getMessage()]
    # Once for each name, and no values.
    assert len([line for line in logged if "'colour'" in line]) == 1 and len(logged) == 5
    assert "vivid" not in caplog.text


def test_a_lenient_server_refuses_wrong_values_of_the_fields_it_has(lenient):
    for body in ({"n": "2"}, {"stream": True}, {"response_format": "url"}, {"background": "transparent"}):
        error = refused(lenient, colour=1, **body)
        assert error["param"] == next(iter(body))
    answer = lenient.http.post("/v1/images/generations", json={"promt": PROMPT})
    assert answer.status_code == 400 and "'promt'" in answer.json()["error"]["message"]


def test_names_that_clients_make_up_do_not_fill_the_servers_memory(caplog):
    service = Service(ServeConfig())
    with caplog.at_level(logging.WARNING):
        for i in range(3 * MAX_LOGGED_NAMES):
            assert service.report_ignored([f"{i}" + "\n" * 1000])
    assert len(service._logged_names) == MAX_LOGGED_NAMES and max(map(len, service._logged_names)) < 100
    assert len(caplog.records) == MAX_LOGGED_NAMES + 1 and "further names" in caplog.text


def test_the_schema_states_every_field_with_its_meaning(server):
    schema = server.http.get("/openapi.json").json()
    body = schema["paths"]["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) == set(ImageRequest.model_fields) > NULL_ONLY
    assert all(field["description"] for field in body["properties"].values())
