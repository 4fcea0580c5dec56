"""Bodies that are not a request, and headers that say something else than JSON."""

from __future__ import annotations

import gzip
import json

import pytest

PROMPT = "a red circle left of a blue square"
PATH = "/v1/images/generations"
JSON = {"content-type": "application/json"}


def error_of(answer, status: int) -> dict:
    assert answer.status_code == status, answer.text
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    return answer.json()["error"]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "the body is empty; send a JSON object such as"),
        (b" \n", "the body is empty"),
        (b"{'prompt': 'a'}", "expecting property name enclosed in double quotes at line 1, column 2"),
        (b'{"prompt": "a"', "not valid JSON"),
        (b'{"prompt": "a"} trailing', "not valid JSON: extra data"),
        (b'["a"]', "the body is a list"),
        (b'"a"', "the body is the text 'a'"),
        (b"null", "the body is null"),
        (b"5", "the body is 5"),
        (b'{"prompt": "\xff"}', "not UTF-8: byte 12 is 0xff"),
        ('{"prompt": "a"}'.encode("utf-16"), "not UTF-8"),
        (b'\xef\xbb\xbf{"prompt": "a"}', "byte order mark"),
        (b"[" * 30_000, "nested too deeply"),
        (b'{"prompt": ' + b'{"a":' * 5000, "nested too deeply"),
        (b'{"prompt": "a", "w": NaN}', "NaN is not a JSON number"),
        (b'{"prompt": "a", "w": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}", "too many digits"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused_with_the_reason(server, raw, said):
    error = error_of(server.http.post(PATH, content=raw, headers=JSON), 400)
    assert said in error["message"] and error["code"] == "invalid_json", error


def test_a_field_given_twice_is_refused_instead_of_the_last_one_winning(server):
    error = error_of(server.http.post(PATH, content=b'{"prompt": "a", "n": 1, "n": 2}', headers=JSON), 400)
    assert error["message"] == "the field 'n' is given twice" and error["param"] == "n"
    # Also where there are many fields.
    many = "{" + ",".join(f'"{i}": 1' for i in range(5000)) + ', "4999": 1}'
    assert error_of(server.http.post(PATH, content=many, headers=JSON), 400)["param"] == "4999"


@pytest.mark.parametrize("raw", [b'{"prompt": "\\ud800"}', b'{"\\ud800": 1}', b'{"svg": {"a": ["\\udfff"]}}'])
def test_half_a_surrogate_pair_is_refused(server, raw):
    error = error_of(server.http.post(PATH, content=raw, headers=JSON), 400)
    assert "surrogate" in error["message"] and error["param"]


def test_an_emoji_written_as_a_surrogate_pair_is_a_prompt(server):
    body = b'{"prompt": "a red circle \\ud83d\\ude00"}'
    assert server.http.post(PATH, content=body, headers=JSON).status_code == 200


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"content-type": "application/x-www-form-urlencoded"}, "application/x-www-form-urlencoded"),
        ({"content-type": "text/plain"}, "text/plain"),
        ({"content-type": "multipart/form-data; boundary=x"}, "multipart"),
        ({}, "Content-Type is missing"),
        (JSON | {"content-encoding": "gzip"}, "without compression"),
    ],
)
def test_another_content_type_is_refused_with_the_header_to_send(server, headers, said):
    body = json.dumps({"prompt": PROMPT}).encode()
    body = gzip.compress(body) if "content-encoding" in headers else body
    error = error_of(server.http.post(PATH, content=body, headers=headers), 415)
    assert said in error["message"]


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON"])
def test_json_may_be_announced_with_a_charset(server, kind):
    body = json.dumps({"prompt": PROMPT}).encode()
    assert server.http.post(PATH, content=body, headers={"content-type": kind}).status_code == 200


def test_a_large_body_is_refused_with_413_and_not_with_a_broken_connection(server):
    assert "65536 bytes" in error_of(server.post(prompt="a" * 5_000_000), 413)["message"]
