"""Mirror a dataset into a file: python mirror.py http://127.0.0.1:8080/v1/datasets/products products.json [TOKEN]"""

import json
import os
import random
import sys
import time
from http.client import HTTPException
from urllib.request import Request, urlopen

url, path, token = (*sys.argv[1:], "")[:3]
headers = {"Accept": "application/x-ndjson"} | ({"Authorization": f"Bearer {token}"} if token else {})
rows, position = {}, ""

while True:
    try:
        request = Request(f"{url}/changes", headers=headers | {"Last-Event-ID": position})
        with urlopen(request, timeout=30) as stream:  # a heartbeat comes every 10 s
            pending = []
            for event in map(json.loads, stream):
                if event["event"] == "ended":
                    sys.exit()
                if event["event"] in ("snapshot", "rows"):
                    pending.append(event)
                if event["event"] in ("generation", "renewed"):  # the pending changes are complete
                    for change in pending:
                        if change["event"] == "snapshot":
                            rows.clear()
                        rows.update(change.get("put", {}))
                        for key in change.get("removed", ()):
                            rows.pop(key, None)
                    pending, position = [], event["position"]
                    with open(f"{path}.new", "w", encoding="utf-8") as file:
                        json.dump(rows, file)
                    os.replace(f"{path}.new", path)
                    print(event["event"], event["generation"], len(rows), "rows", event["age_s"], "s old", flush=True)
    except (OSError, HTTPException, ValueError) as error:
        print(f"{error}; trying again", file=sys.stderr)
    time.sleep(random.uniform(1, 4))
