"""Spider from the public hub: files at fixed commits of two repositories that hold copies of it.

The data set's own host offers one archive behind a form. `databases.sha256` lists the databases; two of
Spider's are in neither place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from examples.downloads import download

SOURCE = "github.com/hyukkyukang/text2SQL and github.com/sohv/sql_chatbot"
NOTICE = "Spider (Yu et al., 2018), https://yale-lily.github.io/spider, is licensed CC BY-SA 4.0."

_HERE = Path(__file__).parent
_CACHE = _HERE / ".data"
_RAW = "https://raw.githubusercontent.com"
_DATABASES = f"{_RAW}/hyukkyukang/text2SQL/999f5e467a3c2a263533f1dfa3d0106a18d343d1/datasets/spider"
_TRAIN = f"{_RAW}/sohv/sql_chatbot/a2329ce1607fb7dd6bf87f987eb1af4e771f71a0/data/spider/train.json"
_TRAIN_SHA256 = "5fb59f046995e18b89ea7408c28cba8f429d45b72e5038501923a7697eba446c"
_DEV_SHA256 = "30d64a3fccde493226df79687aed9e4a1c0129525baf44f29c0573d914d758a4"


def questions() -> list[Path]:
    """The files of questions; those of databases that are not listed are left out."""
    files = [
        download(_TRAIN, _TRAIN_SHA256, _CACHE / "all" / "train.json", notice=NOTICE),
        download(f"{_DATABASES}/dev.json", _DEV_SHA256, _CACHE / "all" / "dev.json", notice=NOTICE),
    ]
    return [_of_known_databases(file) for file in files]


def _of_known_databases(file: Path) -> Path:
    kept = _CACHE / file.name
    rows = json.loads(file.read_text(encoding="utf-8"))
    kept.write_text(json.dumps([row for row in rows if row["db_id"] in checksums()]), encoding="utf-8")
    return kept


def database(name: str) -> Path:
    """The SQLite file of one database."""
    url = f"{_DATABASES}/database/{name}/{name}.sqlite"
    return download(url, checksums()[name], _CACHE / "database" / f"{name}.sqlite", notice=NOTICE)


@cache
def checksums() -> Mapping[str, str]:
    """SHA-256 by database."""
    lines = (_HERE / "databases.sha256").read_text().splitlines()
    return {name: sha256 for sha256, name in (line.split() for line in lines)}
