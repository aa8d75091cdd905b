"""Build the embedded sample corpus from folders of public recordings.

    python data/sample/build.py SPEECH SPEECH_TTS OUT [--voice speechssm/assets/voice.flac]

SPEECH holds real read speech with a `manifest.tsv` (path, speaker, gender, seconds, rate, licence,
set, chapter, transcript_source, transcript): LibriSpeech chapters (set `dev-clean`), single
LibriSpeech utterances (set `train-clean-100`) and LJSpeech chapters (set `ljspeech`).
SPEECH_TTS holds synthesised documents with a `manifest.tsv` (path, speaker, gender, seconds, rate,
licence, document, sentences) and, per document, a table of sentences (start_s, end_s, text).
OUT receives {train,heldout}/*.opus and manifest.tsv; an existing manifest stops the script, since
the audio files live in a Git history and every rewrite of them stays there for good.

What is chosen, and why, stands in README.md beside this script.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile

from speechssm.audio.io import read_audio, write_audio
from speechssm.data.corpora.manifest import read_table
from speechssm.errors import CorpusError, SpeechSSMError

RATE = 16_000
# libsndfile's scale from 0 (largest) to 1 (smallest); 0.94 gives Opus at about 21 kb/s mono.
COMPRESSION_LEVEL = 0.94
SIZE_LIMIT_BYTES = 40_000_000

HELDOUT_SPEAKERS = {"777", "2078", "2086", "1673"}
# Short chapters without neighbour of speakers who are there with other ones: size over nothing new.
LEFT_OUT_CHAPTERS = {
    "652-130737", "2803-154320", "1462-170145", "1988-24833",
    "1272-135031", "251-137823", "174-50561",
}  # fmt: skip
LJSPEECH = {"LJ001": "train", "LJ002": "heldout"}
SYNTHETIC = {
    "carroll-alice_bf_emma": "train",
    "chesterton-thursday_bm_george": "train",
    "austen-emma_af_heart": "heldout",
    "bryant-stories_am_fenrir": "heldout",
}
# 24000 units, the longest training sequence, are 960 s; a little more leaves room for windows.
SYNTHETIC_SECONDS = 978.0
SINGLE_UTTERANCES_PER_GENDER = 30
SINGLE_UTTERANCE_SECONDS = (12.0, 17.0)
VOICE_UTTERANCE = "ljspeech/LJ001/LJ001-0090.flac"

COLUMNS = (
    "split", "document", "file", "speaker", "gender", "chapter", "start_s", "seconds",
    "text", "transcript_source", "licence", "synthetic",
)  # fmt: skip


@dataclass
class Document:
    """Audio of one document and its rows of the manifest."""

    name: str
    split: str
    blocks: list[np.ndarray] = field(default_factory=list)
    rows: list[dict[str, str]] = field(default_factory=list)

    def add(self, audio: np.ndarray, row: dict[str, str]) -> None:
        """Append one utterance."""
        start = sum(map(len, self.blocks)) / RATE
        self.blocks.append(audio)
        self.rows.append(row | {"start_s": f"{start:.6f}", "seconds": f"{len(audio) / RATE:.6f}"})


def rows_of(path: Path, columns: Collection[str]) -> list[dict[str, str]]:
    """Rows of a tab-separated table with a header that has these columns."""
    return [row for _, row in read_table(path, columns)]


def utterance_row(source: dict[str, str]) -> dict[str, str]:
    """The columns that a row of the manifest takes over from the source's manifest."""
    return {
        "speaker": source["speaker"],
        "gender": source["gender"],
        "chapter": source["chapter"],
        "text": source["transcript"],
        "transcript_source": source["transcript_source"],
        "licence": source["licence"],
        "synthetic": "0",
    }


def chapter_documents(speech: Path, table: list[dict[str, str]]) -> Iterator[Document]:
    """LibriSpeech: chapters with neighbouring numbers of one reader are one document."""
    chapters: dict[tuple[int, int], list[dict[str, str]]] = {}
    for row in table:
        if row["set"] == "dev-clean" and row["chapter"] not in LEFT_OUT_CHAPTERS:
            reader, chapter = map(int, row["chapter"].split("-"))
            chapters.setdefault((reader, chapter), []).append(row)
    runs: list[list[tuple[int, int]]] = []
    for key in sorted(chapters):
        if runs and runs[-1][-1] == (key[0], key[1] - 1):
            runs[-1].append(key)
        else:
            runs.append([key])
    for run in runs:
        reader, first = run[0]
        name = f"{reader}-{first}" if len(run) == 1 else f"{reader}-{first}-{run[-1][1]}"
        document = Document(name, "heldout" if str(reader) in HELDOUT_SPEAKERS else "train")
        for key in run:
            for row in sorted(chapters[key], key=lambda row: row["path"]):
                document.add(read_audio(speech / row["path"], RATE)[0], utterance_row(row))
        yield document


def ljspeech_documents(speech: Path, table: list[dict[str, str]]) -> Iterator[Document]:
    """LJSpeech: one document per chapter."""
    for chapter, split in LJSPEECH.items():
        document = Document(chapter, split)
        rows = [row for row in table if row["set"] == "ljspeech" and row["chapter"] == chapter]
        for row in sorted(rows, key=lambda row: row["path"]):
            document.add(read_audio(speech / row["path"], RATE)[0], utterance_row(row))
        yield document


def loudness_range(audio: np.ndarray) -> float:
    """Decibels between loud and quiet frames of 20 ms: large where the background is quiet."""
    frames = audio[: len(audio) // 320 * 320].reshape(-1, 320)
    energy = 10 * np.log10(np.mean(frames**2, axis=1) + 1e-9)
    return float(np.percentile(energy, 95) - np.percentile(energy, 10))


def single_documents(speech: Path, table: list[dict[str, str]]) -> Iterator[Document]:
    """The cleanest single utterances, one of each speaker, as many female as male."""
    shortest, longest = SINGLE_UTTERANCE_SECONDS
    for gender in "FM":
        candidates = []
        for row in table:
            fits = shortest <= float(row["seconds"]) <= longest
            if row["set"] == "train-clean-100" and row["gender"] == gender and fits:
                audio, _ = read_audio(speech / row["path"], RATE)
                if np.abs(audio).max() < 0.99:
                    candidates.append((-loudness_range(audio), row["path"], row, audio))
        for _, path, row, audio in sorted(candidates)[:SINGLE_UTTERANCES_PER_GENDER]:
            document = Document(Path(path).stem, "train")
            document.add(audio, utterance_row(row))
            yield document


def synthetic_documents(speech_tts: Path) -> Iterator[Document]:
    """Synthesised chapters, cut at the first end of a sentence past 16.3 minutes."""
    for source in rows_of(
        speech_tts / "manifest.tsv", ("path", "speaker", "document", "sentences")
    ):
        name = source["document"]
        if name not in SYNTHETIC:
            continue
        sentences = rows_of(speech_tts / source["sentences"], ("start_s", "end_s", "text"))
        number = next(
            index for index, row in enumerate(sentences) if float(row["end_s"]) > SYNTHETIC_SECONDS
        )
        # Half of the pause after the last sentence stays with it.
        stop = (float(sentences[number]["end_s"]) + float(sentences[number + 1]["start_s"])) / 2
        audio, _ = read_audio(speech_tts / source["path"], RATE)
        document = Document(name, SYNTHETIC[name], [audio[: round(stop * RATE)]])
        for row in sentences[: number + 1]:
            start, end = float(row["start_s"]), float(row["end_s"])
            document.rows.append(
                {
                    "speaker": source["speaker"],
                    "gender": source["gender"],
                    "chapter": name,
                    "start_s": f"{start:.6f}",
                    "seconds": f"{end - start:.6f}",
                    "text": " ".join(row["text"].split()),
                    "transcript_source": "text given to the synthesiser",
                    "licence": source["licence"],
                    "synthetic": "1",
                }
            )
        yield document


def build(speech: Path, speech_tts: Path, out: Path) -> None:
    """Write the audio files, then the manifest."""
    manifest = out / "manifest.tsv"
    if manifest.exists():
        raise CorpusError(f"{manifest} exists: build into an empty folder")
    table = rows_of(speech / "manifest.tsv", ("path", "speaker", "set", "chapter", "transcript"))
    rows: list[dict[str, str]] = []
    total = 0
    for documents in (
        chapter_documents(speech, table),
        ljspeech_documents(speech, table),
        synthetic_documents(speech_tts),
        single_documents(speech, table),
    ):
        for document in documents:
            path = out / document.split / f"{document.name}.opus"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(
                path, np.concatenate(document.blocks), RATE,
                format="OGG", subtype="OPUS", compression_level=COMPRESSION_LEVEL,
            )  # fmt: skip
            total += path.stat().st_size
            file = path.relative_to(out).as_posix()
            names = {"split": document.split, "document": document.name, "file": file}
            rows += [names | row for row in document.rows]
    rows.sort(key=lambda row: (row["split"], row["document"], float(row["start_s"])))
    with open(manifest, "w", newline="", encoding="utf-8") as output:
        writer = csv.DictWriter(
            output, COLUMNS, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None,
            lineterminator="\n",
        )  # fmt: skip
        writer.writeheader()
        writer.writerows(rows)
    print(f"{total / 1e6:.1f} MB in {len({row['file'] for row in rows})} documents")
    if total > SIZE_LIMIT_BYTES:
        raise CorpusError(f"{total} bytes are more than {SIZE_LIMIT_BYTES}: do not commit them")


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("speech", type=Path)
    parser.add_argument("speech_tts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--voice", type=Path, help="also write the default voice prompt here")
    arguments = parser.parse_args()
    try:
        build(arguments.speech, arguments.speech_tts, arguments.out)
        if arguments.voice is not None:
            audio, _ = read_audio(arguments.speech / VOICE_UTTERANCE, RATE)
            write_audio(arguments.voice, audio, RATE)
    except SpeechSSMError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
