"""Blocking HTTP clients."""

from __future__ import annotations

import json
import re
import socket
from http.client import HTTPResponse
from typing import Any


class Answer:
    """What a client got: `status`, `headers` by name in lower case, `body`, and whether the connection was closed."""

    def __init__(self, response: HTTPResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.body = response.read()

    def json(self) -> Any:
        return json.loads(self.body)


def ask_on(client: socket.socket, path: str, method: str = "GET", **headers: str) -> Answer:
    """One request, then its answer, on a connection that stays."""
    lines = [f"{method} {path} HTTP/1.1", "Host: test"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    client.sendall("\r\n".join([*lines, "", ""]).encode())
    return read_answer(client, method)


def read_answer(client: socket.socket, method: str = "GET") -> Answer:
    with HTTPResponse(client, method=method) as response:
        response.begin()
        return Answer(response)


def read_to_the_end(client: socket.socket) -> bytes:
    parts = []
    while part := client.recv(65_536):
        parts.append(part)
    return b"".join(parts)


def statuses(text: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) [A-Z]", text)]
