"""Documents out of shards and folders: what is in them, and who is on which side."""

import itertools
import json

import numpy as np
import pytest

from speechssm.audio.io import encode_flac, write_audio
from speechssm.data.shards import ShardWriter
from speechssm.errors import ConfigError
from speechssm.evaluation.corpus import RATE, Utterance, choose_material

TEXT = "some words"


def sound(seconds, value):
    return np.full(round(seconds * RATE), value, dtype=np.float32)


def write_shards(folder, heldout, train):
    """Documents as (speaker, [piece lengths in seconds], synthetic)."""
    for split, documents in (("heldout", heldout), ("train", train)):
        with ShardWriter(folder / split, "audio", max_samples=4) as writer:
            for number, (speaker, lengths, synthetic) in enumerate(documents):
                for piece, seconds in enumerate(lengths):
                    entry = {
                        "document": f"{split}{number}", "speaker": speaker, "chapter": "c",
                        "seconds": seconds, "start_s": 0.0, "sample_rate": RATE, "text": TEXT,
                        "synthetic": synthetic,
                    }  # fmt: skip
                    flac = encode_flac(sound(seconds, (piece + 1) / 16), RATE)
                    key = f"{split}{number}-{piece}"
                    writer.write(key, {"flac": flac, "json": entry}, seconds=seconds,
                                 keep_with_previous=piece > 0)  # fmt: skip
    return folder


def write_folder(folder, rows):
    """A folder with a manifest; rows as (file, speaker, chapter, seconds)."""
    lines = ["path\tspeaker\tgender\tseconds\trate\tlicence\tset\tchapter\ttranscript_source\t"
             "transcript"]  # fmt: skip
    for number, (name, speaker, chapter, seconds) in enumerate(rows):
        write_audio(folder / name, sound(seconds, (number + 1) / 64), RATE)
        lines.append(
            f"{name}\t{speaker}\tF\t{seconds}\t{RATE}\tx\tset\t{chapter}\tofficial\t{TEXT}"
        )
    (folder / "manifest.tsv").write_text("\n".join(lines) + "\n")
    return folder


def speakers(documents):
    return {document.speaker for document in documents}


def test_pieces_of_a_document_are_joined_in_order(tmp_path):
    folder = write_shards(tmp_path, [("a", [1.0, 0.5], False)], [("b", [1.0], False)])
    material = choose_material(folder)
    (document,) = material.heldout
    assert document.seconds == 1.5
    assert [(u.start, u.stop, u.text) for u in document.utterances] == [
        (0, RATE, TEXT),
        (RATE, RATE * 3 // 2, TEXT),
    ]
    assert document.audio[RATE - 1] == pytest.approx(1 / 16)
    assert document.audio[RATE] == pytest.approx(2 / 16)
    assert speakers(material.fit) == {"b"}


def test_where_nothing_is_fitted_all_of_a_folder_is_measured(tmp_path):
    folder = write_folder(tmp_path, [(f"{name}.flac", name, "c", 1.0) for name in "abcd"])
    assert len(choose_material(folder).heldout) < 4
    material = choose_material(folder, probes=False)
    assert speakers(material.heldout) == set("abcd") and material.fit == []
    named = choose_material(folder, probes=False, corpus={"heldout_speakers": ["a", "b"]})
    assert speakers(named.heldout) == {"a", "b"}


def test_synthetic_speech_is_left_out_unless_it_is_asked_for(tmp_path):
    heldout = [("a", [1.0], False), ("machine", [1.0], True)]
    folder = write_shards(tmp_path, heldout, [("b", [1.0], False)])
    material = choose_material(folder)
    assert speakers(material.heldout) == {"a"}
    assert material.skipped["synthetic documents"] == 1
    assert len(choose_material(folder, synthetic=True).heldout) == 2
    with pytest.raises(ConfigError, match="synthetic=true"):
        choose_material(write_shards(tmp_path / "x", heldout[1:], [("b", [1.0], False)]))


def test_speakers_whom_the_probes_learn_are_not_measured(tmp_path):
    heldout = [("a", [1.0], False), ("b", [1.0], False)]
    folder = write_shards(tmp_path, heldout, [("b", [1.0], False)])
    material = choose_material(folder)
    assert speakers(material.heldout) == {"a"}
    assert material.skipped == {"held-out documents whose speaker the probes learn": 1}


def test_hours_are_shared_by_the_speakers(tmp_path):
    heldout = [("a", [1.0], False)] * 6 + [("b", [1.0], False), ("c", [1.0], False)]
    folder = write_shards(tmp_path, heldout, [("z", [1.0], False)])
    material = choose_material(folder, max_hours=3 / 3600, seed=1)
    assert sorted(document.speaker for document in material.heldout) == ["a", "b", "c"]
    names = [document.name for document in material.heldout]
    again = choose_material(folder, max_hours=3 / 3600, seed=1)
    assert [document.name for document in again.heldout] == names
    others = {
        tuple(d.name for d in choose_material(folder, max_hours=3 / 3600, seed=seed).heldout)
        for seed in range(6)
    }
    assert len(others) > 1


def test_a_folder_is_divided_by_speaker(tmp_path):
    rows = [(f"{s}-{n}.wav", s, f"{s}-chapter", 0.5) for s in "abcdef" for n in range(2)]
    material = choose_material(write_folder(tmp_path, rows))
    assert material.speakers_known
    assert not speakers(material.heldout) & speakers(material.fit)
    assert speakers(material.heldout) | speakers(material.fit) == set("abcdef")
    # Utterances of a chapter are one document.
    assert all(document.seconds == 1.0 for document in material.heldout)
    assert all(len(document.utterances) == 2 for document in material.heldout)


def test_named_speakers_are_held_out_and_fit_takes_another_folder(tmp_path):
    rows = [(f"{s}.wav", s, s, 0.5) for s in "abc"]
    folder = write_folder(tmp_path / "one", rows)
    material = choose_material(folder, corpus={"heldout_speakers": ["b"]})
    assert (speakers(material.heldout), speakers(material.fit)) == ({"b"}, {"a", "c"})
    other = write_folder(tmp_path / "two", [("x.wav", "x", "x", 0.5), ("a.wav", "a", "a", 0.5)])
    material = choose_material(folder, other)
    # Everything is measured but the speaker whom the probes learn.
    assert (speakers(material.heldout), speakers(material.fit)) == ({"b", "c"}, {"a", "x"})


def test_files_without_a_manifest_are_documents_of_unknown_speakers(tmp_path):
    for name in "abcd":
        write_audio(tmp_path / f"{name}.wav", sound(0.5, 0.1), RATE)
    material = choose_material(tmp_path)
    assert not material.speakers_known
    assert len(material.heldout) + len(material.fit) == 4
    assert material.heldout[0].utterances[0].text is None
    (tmp_path / "one").mkdir()
    write_audio(tmp_path / "one" / "a.wav", sound(0.5, 0.1), RATE)
    material = choose_material(tmp_path / "one")
    assert (len(material.heldout), material.fit) == (1, [])


def test_bad_files_are_skipped_and_counted(tmp_path, caplog):
    rows = [(f"{s}-{n}.wav", s, s, 0.5) for s in "ab" for n in range(2)]
    folder = write_folder(tmp_path, rows)
    (folder / "a-0.wav").write_bytes(b"not a sound")
    material = choose_material(folder, corpus={"heldout_speakers": ["a"]})
    assert material.heldout[0].seconds == 0.5
    assert material.skipped == {"unreadable files": 1}
    assert "a-0.wav" in caplog.text
    (folder / "a-1.wav").write_bytes(b"not a sound")
    with pytest.raises(ConfigError, match="no held-out recording can be used"):
        _ = choose_material(folder, corpus={"heldout_speakers": ["a"]}).heldout


def test_other_rates_are_resampled(tmp_path):
    write_audio(tmp_path / "a.wav", np.zeros(44_100, dtype=np.float32), 44_100)
    assert choose_material(tmp_path).heldout[0].seconds == pytest.approx(1.0)


@pytest.mark.parametrize("rate", [12.5, 25.0, 50.0])
def test_each_unit_belongs_to_the_utterance_at_its_centre(rate):
    edges = [0, 1000, 12_345, 12_346, 50_000, 80_000]
    total = round(80_000 / RATE * rate)
    owners = np.full(total, -1)
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        owners[Utterance(start, stop, None, "").units(rate)] = number
    centres = (np.arange(total) + 0.5) * RATE / rate
    assert (owners == np.searchsorted(edges, centres, side="right") - 1).all()


def test_nothing_to_measure_is_named(tmp_path):
    with pytest.raises(ConfigError, match="neither a folder of recordings nor of audio shards"):
        choose_material(tmp_path / "nowhere")


def test_counts_go_into_json(tmp_path):
    folder = write_shards(tmp_path, [("a", [1.0], False)], [("b", [1.0], False)])
    assert json.dumps(choose_material(folder).skipped) == "{}"
