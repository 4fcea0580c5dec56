"""Uvicorn's HTTP protocol with OpenAI's form for what is not HTTP, which no application sees."""

from __future__ import annotations

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from ragturbo.serve.api_errors import APIError

NOT_HTTP = "this is not a valid HTTP request: the request line, a header or the method is wrong"


class HTTPProtocol(AutoHTTPProtocol):  # type: ignore[valid-type,misc]
    def send_400_response(self, msg: str) -> None:
        body = bytes(APIError(400, NOT_HTTP, code="invalid_http").response().body)
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()
