"""Laws of the memory that the parser of Redis requests takes, measured in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

from twisted.trial.unittest import SynchronousTestCase

MEASURE = """
import resource, sys
from cacheservice.ports.resp.requests import ProtocolViolation, RequestParser
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
one = b"*2\\r\\n$3\\r\\nGET\\r\\n$8\\r\\nproducts\\r\\n"
before = peak()
what = sys.argv[1]
if what == "pipeline":
    # Always ends within a request.
    parser, data, count = RequestParser(), one * 2000, 0
    parser.feed(data[:10])
    for _ in range(600):
        parser.feed(data[10:] + data[:10])
        while True:
            count += len(parser.take(512))
            if parser.exhausted:
                break
    assert count == 600 * 2000, count
elif what == "inline":
    parser, data = RequestParser(), b"PING\\r\\n" * 10000
    parser.feed(data[:3])
    for _ in range(300):
        parser.feed(data[3:] + data[:3])
        while parser.take(512):
            pass
else:
    headers = [b"*1\\r\\n>100000000\\r\\n", b"*2\\r\\n$1\\r\\naxx~100000000\\r\\n"]
    headers += [b"*1\\r\\n%9999999999\\r\\n", b"*2\\r\\n$1\\r\\naxx|100000000\\r\\n"]
    headers += [b"*3000000000\\r\\n", b"*1000000000\\r\\n", b"*999999\\r\\n" * 20, b"*1\\r\\n$500000000\\r\\n"]
    for header in headers:
        for first in (b"", one, b"*1\\r\\n$1\\r\\na\\r\\n"):
            parser = RequestParser()
            try:
                parser.feed(first + header)
                while parser.take(512):
                    pass
            except ProtocolViolation:
                pass
print((peak() - before) // 1024)
"""


class Memory(SynchronousTestCase):
    def peak_mb(self, what: str) -> int:
        """How much more memory a process of its own needed at its highest."""
        run = subprocess.run(
            [sys.executable, "-c", MEASURE, what], capture_output=True, text=True, check=False, env=dict(os.environ)
        )
        self.assertEqual(run.returncode, 0, run.stderr)
        return int(run.stdout)

    def test_endless_pipeline(self) -> None:
        """A pipeline of 40 MB that never ends with a piece piles nothing up, as arrays or inline."""
        self.assertLess(self.peak_mb("pipeline"), 16)
        self.assertLess(self.peak_mb("inline"), 16)

    def test_announced_sizes(self) -> None:
        """What a header announces is not allocated before it comes."""
        self.assertLess(self.peak_mb("headers"), 80)
