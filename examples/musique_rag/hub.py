"""MuSiQue from the public hub: files at fixed commits of three repositories that hold parts of it.

The data set's own host offers one archive behind a form. The 200 questions that come with their paragraphs
are MIGRES's choice from the development set.
"""

from __future__ import annotations

import json
from pathlib import Path

from examples.downloads import download

SOURCE = "github.com/peterbaile/lag, AdelWang/MIGRES and OSU-NLP-Group/HippoRAG"
NOTICE = (
    "MuSiQue (Trivedi et al., 2022), https://github.com/StonyBrookNLP/musique, is licensed CC BY 4.0; the "
    "passages of 2WikiMultiHopQA (Ho et al., 2020), Apache-2.0, are Wikipedia's, CC BY-SA."
)

_CACHE = Path(__file__).parent / ".data"
_RAW = "https://raw.githubusercontent.com"
_FILES = {
    "dev_questions.json": (
        f"{_RAW}/peterbaile/lag/eb253119caaef69b91d60ca26c672fd921d960df/data/musique/dev.json",
        "8c96922dde8255f600cca34332bcef6f511f71a0c245fa947e78942e94e8cecd",
    ),
    "dev_with_paragraphs.jsonl": (
        f"{_RAW}/AdelWang/MIGRES/1de6265c9ca1014054d6ba875738e785830908f8/data/musique.json",
        "bbc98ab676941cf3a481cb3361cfab334cd2a24c74ed42473e4d5c14cf7577d4",
    ),
    "corpus_2wiki.json": (
        f"{_RAW}/OSU-NLP-Group/HippoRAG/c617143f01477243992a63b2e2151cc003dd3b21"
        "/reproduce/dataset/2wikimultihopqa_corpus.json",
        "9d6e352952aafb18dab22bf8195039461321a44a949df902ae83bce134ad238a",
    ),
}


def folder() -> Path:
    """The folder with the files that `data` reads."""
    for name, (url, sha256) in _FILES.items():
        download(url, sha256, _CACHE / name, notice=NOTICE)
    corpus = _CACHE / "corpus_musique.json"
    if not corpus.exists():
        corpus.write_text(json.dumps(_paragraphs(_CACHE / "dev_with_paragraphs.jsonl")), encoding="utf-8")
    return _CACHE


def _paragraphs(file: Path) -> list[dict[str, str]]:
    """Every paragraph of the questions once."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    found = {(p["title"], p["paragraph_text"]): None for row in rows for p in row["paragraphs"]}
    return [{"title": title, "text": text} for title, text in found]
