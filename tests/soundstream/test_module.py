"""Training of the codec: what is optimised, what is counted, and that a killed run goes on."""

import pickle

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from speechssm.errors import ConfigError
from speechssm.nn import initial_weights
from speechssm.runtime.averaging import AveragedWeights
from speechssm.soundstream import module as soundstream_module
from speechssm.soundstream.module import SoundStreamModule

HOP = 12
MODEL = {
    "_target_": "speechssm.soundstream.SoundStream",
    "channels": [4, 8, 8],
    "strides": [3, 4],
    "code_width": 6,
    "num_quantizers": 4,
    "codebook_size": 8,
    "dilations": [1, 3],
}
DISCRIMINATORS = {
    "num_scales": 2,
    "waveform": {"width": 4, "widths": [8]},
    "stft": [{"window": 64, "hop": 16, "width": 4, "multipliers": [1, 2]}],
}
GOLDEN_LOSSES = [303.8204, 293.1705, 274.4755]
OPTIMIZER = {"learning_rate": 1e-3, "warmup_steps": 1, "weight_decay": 0.01}


def module(**options) -> SoundStreamModule:
    torch.manual_seed(0)
    arguments = {
        "model": MODEL,
        "optimizer": OPTIMIZER,
        "discriminators": DISCRIMINATORS,
        "mel": {"windows": [64, 256], "num_mels": 16},
    }
    return SoundStreamModule(**arguments | options)


def batches(count: int, first: int = 0) -> DataLoader:
    """Crops that depend on their number alone, so that a second run may begin in the middle."""
    crops = [
        {"audio": 0.1 * torch.randn(3, 520, generator=torch.Generator().manual_seed(first + i))}
        for i in range(count)
    ]
    return DataLoader(crops, batch_size=None)


def trainer(folder, max_steps: int, callbacks=(), **options) -> lightning.Trainer:
    return lightning.Trainer(
        default_root_dir=folder,
        max_steps=max_steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def test_every_parameter_is_in_exactly_one_optimiser(tmp_path):
    subject = module()
    subject.trainer = trainer(tmp_path, 5)
    optimizers, _ = subject.configure_optimizers()
    groups = [[id(p) for g in o.param_groups for p in g["params"]] for o in optimizers]
    held = groups[0] + groups[1]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in subject.parameters()}
    assert set(groups[0]) == {id(p) for p in subject.model.parameters()}


def trained(tmp_path, name: str, steps: int = 2, **options):
    """A run of `steps` and the path of its checkpoint."""
    subject = module(**options)
    saved = ModelCheckpoint(tmp_path, filename=name, every_n_train_steps=steps)
    trainer(tmp_path, steps, [saved]).fit(subject, batches(steps))
    return subject, tmp_path / f"{name}.ckpt"


def test_a_decoder_alone_learns_and_the_codes_stay(tmp_path, monkeypatch):
    first, _ = trained(tmp_path, "first")
    monkeypatch.setattr(soundstream_module, "other_network", lambda stage, name: first.model)
    second, _ = trained(tmp_path, "second", initial_weights="first", decoder_only=True)
    assert second.model.fingerprint == first.model.fingerprint
    before = first.model.state_dict()
    changed = {n for n, v in second.model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {f"decoder.{name}" for name in second.model.decoder.state_dict()}
    groups = second.trainer.optimizers[0].param_groups
    held = {id(parameter) for group in groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in second.model.decoder.parameters()}


def test_a_wider_decoder_learns_for_the_codes_of_a_narrower_one(tmp_path, monkeypatch):
    first, _ = trained(tmp_path, "first")
    monkeypatch.setattr(soundstream_module, "other_network", lambda stage, name: first.model)
    wide = MODEL | {"decoder_channels": [6, 10, 12], "decoder_units": [2, 2]}
    begun = module(model=wide, initial_weights="first", decoder_only=True)
    saved = ModelCheckpoint(tmp_path, filename="wide", every_n_train_steps=2)
    runner = trainer(tmp_path, 2, [saved])
    begun.trainer = runner
    begun.setup("fit")
    codes_BQT = torch.randint(0, 8, (2, 4, 9))
    torch.testing.assert_close(begun.model.decode(codes_BQT), first.model.eval().decode(codes_BQT))
    runner.fit(begun, batches(2))
    assert begun.model.fingerprint == first.model.fingerprint
    assert not torch.equal(begun.model.decoder[-1].weight[0, 4:], torch.zeros(2, 7))


def test_a_decoder_for_another_encoder_is_refused(tmp_path, monkeypatch):
    other = module(model=MODEL | {"codebook_size": 4}).model
    monkeypatch.setattr(soundstream_module, "other_network", lambda stage, name: other)
    with pytest.raises(ConfigError, match=r"initial_weights=other was trained as .*decoder_units"):
        trained(tmp_path, "second", initial_weights="other", decoder_only=True)


def test_a_decoder_alone_needs_the_codec_that_it_is_for(tmp_path):
    with pytest.raises(ConfigError, match=r"decoder_only.*stage\.initial_weights"):
        trained(tmp_path, "none", decoder_only=True)


def test_averaged_weights_of_a_decoder_alone_leave_the_codes_as_they_are(tmp_path, monkeypatch):
    first, _ = trained(tmp_path, "first")
    monkeypatch.setattr(soundstream_module, "other_network", lambda stage, name: first.model)
    subject = module(initial_weights="first", decoder_only=True)
    saved = ModelCheckpoint(tmp_path, filename="averaged", every_n_train_steps=3)
    trainer(tmp_path, 3, [AveragedWeights(decay=0.9), saved]).fit(subject, batches(3))
    stored = torch.load(tmp_path / "averaged.ckpt", weights_only=True)["state_dict"]
    averaged = module().model
    prefix = "model."
    averaged.load_state_dict(
        {n.removeprefix(prefix): v for n, v in stored.items() if n.startswith(prefix)}
    )
    assert averaged.fingerprint == first.model.fingerprint
    decoders = [network.decoder[0].weight for network in (averaged, first.model)]
    assert not torch.equal(*decoders)


def test_initial_weights_of_another_shape_are_refused(tmp_path, monkeypatch):
    other = module(model=MODEL | {"codebook_size": 4}).model
    monkeypatch.setattr(initial_weights, "other_network", lambda stage, name: other)
    with pytest.raises(ConfigError, match=r"initial_weights=other: .*codebook_QKD has shape"):
        trained(tmp_path, "second", initial_weights="other")


def test_balanced_losses_train_and_a_killed_run_goes_on(tmp_path):
    options = {"balance": 0.9, "discriminator_start": 1}
    whole, _ = trained(tmp_path, "whole", 4, **options)
    saved = ModelCheckpoint(tmp_path, filename="killed", every_n_train_steps=2)
    killed = trainer(tmp_path, 4, [saved], limit_train_batches=2)
    killed.fit_loop.max_epochs = 1
    killed.fit(module(**options), batches(2))
    resumed = module(**options)
    again = {"ckpt_path": tmp_path / "killed.ckpt", "weights_only": True}
    trainer(tmp_path, 4).fit(resumed, batches(10, first=2), **again)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0, msg=name)
    assert whole.balancer.steps_N.tolist() == [4, 3, 3, 0]  # the waveform weighs nothing


def test_the_generator_alone_counts_steps(tmp_path):
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    subject = module()
    running = trainer(tmp_path, 5, [saved])
    running.fit(subject, batches(20))
    assert running.global_step == 5
    assert running.fit_loop.total_batch_idx + 1 == 5
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=2.ckpt", "step=4.ckpt"]


def test_both_networks_learn_in_every_step(tmp_path):
    subject = module()
    before = {name: p.detach().clone() for name, p in subject.named_parameters()}
    trainer(tmp_path, 2).fit(subject, batches(2))
    still = [n for n, p in subject.named_parameters() if torch.equal(p.detach(), before[n])]
    # As long as all logits lie within the hinge, real and fake pull a logit's bias equally.
    assert [n for n in still if not (n.startswith("discriminators") and n.endswith("bias"))] == []


def test_codebooks_start_on_the_first_batches_and_only_once(tmp_path):
    seen = []
    subject = module(codebook_batches=3)
    subject.model.quantizer.fit = lambda x_BTD: seen.append(tuple(x_BTD.shape))
    saved = ModelCheckpoint(tmp_path, filename="one", every_n_train_steps=1)
    trainer(tmp_path, 1, [saved]).fit(subject, batches(5))
    assert seen == [(9, 520 // HOP, 6)]
    trainer(tmp_path, 2).fit(subject, batches(5), ckpt_path=tmp_path / "one.ckpt")
    assert len(seen) == 1


def test_discriminators_rest_before_their_warm_up(tmp_path):
    subject = module(discriminator_start=4, discriminator_warmup=2)
    before = {n: p.detach().clone() for n, p in subject.discriminators.named_parameters()}
    running = trainer(tmp_path, 2)
    running.fit(subject, batches(2))
    for name, parameter in subject.discriminators.named_parameters():
        assert torch.equal(parameter.detach(), before[name])
    assert "train/discriminator_loss" not in running.logged_metrics

    subject = module(discriminator_start=4, discriminator_warmup=2)
    running = trainer(tmp_path, 4)
    running.fit(subject, batches(4))
    assert "train/discriminator_gradient_norm" in running.logged_metrics
    assert "train/adversarial" not in running.logged_metrics
    optimizers = running.optimizers
    steps = [int(next(iter(o.state.values()))["step"]) for o in optimizers]
    assert steps == [4, 2]


def test_discriminators_learn_nothing_from_the_codecs_loss(tmp_path):
    subject = module()
    running = trainer(tmp_path, 1)
    running.fit(subject, batches(1))
    # Their gradients are those of their own loss: a second backward pass would have added to them.
    logged = running.logged_metrics["train/discriminator_gradient_norm"]
    norm = torch.stack([p.grad.norm() for p in subject.discriminators.parameters()]).norm()
    torch.testing.assert_close(norm, logged.clamp(max=10.0), rtol=1e-4, atol=1e-6)
    assert "train/gradient_norm" in running.logged_metrics


@pytest.mark.parametrize("split", [1, 2, 3])
def test_a_killed_run_goes_on_exactly(tmp_path, split):
    """`split` before, at and after the step in which the discriminators start."""
    options = {"discriminator_start": 3, "discriminator_warmup": 1}
    whole = module(**options)
    trainer(tmp_path, 4).fit(whole, batches(4))

    saved = ModelCheckpoint(tmp_path, filename="killed", every_n_train_steps=split)
    # The schedule runs to 4 steps; the run is stopped before.
    killed = trainer(tmp_path, 4, [saved], limit_train_batches=split)
    killed.fit_loop.max_epochs = 1
    killed.fit(module(**options), batches(split))
    assert killed.global_step == split

    torch.manual_seed(1234)
    resumed = module(**options)
    torch.manual_seed(5678)
    trainer(tmp_path, 4).fit(
        resumed,
        batches(10, first=split),
        ckpt_path=tmp_path / "killed.ckpt",
        weights_only=True,
    )
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0, msg=name)


def test_training_has_the_recorded_losses(tmp_path):
    class Losses(lightning.Callback):
        def __init__(self):
            self.values = []

        def on_train_batch_end(self, trainer, *_):
            self.values.append(float(trainer.logged_metrics["train/loss"]))

    losses = Losses()
    running = trainer(tmp_path, 3)
    running.callbacks.append(losses)
    running.fit(module(), batches(3))
    assert losses.values == pytest.approx(GOLDEN_LOSSES, rel=1e-3)


def test_training_lowers_the_reconstruction_loss_of_held_out_audio(tmp_path):
    subject = module(
        optimizer={"learning_rate": 5e-3, "warmup_steps": 1},
        discriminator_start=1000,
        quantizer_dropout=0.5,
    )
    held_out = batches(1, first=100)
    running = trainer(tmp_path, 25)
    (before,) = running.validate(subject, held_out, verbose=False)
    running.fit(subject, batches(25))
    (after,) = running.validate(subject, held_out, verbose=False)
    assert set(after) == {"val/loss", "val/reconstruction", "val/waveform", "val/commitment"}
    assert after["val/loss"] == pytest.approx(after["val/reconstruction"])  # waveform weighs 0
    assert after["val/reconstruction"] < 0.8 * before["val/reconstruction"]


def test_weights_can_be_averaged(tmp_path):
    average = AveragedWeights(decay=0.5)
    saved = ModelCheckpoint(tmp_path, filename="averaged", every_n_train_steps=3)
    subject = module()
    running = trainer(tmp_path, 3, [average, saved])
    running.fit(subject, batches(3))
    assert running.global_step == 3
    stored = torch.load(tmp_path / "averaged.ckpt", weights_only=True)
    assert "model.encoder.0.weight" in stored["state_dict"]
    assert "current_model_state" in stored


def test_audio_samples_are_the_first_recording_and_its_reconstruction():
    samples = module().eval().audio_samples({"audio": torch.randn(2, 520)})
    assert set(samples) == {"original", "reconstruction"}
    assert all(s.shape == (520 // HOP * HOP,) and s.dtype == "float32" for s in samples.values())


def test_each_rank_and_step_draws_its_own_levels_again():
    subject = module()
    assert torch.equal(subject._levels(64, 3), subject._levels(64, 3))
    assert not torch.equal(subject._levels(64, 3), subject._levels(64, 4))
    assert set(subject._levels(256, 0).tolist()) == {1, 2, 3, 4}
    assert set(module(quantizer_dropout=0.0)._levels(64, 0).tolist()) == {4}


def test_the_module_can_be_pickled():
    copy = pickle.loads(pickle.dumps(module()))
    assert set(copy.state_dict()) == set(module().state_dict())


def test_an_unknown_loss_is_refused():
    with pytest.raises(ConfigError, match="unknown loss 'mel'"):
        module(weights={"mel": 1.0})
