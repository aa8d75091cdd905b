"""Shapes: B batch, Q quantiser levels, T codec frames, U units."""

from types import SimpleNamespace

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from speechssm.errors import ConfigError, FingerprintError
from speechssm.loading import load
from speechssm.nn import initial_weights
from speechssm.soundstorm.module import SoundStormModule

LEVELS, CODES, UNITS, ROWS, LENGTH = 3, 16, 12, 8, 20
MODEL = dict(
    _target_="speechssm.soundstorm.model.SoundStorm", unit_vocab_size=UNITS, codebook_size=CODES,
    num_quantizers=LEVELS, width=32, num_layers=2, num_heads=2, ffn_width=64, conv_kernel=3,
)  # fmt: skip
OPTIMIZER = dict(learning_rate=3e-3, weight_decay=0.01, warmup_steps=10, final_ratio=0.05)


def batches(count, seed):
    """Codes that follow from units: level 1 from the unit, finer levels from the level before.

    One code in ten is noise. Level 1 has the unit's skewed distribution, so guessing its most
    frequent code is a baseline worth beating.
    """
    tables = torch.randint(0, CODES, (LEVELS, CODES), generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        units_BU = (torch.rand(ROWS, LENGTH, generator=generator) ** 2 * UNITS).long()
        code_BT, levels = units_BU.repeat_interleave(2, dim=1), []
        for table in tables:
            noise_BT = torch.randint(0, CODES, code_BT.shape, generator=generator)
            clean_BT = torch.rand(code_BT.shape, generator=generator) < 0.9
            code_BT = torch.where(clean_BT, table[code_BT], noise_BT)
            levels.append(code_BT)
        length_B = torch.full((ROWS,), 2 * LENGTH)
        length_B[0] = 2 * LENGTH - 8
        made.append({"codes": torch.stack(levels, 1), "units": units_BU, "length": length_B})
    return DataLoader(made, batch_size=None)


def trainer(steps, folder, **options):
    return lightning.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, logger=False, default_root_dir=folder,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, **options,
    )  # fmt: skip


def unigram_nats(train, held_out, level):
    codes = torch.cat([batch["codes"][:, level].flatten() for batch in train])
    probability = (torch.bincount(codes, minlength=CODES) + 1.0) / (len(codes) + CODES)
    truth = torch.cat([batch["codes"][:, level].flatten() for batch in held_out])
    return -probability.log()[truth].mean().item()


def test_every_level_beats_its_unigram_on_held_out_codes(tmp_path):
    lightning.seed_everything(1)
    train, held_out = batches(150, 0), batches(2, 1)
    module = SoundStormModule(MODEL, OPTIMIZER)
    run = trainer(150, tmp_path, check_val_every_n_epoch=1)
    run.fit(module, train, held_out)
    metrics = {name: value.item() for name, value in run.callback_metrics.items()}
    for level in range(LEVELS):
        baseline = unigram_nats(train, held_out, level)
        assert metrics[f"val/loss_level_{level + 1}"] < baseline - 0.5
        assert 0.4 < metrics[f"val/accuracy_level_{level + 1}"] <= 0.97
    levels = [metrics[f"val/loss_level_{level + 1}"] for level in range(LEVELS)]
    assert metrics["val/loss"] == pytest.approx(sum(levels) / LEVELS, abs=1e-5)


def test_finer_levels_learn_from_the_passes_of_coarser_ones(tmp_path):
    """With all rows at level 1 the other heads have no other teacher."""
    lightning.seed_everything(1)
    options = dict(first_level_share=1.0, finer_levels=2, finer_weight=1.0)
    run = trainer(60, tmp_path)
    module = SoundStormModule(MODEL, OPTIMIZER, **options)
    run.fit(module, batches(60, 0))
    assert "train/finer_loss" in run.logged_metrics
    assert all(head_CD.abs().max() > 0 for head_CD in module.model.head_weight_QCD)
    without = SoundStormModule(MODEL, OPTIMIZER, first_level_share=1.0)
    trainer(2, tmp_path).fit(without, batches(2, 0))
    assert [bool(head_CD.any()) for head_CD in without.model.head_weight_QCD] == [
        True,
        False,
        False,
    ]


def test_a_run_can_begin_with_the_weights_of_another(tmp_path, monkeypatch):
    first = SoundStormModule(MODEL, OPTIMIZER)
    monkeypatch.setattr(initial_weights, "other_network", lambda stage, name: first.model)
    second = SoundStormModule(
        MODEL, OPTIMIZER | {"learning_rate": 0.0, "weight_decay": 0.0}, initial_weights="first"
    )
    trainer(1, tmp_path).fit(second, batches(1, 0))
    for name, parameter in first.model.named_parameters():
        assert torch.equal(dict(second.model.named_parameters())[name], parameter), name


class FakeCodec:
    fingerprint = "b" * 64
    codebooks_QKD = torch.randn(LEVELS, CODES, 8, generator=torch.Generator().manual_seed(0))


def begin_with_codec(tmp_path, monkeypatch, made_by):
    found = {("soundstream", "small"): FakeCodec()}
    monkeypatch.setattr("speechssm.soundstorm.module.other_network", lambda *key: found[key])
    module = SoundStormModule(MODEL, OPTIMIZER | {"learning_rate": 0.0}, codec="small")
    trainer(1, tmp_path).fit(module, datamodule=CodesOf(made_by))
    return module


def test_a_run_can_begin_with_the_codebooks_of_the_codec(tmp_path, monkeypatch):
    module = begin_with_codec(tmp_path, monkeypatch, FakeCodec.fingerprint)
    ours = torch.pdist(module.model.level_embedding_QCD[0, :CODES].detach())
    theirs = torch.pdist(FakeCodec.codebooks_QKD[0])
    assert torch.corrcoef(torch.stack([ours, theirs]))[0, 1] > 0.98


def test_the_codebooks_of_another_codec_are_refused(tmp_path, monkeypatch):
    with pytest.raises(FingerprintError, match=r"stage.codec=small is b+\.\.\., but the codes of"):
        begin_with_codec(tmp_path, monkeypatch, "c" * 64)


def test_two_beginnings_are_one_too_many():
    with pytest.raises(ConfigError, match="give one"):
        SoundStormModule(MODEL, OPTIMIZER, codec="small", initial_weights="first")


def test_a_share_that_is_none_is_refused():
    with pytest.raises(ConfigError, match=r"first_level_share=2: from 0 to 1"):
        SoundStormModule(MODEL, OPTIMIZER, first_level_share=2)


def test_validation_repeats_whatever_happened_before(tmp_path):
    torch.manual_seed(0)
    module = SoundStormModule(MODEL, OPTIMIZER)
    held_out = batches(2, 1)
    first = trainer(1, tmp_path).validate(module, held_out, verbose=False)
    torch.rand(17)
    assert trainer(1, tmp_path).validate(module, held_out, verbose=False) == first


def test_golden_losses(tmp_path):
    """A fixed seed gives the recorded losses: whoever changes them should know why."""
    lightning.seed_everything(7)
    module = SoundStormModule(MODEL, OPTIMIZER)
    losses = []
    step = module.training_step
    module.training_step = lambda *a: losses.append(step(*a)) or losses[-1]
    trainer(4, tmp_path).fit(module, batches(4, 3))
    golden = [1.9632, 1.9211, 1.8128, 1.8813]
    assert [loss.item() for loss in losses] == pytest.approx(golden, abs=2e-3)


def test_a_batch_that_masks_nothing_gives_no_loss_and_finite_gradients(monkeypatch):
    from speechssm.soundstorm import module as module_file

    module = SoundStormModule(MODEL, OPTIMIZER)
    monkeypatch.setattr(module, "log", lambda *a, **k: None)
    draw = module_file.draw
    # An angle of pi/2 masks no frame at all.
    monkeypatch.setattr(
        module_file,
        "draw",
        lambda *a, **k: draw(*a, **k)._replace(ratio_B=torch.full((ROWS,), 1.0)),
    )
    loss = module.training_step(next(iter(batches(1, 0))), 0)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_hyper_parameters_rebuild_the_module_from_a_checkpoint(tmp_path):
    module = SoundStormModule(MODEL, OPTIMIZER)
    run = trainer(1, tmp_path)
    run.fit(module, batches(1, 0))
    run.save_checkpoint(tmp_path / "last.ckpt")
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    again = SoundStormModule(**stored["hyper_parameters"])
    again.load_state_dict(stored["state_dict"])
    for name, tensor in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


class CodesOf(lightning.LightningDataModule):
    """Batches of code shards that a certain codec made."""

    folder = "codes"

    def __init__(self, codec_fingerprint):
        super().__init__()
        self.codec_fingerprint = codec_fingerprint

    def train_dataloader(self):
        return batches(1, 0)

    def index(self, split):
        return SimpleNamespace(metadata={"codec_fingerprint": self.codec_fingerprint})


class MarkedBatches(lightning.LightningDataModule):
    def train_dataloader(self):
        return batches(1, 0)

    def state_dict(self):
        return {"fingerprints": {"tokenizer_fingerprint": "a" * 64, "codec_fingerprint": "b" * 64}}


def test_a_loaded_checkpoint_says_whose_tokens_it_was_trained_on(tmp_path):
    run = trainer(1, tmp_path)
    run.fit(SoundStormModule(MODEL, OPTIMIZER), datamodule=MarkedBatches())
    run.save_checkpoint(tmp_path / "last.ckpt")
    loaded = load("soundstorm", tmp_path / "last.ckpt")
    assert loaded.trained_on == MarkedBatches().state_dict()["fingerprints"]
