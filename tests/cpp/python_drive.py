"""Runs the Python runtime with commands and answers of cpp/tests/kvexport_drive.cpp.

Imports the packages of runtime.txt only: the tests also run it on an emulated processor.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from kvexport.errors import KvexportError
from kvexport.runtime import Cache, Session, open_bundle
from kvexport.runtime.self_test import self_test

_sessions: dict[str, Session] = {}
_caches: dict[str, tuple[Session, Cache]] = {}
_bundles: dict[str, str] = {}


def _answer(given: dict[str, Any]) -> Any:
    do, session = given["do"], given.get("session", "")
    if do == "open":
        opened = open_bundle(given["bundle"], provider=given["provider"], threads=1)
        _sessions[session], _bundles[session] = opened, given["bundle"]
        return {}
    if do == "self_test":
        return self_test(_bundles[session], "cpu").to_json()
    if do in ("new", "load"):
        owner = _sessions[session]
        _caches[given["cache"]] = owner, owner.new_cache() if do == "new" else owner.load(given["file"])
        return None
    owner, cache = _caches[given["cache"]]
    if do == "prefill":
        return owner.prefill(given["ids"], cache=cache)[0].tobytes().hex()
    if do == "step":
        return owner.step([given["id"]], cache=cache)[0].tobytes().hex()
    if do == "save":
        return cache.save(given["file"])
    made = owner.generate(
        given["ids"], max_new_tokens=given["max_new_tokens"], stop=given["stop_tokens"], cache=cache
    )
    return {"tokens": list(made.token_ids)}


for _line in sys.stdin:
    try:
        _reply = {"ok": _answer(json.loads(_line))}
    except KvexportError as error:
        _parts = {"failed": error.what, "got": str(error.got), "expected": str(error.expected)}
        _reply = {"error": {**_parts, "code": error.exit_code, "fix": str(error.fix), "message": str(error)}}
    print(json.dumps(_reply), flush=True)
