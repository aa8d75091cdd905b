"""Training of the tokenizer: golden losses, repeatable validation, text, no collapse."""

import lightning
import pytest
import torch

from speechssm.errors import ConfigError
from speechssm.tokenizer.model import SemanticTokenizer
from speechssm.tokenizer.module import TokenizerModule, begin_with

MODEL = {
    "_target_": "speechssm.tokenizer.model.SemanticTokenizer",
    "vocab_size": 32,
    "width": 48,
    "num_heads": 2,
    "ffn_width": 64,
    "lower_layers": 1,
    "upper_layers": 1,
    "num_mels": 20,
    "codebook_width": 8,
    "ema_decay": 0.9,
    "num_target_codebooks": 2,
    "target_codebook_size": 16,
    "mask_probability": 0.1,
    "mask_span": 4,
    "text_vocab_size": 10,
}
OPTIMIZER = {"learning_rate": 5e-3, "warmup_steps": 5, "schedule": "cosine"}
GOLDEN = [7.06991, 6.66034, 6.36408, 5.27293]


def tones(seed: int, batch: int = 4, samples: int = 16_000) -> dict[str, torch.Tensor]:
    """Sequences of notes: each lasts 0.2 s, and a scale is played in order."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(8, (batch, 1), generator=generator)
    time = torch.arange(samples)
    note = (start + time // 3200) % 8
    audio = 0.3 * torch.sin(2 * torch.pi * 200 * 1.3**note * time / 16_000)
    audio = audio + 0.001 * torch.randn(audio.shape, generator=generator)
    return {
        "audio": audio,
        "audio_length": torch.tensor([samples] * (batch - 1) + [samples - 5_000]),
        "text": torch.randint(10, (batch, 6), generator=generator),
        "text_length": torch.tensor([6, 3] + [0] * (batch - 2)),
    }


class Batches(torch.utils.data.IterableDataset):
    def __init__(self, first: int, count: int):
        self.seeds = range(first, first + count)

    def __iter__(self):
        return (tones(seed) for seed in self.seeds)


def fit(steps: int, folder, **options):
    lightning.seed_everything(3, verbose=False)
    module = TokenizerModule(MODEL, OPTIMIZER, **options)
    seen: list[dict[str, float]] = []

    class Record(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        default_root_dir=folder,
        callbacks=[Record()],
    )
    loaders = [
        torch.utils.data.DataLoader(Batches(*span), batch_size=None)
        for span in ((0, steps), (1000, 3))
    ]
    trainer.fit(module, *loaders)
    return module, seen, {k: float(v) for k, v in trainer.callback_metrics.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return fit(100, tmp_path_factory.mktemp("run"), unmasked_weight=0.5)


def test_losses_are_the_recorded_ones(trained):
    losses = [step["train/loss"] for step in trained[1]]
    assert losses[:4] == pytest.approx(GOLDEN, rel=2e-3)


def test_every_figure_is_logged(trained):
    parts = {"loss", "mlm_loss", "mlm_accuracy", "unmasked_loss", "ctc_loss", "commitment"}
    names = {f"{split}/{part}" for split in ("train", "val") for part in parts}
    assert names | {"train/unit_perplexity", "val/unit_perplexity", "val/mlm_unigram_loss"} <= set(
        trained[2]
    )


def test_training_predicts_masked_notes_and_keeps_the_codebook_in_use(trained):
    figures = trained[2]
    uniform = torch.log(torch.tensor(16.0)).item()
    assert figures["val/mlm_loss"] < figures["val/mlm_unigram_loss"] - 0.3 < uniform - 0.3
    assert figures["val/mlm_loss"] < uniform - 0.8
    assert figures["val/unit_perplexity"] > 8


def test_the_loss_is_the_weighted_sum_of_its_parts(trained):
    module = TokenizerModule(
        MODEL, OPTIMIZER, ctc_weight=0.7, commitment_weight=0.2, unmasked_weight=0.4
    ).eval()
    figures = module.losses(tones(0), torch.rand(4, 25))
    expected = figures["mlm_loss"] + 0.7 * figures["ctc_loss"] + 0.2 * figures["commitment"]
    torch.testing.assert_close(figures["loss"], expected + 0.4 * figures["unmasked_loss"])


def test_validation_draws_the_same_masks_every_time(trained):
    module = trained[0].eval()
    numbers = [
        module.mask_numbers(torch.zeros(2, 6_400), torch.Generator().manual_seed(1))
        for _ in range(2)
    ]
    assert torch.equal(*numbers) and numbers[0].shape == (2, 10)


def test_perplexity_is_that_of_the_whole_validation_set(trained):
    module = trained[0].eval()
    module.on_validation_epoch_start()
    expected = torch.zeros(32)
    with torch.no_grad():
        for index in range(3):
            batch = tones(1000 + index)
            numbers = module.mask_numbers(
                batch["audio"], torch.Generator().manual_seed(module.seed + index)
            )
            output = module.model(batch["audio"], batch["audio_length"], numbers)
            seen = output.valid_BT & ~output.mask_BT
            expected += torch.bincount(output.units_BT[seen], minlength=32)
    share = expected / expected.sum()
    entropy = -torch.xlogy(share, share).sum()
    assert trained[2]["val/unit_perplexity"] == pytest.approx(entropy.exp().item(), rel=0.02)


def test_a_model_without_text_head_ignores_transcripts():
    module = TokenizerModule({**MODEL, "text_vocab_size": 0}, OPTIMIZER).eval()
    figures = module.losses(tones(0), torch.rand(4, 25))
    assert "ctc_loss" not in figures and torch.isfinite(figures["loss"])


def test_the_checkpoint_holds_plain_containers_and_the_frozen_targets(trained):
    module = trained[0]
    assert module.hparams["model"] == MODEL
    names = set(module.state_dict())
    assert {"model.targets.projection_QPC", "model.quantizer.codebook_VC"} <= names
    assert "unit_counts_V" not in names


def test_training_steps_run_with_shapes_alone():
    """No value is read back on the way to the loss: the meta device has none to give."""
    with torch.device("meta"):
        module = TokenizerModule(MODEL, OPTIMIZER).train()
    features = torch.empty(4, 100, 20, device="meta")
    module.model.log_mel.forward = lambda _: features
    batch = {name: value.to("meta") for name, value in tones(0).items()}
    del batch["text"]  # torch's own CTC reads its lengths
    module.model.text_head = None
    figures = module.losses(batch, torch.empty(4, 25, device="meta"))
    figures["loss"].backward()
    assert figures["loss"].shape == ()


class Pitch(torch.nn.Module):
    """A teacher that can be learned: which of the notes of `tones` a unit holds."""

    sample_rate, vocab_size = 16_000, 8

    def __init__(self, hop_length: int = 640):
        super().__init__()
        self.hop_length = hop_length
        bins = 200 * 1.3 ** torch.arange(8) / 25
        self.bin_V = torch.nn.Parameter(bins, requires_grad=True)

    def tokenize(self, audio):
        frames = audio[:, : audio.shape[1] // 640 * 640].unflatten(1, (-1, 640))
        energy = torch.fft.rfft(frames).abs()
        return energy[..., self.bin_V.round().long()].argmax(dim=-1)


@pytest.fixture
def teachers(monkeypatch):
    """What "pitch" stands for, whether it is a teacher or not, is put into the returned list."""
    held = []
    monkeypatch.setattr(
        "speechssm.loading.load_network",
        lambda stage, name_or_path: {"pitch": held}[name_or_path][0],
    )
    return held


def test_a_teachers_units_are_learned_and_its_weights_are_not_saved(teachers, tmp_path):
    teachers.append(Pitch())
    module, seen, figures = fit(60, tmp_path, teacher="pitch", teacher_weight=3.0)
    losses = [step["train/teacher_loss"] for step in seen]
    assert losses[0] > 1.5 and sum(losses[-5:]) / 5 < 0.5  # nats; ln 8 is 2.08
    assert figures["val/teacher_accuracy"] > 0.8
    assert module.hparams["model"]["teacher_vocab_size"] == 8
    assert not [name for name in module.state_dict() if "bin_V" in name]
    assert not module.teacher.bin_V.requires_grad


def test_a_teacher_of_another_rate_is_refused(teachers):
    teachers.append(Pitch(320))
    with pytest.raises(ConfigError, match=r"stage\.teacher has a unit for 320 samples"):
        TokenizerModule(MODEL, OPTIMIZER, teacher="pitch")


def tokenizer(seed: int, **options) -> SemanticTokenizer:
    torch.manual_seed(seed)
    arguments = {key: value for key, value in MODEL.items() if key != "_target_"}
    return SemanticTokenizer(**{**arguments, **options})


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], part: str) -> bool:
    names = [name for name in one if name.startswith(part)]
    assert names
    return all(torch.equal(one[name], other[name]) for name in names)


def test_a_run_begins_with_what_another_tokenizer_has_in_common(caplog):
    ours, theirs = tokenizer(1, vocab_size=16), tokenizer(2)
    fresh = {name: value.clone() for name, value in ours.state_dict().items()}
    with caplog.at_level("INFO"):
        begin_with(ours, theirs)
    found = ours.state_dict()
    for part in ("lower.", "upper.", "subsampling.", "text_head."):
        assert equal(found, theirs.state_dict(), part)
    # project_in has the same shape in both, but belongs to a codebook of another size.
    assert equal(found, fresh, "quantizer.")
    assert "begun anew: quantizer" in caplog.text


def test_a_softmax_quantiser_goes_on_from_the_teachers_head():
    theirs = tokenizer(2, teacher_vocab_size=8)
    ours = tokenizer(1, quantization="softmax", vocab_size=8, teacher_vocab_size=8)
    begin_with(ours, theirs)
    assert torch.equal(ours.quantizer.classifier.weight, theirs.teacher_head.weight)
    assert torch.equal(ours.quantizer.classifier.bias, theirs.teacher_head.bias)


def test_a_softmax_quantiser_that_nothing_teaches_is_refused():
    model = {**MODEL, "quantization": "softmax"}
    with pytest.raises(ConfigError, match=r"name a teacher, or set stage\.commitment_weight"):
        TokenizerModule(model, OPTIMIZER, commitment_weight=0.0)
    TokenizerModule(model, OPTIMIZER, commitment_weight=0.1)


@pytest.mark.parametrize("other", [Pitch(), tokenizer(2, width=32)], ids=["kind", "size"])
def test_a_tokenizer_of_another_kind_or_size_is_nothing_to_begin_with(other):
    with pytest.raises(ConfigError, match=r"stage\.initial_weights names a tokenizer of another"):
        begin_with(tokenizer(1), other)


def test_the_targets_stay_those_of_the_models_own_seed():
    ours, theirs = tokenizer(1, target_seed=5), tokenizer(2)
    begin_with(ours, theirs)
    assert equal(ours.state_dict(), tokenizer(3, target_seed=5).state_dict(), "targets.")


def test_a_teacher_takes_no_padding_for_silence(teachers, monkeypatch):
    pitch = Pitch()
    teachers.append(pitch)
    seen = []
    tokenize = pitch.tokenize
    monkeypatch.setattr(pitch, "tokenize", lambda audio: (seen.append(audio), tokenize(audio))[1])
    module = TokenizerModule(MODEL, OPTIMIZER, teacher="pitch").eval()
    batch = tones(5)
    batch["audio"][-1, 11_000:] = 0.0
    module.losses(batch, torch.ones(4, 25))
    (audio,) = seen
    assert torch.equal(audio[:-1], batch["audio"][:-1])
    assert torch.equal(audio[-1, 11_000:], batch["audio"][-1, :5_000])


def test_only_a_new_run_begins_with_the_initial_weights(teachers, tmp_path):
    teachers.append(tokenizer(2))
    module, _, _ = fit(1, tmp_path, initial_weights="pitch")
    weight, start, other = (
        model.lower.layers[0].attention.output.weight
        for model in (module.model, teachers[0], tokenizer(3))
    )
    assert 0 < (weight - start).abs().max() < 0.02  # one step away, and no more
    assert (other - start).abs().max() > 0.1  # which chance is not
    module.trainer.ckpt_path = "checkpoints/last.ckpt"
    trained = {name: value.clone() for name, value in module.model.state_dict().items()}
    module.setup("fit")
    assert equal(module.model.state_dict(), trained, "lower.")


def test_the_masked_prediction_has_a_weight():
    batch, uniform = tones(5), torch.rand(4, 25, generator=torch.Generator().manual_seed(1))
    lightning.seed_everything(3, verbose=False)
    module = TokenizerModule(MODEL, OPTIMIZER, masked_weight=0.25, ctc_weight=0.0).eval()
    figures = module.losses(batch, uniform)
    expected = 0.25 * figures["mlm_loss"] + 0.25 * figures["commitment"]
    assert torch.allclose(figures["loss"], expected)
