"""A real nginx before an HTTP port."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from tests.kit.ports import free_port
from tests.kit.waiting import wait_until

NGINX = "/usr/sbin/nginx"


def start_nginx(add_cleanup: Callable[..., object], origin: int, root: Path) -> int:
    """Start nginx with its defaults for proxies before a port; it serves the files in `root`, too. Return its port."""
    directory = Path(tempfile.mkdtemp(prefix="cacheservice-test-"))
    add_cleanup(shutil.rmtree, directory)
    os.chmod(directory, 0o777)
    port = free_port()
    folders = "".join(
        f"{name}_temp_path {directory}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (directory / "nginx.conf").write_text(
        f"daemon off;\n{'' if os.getuid() else 'user root;'}\npid {directory}/pid;\nerror_log stderr;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{folders}types {{ text/html html; }}\n"
        f"server {{\nlisten 127.0.0.1:{port};\nroot {root};\n"
        f"location /v1/ {{ proxy_pass http://127.0.0.1:{origin}; proxy_http_version 1.1; }}\n}}\n}}\n"
    )
    log = (directory / "log").open("wb")
    add_cleanup(log.close)
    process = subprocess.Popen(
        [NGINX, "-p", str(directory), "-c", str(directory / "nginx.conf")], stdout=log, stderr=log
    )
    add_cleanup(process.wait)
    add_cleanup(process.terminate)

    def listens() -> bool:
        assert process.poll() is None, (directory / "log").read_text()
        with closing(socket.socket()) as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_until(listens, "nginx")
    return port
