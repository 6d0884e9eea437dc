"""Files from the public hub: downloaded once, and used only when they are the ones that were meant."""

from __future__ import annotations

import hashlib
import os
import sys
import urllib.request
from pathlib import Path

from agentlightning.errors import AgentLightningError

TIMEOUT_S = 20


def download(url: str, sha256: str, file: Path, *, notice: str) -> Path:
    """The file, downloaded if it is not there yet; `notice` says under which licence, at its first download.

    Raises OSError without a network and AgentLightningError for other content than expected.
    """
    if file.exists():
        return file
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
        body = response.read()
    found = hashlib.sha256(body).hexdigest()
    if found != sha256:
        raise AgentLightningError(
            f"{url} has SHA-256 {found} and not {sha256}: it is not the file that this example was made with"
        )
    if not file.parent.exists():
        print(notice, file=sys.stderr)
        file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.{os.getpid()}")
    unfinished.write_bytes(body)
    unfinished.replace(file)
    return file
