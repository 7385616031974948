"""Text for training: readers of documents and their errors, synthetic retrieval, the fixed list of works."""

import json
import sys
from itertools import pairwise

import pytest
from transformers import AutoTokenizer

from indexer_training import plain_text
from indexer_training.documents import read_documents
from indexer_training.fetch_text import SHORTEST, USUAL, cut, fetch_text, text_of
from indexer_training.retrieval import KINDS, make
from indexer_training.words import NAMES, NOUNS, PLACES
from indexer_training.works import WORKS, Package, Work
from tests.paths import DOCUMENT, MODEL
from vllm_lsa.errors import LsaError
from vllm_lsa.evaluation import words as evaluation
from vllm_lsa.evaluation.haystack import Encoder


@pytest.fixture(scope="module")
def encoder():
    return Encoder(AutoTokenizer.from_pretrained(str(MODEL)))


@pytest.fixture(scope="module")
def filler(encoder):
    return encoder.encode(DOCUMENT.read_text())


@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
@pytest.mark.parametrize("length", [256, 1000, 4097])
def test_samples_are_exactly_as_long_as_asked_and_depend_on_the_seed_alone(encoder, filler, kind, length):
    samples = [make(seed, kind, encoder, filler, length) for seed in range(5)]
    assert samples == [make(seed, kind, encoder, filler, length) for seed in range(5)]
    assert len({tuple(sample.tokens) for sample in samples}) == 5
    for sample in samples:
        assert len(sample.tokens) == length and sample.answers
        assert all(0 < a < b <= length for a, b in sample.answers)
        assert all(b <= c for (_, b), (c, _) in pairwise(sample.answers))


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_stands_earlier_in_the_document(encoder, filler, kind):
    for seed in range(10):
        sample = make(seed, kind, encoder, filler, 2000)
        for a, b in sample.answers:
            answer = encoder.decode(sample.tokens[a:b]).strip()
            assert answer and answer in encoder.decode(sample.tokens[:a]), (kind, seed, answer)


def test_a_short_filler_is_repeated(encoder, filler):
    assert len(make(0, "needles", encoder, filler[:50], 1000).tokens) == 1000


def test_what_cannot_be_made_is_refused(encoder, filler):
    with pytest.raises(LsaError, match="no kind riddles"):
        make(0, "riddles", encoder, filler, 1000)
    with pytest.raises(LsaError, match="no documents"):
        make(0, "needles", encoder, [], 1000)
    with pytest.raises(LsaError, match="too few"):
        make(0, "multi_hop", encoder, filler, 20)


def test_words_of_training_and_evaluation_are_different():
    training = {word.lower() for word in (*NOUNS, *NAMES, *PLACES)}
    evaluated = {*evaluation.NOUNS, *evaluation.FIRST_NAMES, *evaluation.LAST_NAMES}
    evaluated |= {*evaluation.TOWNS, *evaluation.PROFESSIONS}
    assert not training & {word.lower() for word in evaluated}
    assert len(NOUNS) == len(set(NOUNS)) > 300 and len(evaluation.NOUNS) == len(set(evaluation.NOUNS)) > 100


def test_documents_of_a_folder_come_sorted(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b.txt").write_text("\ufeffsecond", encoding="utf-8")
    (tmp_path / "a.md").write_text("# first")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "ignored.csv").write_text("x")
    (tmp_path / ".hidden" / "no.txt").write_text("no")
    lines = ['{"text": "third\u2028line"}', "", json.dumps({"text": "", "id": 1}), '{"text": "fourth"}']
    (tmp_path / "sub" / "c.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = [(document.name, document.text) for document in read_documents(tmp_path)]
    assert found == [
        ("a.md", "# first"),
        ("b.txt", "second"),
        ("sub/c.jsonl:1", "third\u2028line"),
        ("sub/c.jsonl:4", "fourth"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.csv", b"text", "no documents in"),
        ("a.txt", b"   ", "no documents in"),
        ("a.txt", b"caf\xe9", "not UTF-8 at byte 3"),
        ("a.jsonl", b'{"text": "x"}\n{"tex', "line 2 is not JSON"),
        ("a.jsonl", b'{"body": "x"}', 'line 1 has no string field "text"'),
        ("a.jsonl", b'["text"]', 'line 1 has no string field "text"'),
        ("a.jsonl", b'{"text": 3}', 'line 1 has no string field "text"'),
    ],
)
def test_unreadable_folders_are_refused_in_one_line(tmp_path, name, content, error):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LsaError, match=error) as refusal:
        list(read_documents(tmp_path))
    assert "\n" not in str(refusal.value)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(LsaError, match="is not a folder"):
        list(read_documents(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "train.parquet"])
def test_tables_need_pyarrow(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(LsaError, match="pip install pyarrow"):
        list(read_documents(tmp_path))


def test_tables_are_read(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    table = pa.table({"text": ["one", None, "three"], "id": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "b.parquet")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with pa.OSFile(str(tmp_path / "cache-1.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    found = [(document.name, document.text) for document in read_documents(tmp_path)]
    assert found == [("a.arrow:1", "one"), ("a.arrow:3", "three"), ("b.parquet:1", "one"), ("b.parquet:3", "three")]
    (tmp_path / "c.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(LsaError, match="cannot be read"):
        list(read_documents(tmp_path))
    parquet.write_table(pa.table({"body": ["x"]}), tmp_path / "c.parquet")
    with pytest.raises(LsaError, match='no column "text" but body'):
        list(read_documents(tmp_path))


def test_long_works_are_cut_at_blank_lines_and_nothing_is_lost():
    text = "\n\n".join(f"Paragraph {i}. " + "word " * 60 for i in range(2000))
    parts = cut(text, 100)
    assert all(SHORTEST <= len(part) <= 1.5 * USUAL for part in parts)
    assert "\n\n".join(part.rstrip("\n") for part in parts) == text
    assert cut(text, 2) == parts[:2]


def test_held_out_works_are_others_and_of_nearly_all_genres():
    train = {(work.package, work.files, work.read) for work in WORKS if not work.held_out}
    heldout = {(work.package, work.files, work.read) for work in WORKS if work.held_out}
    assert not train & heldout and len({work.name for work in WORKS}) == len(WORKS)
    assert len({work.genre for work in WORKS if work.held_out}) >= 6
    code = [{work.package.name for work in WORKS if work.genre == "code" and work.held_out is held} for held in (0, 1)]
    assert not code[0] & code[1]


def test_markup_becomes_text():
    page = b"<html><head><title>no</title></head><body><h1>Light</h1><p>is  fast\nand &amp; bright</p></body></html>"
    assert plain_text.web_page(page).split("\n") == ["", "", "Light", "", "", "is fast and & bright", ""]
    manual = b'.TH printf 3\n.SH NAME\nprintf \\- print\n.\\" remark\n.BR printf (3)\nis \\fIold\\fP'
    assert "NAME\n\nprintf - print\nprintf(3)\nis old" in plain_text.man_page(manual)
    assert plain_text.pod(b"=head1 NAME\n\nB<perl> L<text|perlop>\n\n=cut").strip() == "NAME\n\nperl text"
    book = b"legal\n*** START OF THIS PROJECT GUTENBERG EBOOK X ***\nIt was\nEnd of the Project Gutenberg EBook\nlegal"
    assert plain_text.gutenberg(book).strip() == "It was"
    assert plain_text.plain("caf\xe9".encode("cp1252")) == "caf\xe9"


def test_packages_that_changed_and_folders_of_something_else_are_refused(tmp_path):
    work = Work("x", "verse", Package("pypi", "p", "1"), ("*.txt",))
    with pytest.raises(LsaError, match=r"p has no \*.txt any more"):
        text_of(work, tmp_path)
    (tmp_path / "a.txt").write_bytes(b"one  \r\n\r\n\r\n\r\n\r\ntwo\0")
    assert text_of(work, tmp_path) == "one\n\n\ntwo\n"
    with pytest.raises(LsaError, match="not a text folder"):
        fetch_text(tmp_path, [work])
    (tmp_path / "manifest.json").write_text('{"version": 0, "documents": []}')
    with pytest.raises(LsaError, match="another list of works"):
        fetch_text(tmp_path, [work])
