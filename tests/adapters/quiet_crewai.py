"""Import this before CrewAI: it then sends nothing, and writes nothing beside the tests.

CrewAI reads its settings, and makes folders in the home directory, when it is imported.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import os
import tempfile
import warnings
from typing import Final

_folder: Final = tempfile.TemporaryDirectory(prefix="crewai-", ignore_cleanup_errors=True)
atexit.register(_folder.cleanup)

ENVIRONMENT: Final = {
    "CREWAI_DISABLE_TELEMETRY": "true",
    "CREWAI_TRACING_ENABLED": "false",
    "CREWAI_STORAGE_DIR": _folder.name,
}


def _import_quietly() -> None:
    before = os.environ.get("HOME")
    os.environ["HOME"] = _folder.name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own import
            importlib.import_module("crewai")
    finally:
        if before is None:
            del os.environ["HOME"]
        else:
            os.environ["HOME"] = before


os.environ.update(ENVIRONMENT)
if importlib.util.find_spec("crewai") is not None:
    _import_quietly()
