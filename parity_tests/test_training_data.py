"""What a run of training reads: documents, sequences, batches and their order."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from alibi_spec.training import IGNORED, masked_lm_batch
from alibi_train.batches import Batches, Rows
from alibi_train.documents import Documents, files_of, read_documents
from parity_tests.compare import assert_bitwise

ARRAYS = ("tokens", "targets", "segment_ids")
TEXTS = ("The first document.", "é", "The third one, which is longer than the others.")


def _packed(length: int = 8, has_next: bool = True) -> Rows:
    documents = Documents.of([np.frombuffer(text.encode(), np.uint8) for text in TEXTS])
    return Rows(documents, length, 256, has_next)


def _write(folder: Path) -> None:
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (folder / "all.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tokens = np.concatenate([[*text.encode(), 300] for text in TEXTS])
    np.save(folder / "all.npy", tokens)
    tokens.astype(np.uint16).tofile(folder / "all.bin")
    tokens.astype(np.uint32).tofile(folder / "wide.bin")


@pytest.mark.parametrize(
    ("pattern", "dtype"),
    [
        ("?.txt", "uint16"),
        ("all.jsonl", "uint16"),
        ("*.npy", "uint16"),
        ("all.bin", "uint16"),
        ("wide.bin", "uint32"),
    ],
)
def test_documents_of_every_kind_of_file(pattern: str, dtype: str, tmp_path: Path) -> None:
    _write(tmp_path)
    found = read_documents(files_of([pattern], tmp_path), None, 300, dtype)
    expected = [[*text.encode(), 300] for text in TEXTS]
    assert_bitwise(np.asarray(found.tokens, np.int64), np.concatenate(expected), pattern)
    assert found.ends.tolist() == np.cumsum([len(each) for each in expected]).tolist()


def test_names_and_lines_that_look_like_others(tmp_path: Path) -> None:
    """A name with brackets is no pattern; a text may hold what ends lines elsewhere."""
    folder = tmp_path / "run [1]"
    folder.mkdir()
    text = "one\u2028two\x0bthree\x85four"
    lines = json.dumps({"text": text}, ensure_ascii=False)
    (folder / "a[1].jsonl").write_text(f"{lines}\n{lines}\n", encoding="utf-8")
    files = files_of(["a[1].jsonl", "*.jsonl"], folder)
    assert files == [folder / "a[1].jsonl"]
    found = read_documents(files, None, None, "uint16")
    assert bytes(np.asarray(found.tokens, np.uint8)) == 2 * text.encode()


def test_texts_by_a_tokenizer(tmp_path: Path) -> None:
    _write(tmp_path)
    files = files_of(["0.txt", "?.txt"], tmp_path)
    assert [file.name for file in files] == ["0.txt", "1.txt", "2.txt"]
    found = read_documents(files, lambda text: [1000 + len(text)], None, "uint16")
    assert found.tokens.tolist() == [1000 + len(text) for text in TEXTS]
    assert found.ends.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": b""}, "a.txt is empty; expected a text"),
        ({"a.txt": b"\xff"}, "a.txt is not UTF-8"),
        ({"a.md": b"text"}, "a.md is of an unknown kind; expected .txt, .jsonl, .npy, .bin"),
        ({"a.jsonl": b'{"text": "a"}\n{}'}, 'line 2 of .*a.jsonl is no JSON object with a "text"'),
        ({"a.txt": b"a", "b.bin": b"ab"}, "texts and tokens together"),
        ({"b.bin": b"abc"}, "b.bin has 3 bytes; expected tokens of uint16, 2 each"),
        ({"a.npy": b"abc"}, "a.npy is no array of NumPy"),
        ({}, r"'\*' in .* names no file"),
    ],
)
def test_files_that_are_refused(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    for name, contents in files.items():
        (tmp_path / name).write_bytes(contents)
    with pytest.raises(ValueError, match=message):
        read_documents(files_of(["*"], tmp_path), None, None, "uint16")


def test_arrays_that_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"a.npy holds float64\[2, 3\]; expected one axis of int"):
        read_documents([tmp_path / "a.npy"], None, None, "uint16")
    short = Documents.of([np.arange(8)])
    with pytest.raises(ValueError, match="8 tokens, fewer than a sequence needs: 9; give more"):
        Rows(short, 8, 256, has_next=True)
    wide = Rows(Documents.of([np.array([1, 2**32 + 5, 3])]), 3, 256, has_next=False)
    with pytest.raises(ValueError, match="token 4294967301, number 1 of the data, is not in the"):
        wide[0]  # and is not cut to 5
    outside = Rows(Documents.of([np.array([1, 2, 3, 4, 5, 256, 7])]), 3, 256, has_next=False)
    with pytest.raises(ValueError, match="token 256, number 5 of the data, is not in the vocab"):
        outside[1]


def test_every_token_is_predicted_once_an_epoch() -> None:
    """But for the first of a document and the rest at the end; from the one before it."""
    rows = _packed()
    every, ends = rows.documents.tokens, rows.documents.ends.tolist()
    expected = {place for place in range(1, 8 * len(rows) + 1) if place not in ends}
    for batch in (Batches(rows, 1, seed=3), Batches(rows, 2, seed=3)):
        found = []
        for number, part in enumerate(batch):
            if number == len(rows) // batch.batch_size:
                break
            for tokens, targets, segments in zip(*map(part.get, ARRAYS), strict=True):
                starts = [
                    start
                    for start in range(0, len(every) - 8, 8)
                    if (every[start : start + 8] == tokens).all()
                ]
                assert len(starts) == 1
                for place, target in enumerate(targets, starts[0] + 1):
                    if target != IGNORED:
                        assert target == every[place]
                        found.append(place)
                documents = np.searchsorted(ends, starts[0] + np.arange(8), side="right")
                assert_bitwise(segments, (documents - documents[0]).astype(np.int32), "segments")
        assert len(found) == len(set(found))
        if batch.batch_size == 1:
            assert set(found) == expected


def test_order() -> None:
    """The seed decides it; every epoch has another; it goes on from any state."""
    rows = _packed(4)
    batches = Batches(rows, 3, seed=5)
    found = [part["tokens"] for part, _ in zip(batches, range(20), strict=False)]
    again = [part["tokens"] for part, _ in zip(batches, range(20), strict=False)]
    other = [part["tokens"] for part, _ in zip(Batches(rows, 3, 6), range(20), strict=False)]
    assert_bitwise(np.stack(again), np.stack(found), "again")
    assert (np.stack(other) != np.stack(found)).any()
    lines = np.concatenate(found)
    epoch = len(rows)
    first, second = lines[:epoch], lines[epoch : 2 * epoch]
    assert (first != second).any()
    assert_bitwise(np.sort(first, axis=0), np.sort(second, axis=0), "the same sequences")
    begun = iter(batches)
    for _ in range(7):
        next(begun)
    state = json.loads(json.dumps(begun.get_state()))
    going_on = iter(batches)
    going_on.set_state(state)
    for expected in found[7:12]:
        assert_bitwise(next(going_on)["tokens"], expected, "after a restart")


def test_masked_batches() -> None:
    """A batch's masks are those of its number, also after a restart."""
    rows = _packed(8, has_next=False)
    batches = Batches(rows, 2, seed=9, mask_token_id=255)
    for number, part in zip(range(5), batches, strict=False):
        is_target = part["targets"] != IGNORED
        original = np.where(is_target, part["targets"], part["tokens"])
        expected = masked_lm_batch(original, 255, 256, seed=9, first_sequence=2 * number)
        assert_bitwise(part["tokens"], expected["tokens"].astype(np.int32), f"batch {number}")
        assert_bitwise(part["targets"], expected["targets"].astype(np.int32), f"batch {number}")


def test_validation_reads_each_sequence_once() -> None:
    rows = _packed()
    every = list(Batches(rows, 3, seed=0).in_order(count=1000))
    assert [len(part["tokens"]) for part in every] == [3, 3, 2]
    tokens = np.concatenate([part["tokens"] for part in every]).ravel()
    assert_bitwise(tokens, rows.documents.tokens[: len(tokens)].astype(np.int32), "tokens")
    assert len(list(Batches(rows, 3, seed=0).in_order(count=2))) == 2
