"""Mirror a dataset into a file: python mirror.py http://127.0.0.1:8080/v1/datasets/products products.json [TOKEN]"""

import json
import os
import random
import sys
import time
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.request import Request, urlopen


def mirror(url, changed, token=""):
    """Call changed(rows, event) for each complete generation, until the dataset is removed."""
    rows, position = {}, ""
    headers = {"Accept": "application/x-ndjson"} | ({"Authorization": f"Bearer {token}"} if token else {})
    while True:
        try:
            # After 30 s without a line, which is three heartbeats, the connection is lost.
            with urlopen(
                Request(f"{url}/changes", headers=headers | {"Last-Event-ID": position}), timeout=30
            ) as stream:
                pending = []
                for event in map(json.loads, stream):
                    if event["event"] == "ended":
                        return
                    if event["event"] in ("snapshot", "rows"):
                        pending.append(event)
                    elif event["event"] in ("generation", "renewed"):
                        for each in pending:
                            rows = {} if each["event"] == "snapshot" else rows | each["put"]
                            for key in each.get("removed", ()):
                                rows.pop(key, None)
                        pending, position = [], event["position"]
                        changed(rows, event)
        except (OSError, HTTPException, ValueError) as error:
            if isinstance(error, HTTPError) and error.code < 500:
                raise
            print(f"{error}; trying again", file=sys.stderr)
        time.sleep(random.uniform(1, 4))


def save(rows, event):
    with open(f"{sys.argv[2]}.new", "w", encoding="utf-8") as file:
        json.dump(rows, file)
    os.replace(f"{sys.argv[2]}.new", sys.argv[2])
    print(f"{event['event']} {event['generation']}: {len(rows)} rows, {event['age_s']:.1f} s old", flush=True)


if __name__ == "__main__":
    mirror(sys.argv[1], save, *sys.argv[3:])
