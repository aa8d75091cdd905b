"""A world in which a unit is how loud 40 ms are and a voice is a pitch.

The fake SoundStorm copies the prompt's pitch into every frame and the units' loudness too, so what
it speaks has the words of the recording and the voice of the prompt exactly.
"""

import numpy as np
import pytest
import torch

from speechssm.audio.io import encode_flac
from speechssm.data.shards import ShardWriter
from speechssm.evaluation.edit_distance import edit_distance
from speechssm.evaluation.judges.recognizer import WordErrors

RATE, UNITS, CODES = 16_000, 50, 64
FRAME, PITCH_STEP = 320, 50  # samples; Hz: a frame holds whole periods of every pitch
UTTERANCE_SECONDS, WORD_SECONDS = 5.0, 0.48
PITCHES = {"ada": 200, "bob": 400, "cyd": 800}


def pitch_of(audio):
    """The loudest multiple of 50 Hz, of a row or of rows of 16 kHz sound."""
    spectrum = np.abs(np.fft.rfft(np.asarray(audio), n=RATE, axis=-1))
    return spectrum[..., ::PITCH_STEP][..., :CODES].argmax(-1)


def say(pitch, words, seconds=WORD_SECONDS):
    """float32 [S]: a tone that is loud or soft, word after word."""
    amplitude = np.repeat([0.5 if word == "loud" else 0.1 for word in words], round(seconds * RATE))
    time = np.arange(len(amplitude)) / RATE
    return (amplitude * np.sin(2 * np.pi * pitch * time)).astype(np.float32)


class LoudnessTokenizer:
    sample_rate, rate, vocab_size, fingerprint = RATE, 25, UNITS, "0" * 64

    def encode(self, audio, rate):
        assert rate == RATE
        frames = audio[: len(audio) // 640 * 640].reshape(-1, 640)
        return np.minimum(np.rint(np.abs(frames).max(1) * UNITS), UNITS - 1).astype(np.int64)


class ToneCodec(torch.nn.Module):
    """Level 1 is the loudness of a frame, level 2 the pitch of the recording."""

    sample_rate, hop_length, num_quantizers, codebook_size = RATE, FRAME, 2, CODES
    fingerprint = "1" * 64

    def __init__(self):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(()))
        self.gains = [1.0]  # of windows, in turn
        self.decoded = 0

    def encode(self, audio_BS):
        frames_BTS = audio_BS[:, : audio_BS.shape[1] // FRAME * FRAME].unflatten(1, (-1, FRAME))
        loudness_BT = (frames_BTS.abs().amax(-1) * UNITS).round().long()
        pitch_B = torch.from_numpy(pitch_of(audio_BS.numpy()))
        return torch.stack([loudness_BT, pitch_B[:, None].expand_as(loudness_BT)], dim=1)

    def decode(self, codes_BQT):
        amplitude_BS = (codes_BQT[:, 0] / UNITS).repeat_interleave(FRAME, dim=1)
        pitch_BS = (codes_BQT[:, 1] * PITCH_STEP).repeat_interleave(FRAME, dim=1)
        time_S = torch.arange(amplitude_BS.shape[1]) / RATE
        self.decoded += 1
        gain = self.gains[self.decoded % len(self.gains)]
        return (gain * amplitude_BS * torch.sin(2 * torch.pi * pitch_BS * time_S)).float()


class CopyingStorm:
    unit_vocab_size, codebook_size, num_quantizers, unit_repeat = UNITS, CODES, 2, 2
    mask_id, device = CODES, torch.device("cpu")

    def __call__(self, codes_BQT, units_BU):
        loudness_BT = units_BU.repeat_interleave(2, dim=1)
        return torch.stack([loudness_BT, codes_BQT[:, 1, :1].expand_as(loudness_BT)], -1).float()

    def logits(self, hidden_BTD, level):
        return 1e4 * torch.nn.functional.one_hot(hidden_BTD[..., level].long(), CODES).float()


class PitchEncoder:
    """A voice is a bump around its pitch."""

    def embed(self, audio, rate):
        assert rate == RATE
        bump = np.exp(-0.5 * ((np.arange(CODES) - pitch_of(audio)) / 3) ** 2)
        return (bump / np.linalg.norm(bump)).astype(np.float32)


class LoudnessMOS:
    """Louder is better, which no joint changes."""

    def score(self, audio, rate):
        return {"distillmos": 3 + float(np.abs(audio).max())}


class LoudnessRecognizer:
    def transcribe(self, audio, rate):
        words = audio[: len(audio) // 7680 * 7680].reshape(-1, 7680)
        return " ".join("loud" if np.abs(word).max() > 0.3 else "soft" for word in words)

    def word_errors(self, reference, heard):
        expected = reference.split()
        return WordErrors(edit_distance(expected, heard.split()), len(expected))


@pytest.fixture
def judges():
    return {"speaker": PitchEncoder(), "distillmos": LoudnessMOS(),
            "recognizer": LoudnessRecognizer()}  # fmt: skip


@pytest.fixture
def models():
    return {"soundstorm": CopyingStorm(), "codec": ToneCodec(), "tokenizer": LoudnessTokenizer()}


@pytest.fixture(scope="session")
def spoken_shards(tmp_path_factory):
    """Three speakers, a document of 38.4 s each, in eight utterances of ten words."""
    folder = tmp_path_factory.mktemp("spoken")
    generator = np.random.default_rng(0)
    with ShardWriter(folder / "heldout", "audio") as writer:
        for speaker, pitch in PITCHES.items():
            for number in range(8):
                words = generator.choice(["loud", "soft"], 10)
                details = {
                    "corpus": "tones", "speaker": speaker, "chapter": speaker, "synthetic": False,
                    "document": f"{speaker}-1", "start_s": number * 4.8, "seconds": 4.8,
                    "sample_rate": RATE, "text": " ".join(words),
                }  # fmt: skip
                flac = encode_flac(say(pitch, words), RATE)
                members = {"flac": flac, "json": details}
                writer.write(f"{speaker}-{number}", members, seconds=4.8)
    return folder
