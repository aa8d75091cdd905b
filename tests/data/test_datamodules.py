"""DataModules: fixed shapes, the right content, exact resume through the Trainer."""

import logging
import pickle
import warnings

import lightning
import numpy as np
import pytest
import sentencepiece
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from make_shards import flac, tone, write_audio_shards, write_code_shards, write_unit_shards

from speechssm.audio.resample import resample
from speechssm.data.datamodules import AudioDataModule, CodeDataModule, UnitDataModule
from speechssm.data.packing import IGNORED
from speechssm.data.resume import CountConsumedBatches
from speechssm.data.shards import ShardWriter
from speechssm.data.transcripts import (
    CUT,
    NO_ROOM,
    NONE,
    OUTSIDE,
    TOO_LONG,
    WORDLESS,
    frames_needed,
)
from speechssm.errors import ConfigError, FingerprintError, ShardError

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def batches(loader, count):
    iterator = iter(loader)
    return [next(iterator) for _ in range(count)]


def shapes(batch):
    return {key: (tuple(value.shape), value.dtype) for key, value in batch.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    write_audio_shards(root / "audio", [[0.5, 1.5], [0.3], [2.0, 1.0, 0.2], [0.7]])
    write_unit_shards(root / "units", [90, 40, 7, 33, 120], heldout=[50, 23])
    write_code_shards(root / "codes", [30, 12, 25])
    with open(root / "text.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["THE CAT SAT", "ON THE MAT"] * 20),
            model_writer=file,
            vocab_size=20,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return root


def make(kind, root, **options):
    if kind == "audio":
        options = {"text_model": root / "text.model", "max_text_length": 9, **options}
        return AudioDataModule(root / "audio", 1.0, 2, num_workers=0, **options)
    if kind == "units":
        return UnitDataModule(root / "units", 20, 2, **options)
    return CodeDataModule(root / "codes", 0.8, 2, **options)


EXPECTED = {
    "audio": {
        "audio": ((2, 16000), torch.float32),
        "audio_length": ((2,), torch.int64),
        "text": ((2, 9), torch.int64),
        "text_length": ((2,), torch.int64),
    },
    "units": {
        "inputs": ((2, 20), torch.int64),
        "targets": ((2, 20), torch.int64),
        "document_start": ((2, 20), torch.bool),
    },
    "codes": {
        "codes": ((2, 3, 40), torch.int64),
        "units": ((2, 20), torch.int64),
        "length": ((2,), torch.int64),
    },
}


@pytest.mark.parametrize("kind", ["audio", "units", "codes"])
def test_shapes_never_change_and_everything_pickles(folders, kind):
    module = pickle.loads(pickle.dumps(make(kind, folders)))
    train, val = module.train_dataloader(), module.val_dataloader()
    got = [*batches(train, 12), *val]
    assert all(shapes(batch) == EXPECTED[kind] for batch in got)
    pickle.dumps((module, train, val))


@pytest.mark.parametrize("kind", ["audio", "units", "codes"])
def test_validation_is_the_same_finite_list_for_every_seed(folders, kind):
    one, other = (list(make(kind, folders, seed=seed).val_dataloader()) for seed in (0, 9))
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert len(list(make(kind, folders, val_batches=1).val_dataloader())) == 1


def test_validation_of_units_scores_each_heldout_unit_once(folders):
    module = UnitDataModule(folders / "units", 20, 3)
    targets = torch.cat([batch["targets"].flatten() for batch in module.val_dataloader()])
    assert sorted(targets[targets != IGNORED].tolist()) == [*range(50), *range(1000, 1023)]
    assert len(targets) == 6 * 20  # four sequences, filled up to two batches of three


def test_audio_rows_hold_an_utterance_with_its_text_or_a_crop_without(folders):
    module = make("audio", folders)
    kinds = set()
    for batch in batches(module.train_dataloader(), 20):
        for row in range(2):
            length, words = int(batch["audio_length"][row]), int(batch["text_length"][row])
            assert length in {16000, 8000, 4800, 11200, 3200}
            assert not batch["audio"][row, length:].any() and batch["audio"][row, :length].any()
            assert (words > 0) == (length in {8000, 4800, 11200})  # first pieces that fit whole
            assert (batch["text"][row, words:] == 0).all()
            kinds.add((length, words > 0))
    assert len(kinds) == 5


def test_joined_rows_hold_what_follows_in_the_document_as_far_as_it_fits(folders, tmp_path):
    write_audio_shards(tmp_path, [[0.3, 0.25, 0.2, 0.9], [0.4]])
    module = AudioDataModule(
        tmp_path, 1.0, 5, num_workers=0, text_model=folders / "text.model", join=True
    )
    batch = next(iter(module.train_dataloader()))
    rows = {
        int(length): int(words)
        for length, words in zip(batch["audio_length"], batch["text_length"], strict=True)
    }
    # The first piece alone has a text; 0.25 + 0.2 s go on, 0.9 s more do not fit into the second.
    assert set(rows) == {4800, 7200, 3200, 14400, 6400}
    assert {length for length, words in rows.items() if words} == {4800, 6400}
    joined = batch["audio"][batch["audio_length"].tolist().index(7200)]
    expected = np.concatenate([tone(0.25, 165), tone(0.2, 180)])
    assert np.abs(joined[:7200].numpy() - expected).max() < 1e-3


def test_joined_rows_join_their_transcripts(folders, tmp_path):
    with ShardWriter(tmp_path / "train", "audio") as writer:
        for number, (document, text) in enumerate([("a", "THE"), ("a", "CAT"), ("b", "SAT")]):
            meta = {"document": document, "text": text, "sample_rate": 16000, "seconds": 0.2}
            members = {"flac": flac(tone(0.2, 200 + 50 * number)), "json": meta}
            writer.write(f"{document}-{number}", members, seconds=0.2)
    module = AudioDataModule(
        tmp_path, 1.0, 3, num_workers=0, text_model=folders / "text.model", join=True
    )
    batch = next(iter(module.train_dataloader()))
    encode = module.text.encode
    found = {
        tuple(t[:n].tolist()) for t, n in zip(batch["text"], batch["text_length"], strict=True)
    }
    assert found == {tuple(encode(text)) for text in ("THE CAT", "CAT", "SAT")}


def test_crops_are_parts_of_the_recording_and_move_between_passes(folders):
    module = AudioDataModule(folders / "audio", 0.25, 7, num_workers=0)  # 7 samples: one pass each
    whole = torch.from_numpy(tone(2.0, 150 + 40 * 2))  # document 2, piece 0
    windows = whole.unfold(0, 200, 1)[: len(whole) - 3999]
    found = []
    for batch in batches(module.train_dataloader(), 3):
        errors = torch.stack(
            [(windows - row[:200]).abs().amax(dim=1).min() for row in batch["audio"]]
        )
        assert (errors < 1e-3).sum() == 1  # the crop of that sample, once per pass
        found.append(batch["audio"][errors.argmin()])
    assert not torch.equal(found[0], found[1])


def test_code_rows_keep_codes_and_units_aligned(folders):
    module = make("codes", folders)
    lengths = set()
    for batch in batches(module.train_dataloader(), 10):
        for row in range(2):
            length = int(batch["length"][row])
            lengths.add(length)
            units = batch["units"][row, : length // 2]
            assert torch.equal(batch["codes"][row, 0, :length:2], 2 * units)
            assert torch.equal(batch["codes"][row, 2, 1:length:2], 2 * units + 2001)
            assert not batch["codes"][row, :, length:].any()
    assert lengths == {24, 40}


def test_models_learn_their_sizes_from_the_shards(folders):
    assert make("units", folders).fixed_by_data() == {"vocab_size": 6000}
    assert make("codes", folders).fixed_by_data() == {
        "unit_vocab_size": 5000,
        "num_quantizers": 3,
        "codebook_size": 8000,
    }
    assert make("audio", folders, text_model=None).fixed_by_data() == {}
    assert make("audio", folders).fixed_by_data()["text_vocab_size"] > 5


@pytest.mark.parametrize("rate", [12_000, 24_000])
def test_crops_of_shards_at_another_rate_are_resampled(folders, rate, caplog):
    """A crop is where that of the shards' own rate is, and sounds the same."""
    plain, other = (
        next(iter(make("audio", folders, sample_rate=r, text_model=None).train_dataloader()))
        for r in (16_000, rate)
    )
    assert other["audio"].shape[1] == round(plain["audio"].shape[1] * rate / 16_000)
    expected_BS = resample(plain["audio"], 16_000, rate)
    edge = rate // 100  # the filter sees silence where the crop was cut out
    inside = slice(edge, -edge)
    error_BS = other["audio"][:, inside] - expected_BS[:, inside]
    assert error_BS.norm() < 0.1 * expected_BS.norm()
    lengths = (other["audio_length"] / rate - plain["audio_length"] / 16_000).abs()
    assert lengths.max() < 1e-3
    assert ("nothing above 8000 Hz" in caplog.text) == (rate > 16_000)


def test_folders_that_do_not_fit_are_refused_with_the_remedy(folders, tmp_path):
    with pytest.raises(ShardError, match=r"does not exist; make it with `speechssm tokenize"):
        UnitDataModule(tmp_path / "none", 20, 2).train_dataloader()
    with pytest.raises(ShardError, match="holds audio shards where unit shards are needed"):
        UnitDataModule(folders / "audio", 20, 2).train_dataloader()
    with pytest.raises(FingerprintError, match=r"aaaaaaaaaaaa\.\.\..*names cccc"):
        UnitDataModule(folders / "units", 20, 2, tokenizer_fingerprint="c" * 64).fixed_by_data()
    with pytest.raises(FingerprintError, match="codec_fingerprint bbbb"):
        CodeDataModule(folders / "codes", 1, 2, codec_fingerprint="c" * 64).train_dataloader()
    with pytest.raises(ConfigError, match=r"data\.seconds=0\.93"):
        CodeDataModule(folders / "codes", 0.93, 2).train_dataloader()
    write_unit_shards(tmp_path / "train_only", [30])
    for path in (tmp_path / "train_only" / "heldout").iterdir():
        path.unlink()
    with pytest.raises(ShardError, match="heldout is empty"):
        UnitDataModule(tmp_path / "train_only", 20, 2).val_dataloader()


def test_a_checkpoint_on_other_shards_is_refused(folders, tmp_path):
    write_unit_shards(tmp_path, [30, 40], fingerprint="d" * 64)
    state = make("units", folders).state_dict()
    with pytest.raises(FingerprintError, match=r"trained on shards with tokenizer_fingerprint aaa"):
        UnitDataModule(tmp_path, 20, 2).load_state_dict(state)


def test_a_corrupt_recording_is_named(folders, tmp_path):
    write_audio_shards(tmp_path, [[0.5]])
    path = tmp_path / "train" / "shard-000000.tar"
    path.write_bytes(path.read_bytes().replace(b"fLaC", b"XXXX"))
    module = AudioDataModule(tmp_path, 1.0, 1, num_workers=1)
    with pytest.raises(ShardError, match=r"shard-000000\.tar: train0-0000\.flac cannot be decoded"):
        next(iter(module.train_dataloader()))


class Recorder(lightning.LightningModule):
    """A model that remembers what it was fed."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(20, 1)
        self.seen = []

    def training_step(self, batch, index):
        self.seen.append(batch["targets"].clone())
        return self.layer(batch["inputs"].float() / 6000).square().mean()

    def validation_step(self, batch, index):
        self.layer(batch["inputs"].float())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def fit(folder, checkpoints, steps, *, workers=0, resume=None, accumulate=1, batch_size=2, each=4):
    lightning.seed_everything(0, verbose=False)
    model, data = Recorder(), UnitDataModule(folder, 20, batch_size, num_workers=workers, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_steps=steps,
            limit_train_batches=6,
            accumulate_grad_batches=accumulate,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            callbacks=[
                CountConsumedBatches(),
                ModelCheckpoint(
                    checkpoints, filename="{step}", save_top_k=-1, every_n_train_steps=each
                ),
            ],
        )
        trainer.fit(model, datamodule=data, ckpt_path=resume)
    return model, data


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_resume_is_exact_at_any_step_and_with_other_workers(folders, tmp_path, workers):
    straight, data = fit(folders / "units", tmp_path, 14, workers=workers)
    assert data.state_dict()["consumed"] == 14
    for step in (4, 12):  # inside of an epoch, and between two
        resumed, _ = fit(
            folders / "units",
            tmp_path / "again",
            14,
            workers=(workers + step // 4) % 4,
            resume=tmp_path / f"step={step}.ckpt",
        )
        assert len(resumed.seen) == 14 - step
        assert all(map(torch.equal, resumed.seen, straight.seen[step:]))
        assert torch.equal(resumed.layer.weight, straight.layer.weight)


def test_resume_is_exact_with_gradient_accumulation_and_another_batch_size(folders, tmp_path):
    straight, data = fit(folders / "units", tmp_path, 12, accumulate=3, each=3)
    assert data.state_dict()["consumed"] == 36
    resume = tmp_path / "step=3.ckpt"
    assert torch.load(resume, weights_only=True)["UnitDataModule"]["examples"] == 18
    resumed, _ = fit(folders / "units", tmp_path / "again", 12, accumulate=3, each=3, resume=resume)
    assert torch.equal(torch.cat(resumed.seen), torch.cat(straight.seen[9:]))
    assert torch.equal(resumed.layer.weight, straight.layer.weight)
    wider, _ = fit(folders / "units", tmp_path / "wide", 6, batch_size=4, resume=resume)
    assert torch.equal(torch.cat(wider.seen), torch.cat(straight.seen[9:15]))


def test_batches_still_being_accumulated_are_not_counted(folders):
    data = make("units", folders)
    for stepped in (False, True, False):
        data.count_batch(stepped)
    assert data.state_dict()["consumed"] == 2 and data.position.examples == 4


def test_crops_resume_in_the_middle_of_a_pass(folders):
    for kind in ("audio", "codes"):
        straight = batches(make(kind, folders).train_dataloader(), 9)
        module = make(kind, folders)
        module.load_state_dict({"consumed": 5, "examples": 10, "fingerprints": {}})
        for a, b in zip(batches(module.train_dataloader(), 4), straight[5:], strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)


def test_configs_build_their_datamodules(folders):
    from pathlib import Path

    import hydra
    from omegaconf import OmegaConf

    conf = Path(__file__).parents[2] / "conf" / "data"
    for kind in ("audio", "units", "codes"):
        config = OmegaConf.create({"seed": 1, "sequence": {"length": 20}})
        config.data = OmegaConf.load(conf / f"{kind}.yaml")
        config.data.folder = str(folders / kind)
        module = hydra.utils.instantiate(config.data, num_workers=0, batch_size=2)
        assert np.isfinite(next(iter(module.train_dataloader()))[next(iter(EXPECTED[kind]))]).all()


def test_an_error_swallowed_by_a_loader_thread_ends_the_run(folders, tmp_path):
    """torch_xla reads the loader in a thread that only ends early when something is raised."""
    write_unit_shards(tmp_path, [90, 40], per_shard=1)
    data = UnitDataModule(tmp_path, 20, 2)
    loader = data.train_dataloader()
    (tmp_path / "train" / "shard-000001.tar").unlink()

    def swallowing():
        try:
            yield from loader
        except ShardError:
            return

    assert len(list(swallowing())) < 10
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.datamodule = data
    with pytest.raises(ShardError, match=r"shard-000001\.tar is named in"):
        CountConsumedBatches().on_train_epoch_end(trainer, Recorder())


# --- transcripts that cannot be used --------------------------------------------------------------

# (document, seconds, transcript): 0.2 s are 5 frames, 1 s are 25.
UTTERANCES = [
    ("good", 0.6, "THE CAT"),
    ("no-text", 0.5, None),
    ("empty", 0.5, ""),
    ("long-audio", 1.5, "THE CAT"),
    ("no-letter", 0.5, "\u2014 ..."),
    ("strange", 0.6, "THE \u0416 CAT"),
    ("long-text", 1.0, "THE CAT SAT ON THE MAT " * 4),
    ("too-fast", 0.08, "THE CAT SAT"),
]


@pytest.fixture(scope="module")
def utterances(tmp_path_factory):
    folder = tmp_path_factory.mktemp("utterances")
    for split in ("train", "heldout"):
        with ShardWriter(folder / split, "audio", max_samples=3) as writer:
            for document, seconds, text in UTTERANCES:
                meta = {"document": document, "seconds": seconds, "sample_rate": 16000}
                if text is not None:
                    meta["text"] = text
                writer.write(document, {"flac": flac(tone(seconds)), "json": meta}, seconds=seconds)
    return folder


def of_utterances(folder, folders, **options):
    options = {"text_model": folders / "text.model", "max_text_length": 20, **options}
    return AudioDataModule(folder, 1.0, len(UTTERANCES), num_workers=0, **options)


def test_transcripts_that_are_not_used_are_counted_with_an_example(utterances, folders, caplog):
    module = of_utterances(utterances, folders)
    with caplog.at_level(logging.INFO, logger="speechssm.data.datamodules"):
        batch = next(iter(module.train_dataloader()))
    assert int((batch["text_length"] > 0).sum()) == 3  # good, strange and too-fast
    census = module.transcripts("train")
    assert (census.rows, census.used) == (8, 3) and census.faulty
    first = {finding: key for finding, (_, key) in census.found.items()}
    assert {finding: count for finding, (count, _) in census.found.items()} == {
        NONE: 2, CUT: 1, WORDLESS: 1, OUTSIDE: 1, TOO_LONG: 1, NO_ROOM: 1,
    }  # fmt: skip
    assert first[NONE] in ("no-text", "empty")
    assert first[CUT] == "long-audio" and first[WORDLESS] == "no-letter"
    assert first[OUTSIDE] == "strange" and first[TOO_LONG] == "long-text"
    assert first[NO_ROOM] == "too-fast"
    lines = [record for record in caplog.records if "rows have a transcript" in record.message]
    assert len(lines) == 1 and lines[0].levelno == logging.WARNING
    assert "3 of 8 rows" in lines[0].message and "(the first: too-fast)" in lines[0].message


def test_every_rank_but_the_first_and_trainings_without_text_say_nothing(
    utterances, folders, caplog, monkeypatch
):
    with caplog.at_level(logging.INFO, logger="speechssm.data.datamodules"):
        of_utterances(utterances, folders, text_model=None).train_dataloader()
        monkeypatch.setattr(AudioDataModule, "_ranks", lambda self: (1, 2))
        of_utterances(utterances, folders).train_dataloader()
    assert not caplog.records


@pytest.mark.parametrize("join", [False, True])
def test_the_census_says_what_the_batches_then_hold(folders, tmp_path, join):
    write_audio_shards(tmp_path, [[0.3, 0.25, 0.2, 0.9], [0.4], [1.2, 0.3]])
    module = AudioDataModule(
        tmp_path, 1.0, 7, num_workers=0, text_model=folders / "text.model", join=join
    )
    batch = next(iter(module.train_dataloader()))
    census = module.transcripts("train")
    assert census.rows == 7
    assert census.used == int((batch["text_length"] > 0).sum()) == 2
    assert census.found[CUT] == (1, "train2-0000") and not census.faulty
    assert module.transcripts("train", most=2).rows == 2


def test_a_corpus_of_which_no_transcript_is_used_is_a_warning(folders, tmp_path):
    write_audio_shards(tmp_path, [[1.5]])
    module = AudioDataModule(tmp_path, 1.0, 1, text_model=folders / "text.model")
    assert module.transcripts("train").faulty


def test_frames_that_ctc_needs():
    assert frames_needed([]) == 0 and frames_needed([3]) == 1
    assert frames_needed([3, 4, 3]) == 3 and frames_needed([3, 3, 4, 4, 4]) == 8
