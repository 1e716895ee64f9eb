"""Certificates of authorities of our own."""

from __future__ import annotations

import subprocess
from pathlib import Path


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def make_certificates(folder: Path) -> None:
    """`ca.crt`, another authority `other.crt`, and `server.crt` of the first for the name localhost, not an address."""
    for name in "ca", "other":
        subject = ["-subj", f"/CN={name} of the tests", "-days", "2", "-nodes", "-newkey", "rsa:2048"]
        openssl(folder, "req", "-x509", *subject, "-keyout", f"{name}.key", "-out", f"{name}.crt")
    openssl(
        folder, "req", "-subj", "/CN=localhost", "-nodes", "-newkey", "rsa:2048", "-keyout", "server.key",
        "-out", "server.csr",
    )  # fmt: skip
    (folder / "names").write_text("subjectAltName=DNS:localhost\n")
    openssl(
        folder, "x509", "-req", "-in", "server.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
        "-days", "2", "-extfile", "names", "-out", "server.crt",
    )  # fmt: skip
