"""The loss and the training module."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch

from speechssm.errors import ConfigError
from speechssm.lm.griffin import Griffin
from speechssm.lm.loss import cross_entropy, loss_and_gradient
from speechssm.lm.module import LanguageModelModule

VOCABULARY = 16
# Loss after so many optimiser steps; equal to 1e-6 with AVX-512, AVX2 and neither.
GOLDEN = {0: 4.03299, 9: 1.26931, 29: 1.12787}
MODEL = {
    "_target_": "speechssm.lm.griffin.Griffin",
    "vocab_size": VOCABULARY,
    "width": 32,
    "num_layers": 3,
    "num_heads": 4,
    "window": 8,
}
OPTIMIZER = {"learning_rate": 1e-2, "warmup_steps": 2, "weight_decay": 0.1}


def chain(rows, length, seed):
    """Rows of a Markov chain of order one in which a unit mostly decides the next."""
    generator = torch.Generator().manual_seed(seed)
    jump = torch.randint(0, VOCABULARY, (rows, length + 1), generator=generator)
    stay = torch.rand(rows, length + 1, generator=generator) < 0.8
    units = [jump[:, 0]]
    for t in range(1, length + 1):
        units.append(torch.where(stay[:, t], (units[-1] + 3) % VOCABULARY, jump[:, t]))
    units = torch.stack(units, 1)
    inputs, targets = units[:, :-1].clone(), units[:, 1:].clone()
    document_start = torch.zeros(rows, length, dtype=torch.bool)
    document_start[:, [0, length // 2]] = True
    inputs[document_start] = VOCABULARY
    targets[:, length // 2 - 1] = -100
    return {"inputs": inputs, "targets": targets, "document_start": document_start}


class Chain(torch.utils.data.Dataset):
    def __init__(self, count, first_seed):
        self.count, self.first_seed = count, first_seed

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return chain(4, 40, self.first_seed + index)


def train(steps, model=None, **options):
    lightning.seed_everything(0, verbose=False)
    module = LanguageModelModule(model or MODEL, OPTIMIZER, **options)
    losses = []

    class Record(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(outputs["loss"].item())

    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Record()],
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
    )
    trainer.fit(
        module,
        torch.utils.data.DataLoader(Chain(steps, 0), batch_size=None),
        torch.utils.data.DataLoader(Chain(4, 10_000), batch_size=None),
    )
    return module, losses, trainer.callback_metrics


def loss_case(**options):
    """A model, hidden vectors and targets of which four of 30 do not count."""
    torch.manual_seed(0)
    model = Griffin(VOCABULARY, 24, 1, 3, window=4, **options)
    hidden = (5 * torch.randn(2, 15, 24)).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (2, 15))
    targets[0, :4] = -100
    return model, hidden, targets


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("soft_cap", [None, 2.0, 30.0])
@pytest.mark.parametrize("chunk_logits", [1, 7 * VOCABULARY, 10**9])
def test_chunked_cross_entropy_equals_the_plain_one_with_gradients(chunk_logits, soft_cap, tied):
    model, hidden, targets = loss_case(logits_soft_cap=soft_cap, tied_embeddings=tied)
    total, count = cross_entropy(hidden, targets, model.output_weight, soft_cap, chunk_logits)
    expected = torch.nn.functional.cross_entropy(
        model.logits(hidden).flatten(0, 1), targets.flatten(), reduction="sum"
    )
    torch.testing.assert_close(total, expected)
    assert count == 26
    arguments = (hidden, model.embedding if tied else model.output_embedding)
    # A gradient that does not begin at one, as of a mean or a scaled loss.
    ours = torch.autograd.grad(total * 0.3, arguments)
    theirs = torch.autograd.grad(expected * 0.3, arguments)
    torch.testing.assert_close(ours, theirs)


def test_cross_entropy_computes_no_gradient_that_nobody_wants(monkeypatch):
    model, hidden, targets = loss_case()
    wanted = []

    def spy(*arguments):
        wanted.append(arguments[-1])
        return loss_and_gradient(*arguments)

    monkeypatch.setattr("speechssm.lm.loss.loss_and_gradient", spy)
    cross_entropy(hidden, targets, model.output_weight)
    with torch.no_grad():
        cross_entropy(hidden, targets, model.output_weight)
    assert wanted == [True, False]


def test_cross_entropy_without_gradients_and_with_one_alone():
    model, hidden, targets = loss_case()
    expected, _ = cross_entropy(hidden, targets, model.output_weight, 30.0)
    with torch.no_grad():
        total, _ = cross_entropy(hidden, targets, model.output_weight, 30.0)
    assert torch.equal(total, expected) and not total.requires_grad
    frozen = model.output_weight.detach()
    total, _ = cross_entropy(hidden, targets, frozen, 30.0)
    both, alone = (torch.autograd.grad(value, hidden)[0] for value in (expected, total))
    assert torch.equal(both, alone)


@pytest.mark.parametrize("target", [-1, VOCABULARY])
def test_cross_entropy_takes_no_other_number_for_a_unit(target):
    model, hidden, targets = loss_case()
    targets[0, 0] = target
    with pytest.raises(RuntimeError, match=f"index {target} is out of bounds"):
        cross_entropy(hidden, targets, model.output_weight)


def test_cross_entropy_has_no_second_derivative_rather_than_a_wrong_one():
    model, hidden, targets = loss_case()
    total, _ = cross_entropy(hidden, targets, model.output_weight)
    (grad,) = torch.autograd.grad(total.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_cross_entropy_under_autocast_multiplies_in_bfloat16_and_sums_in_float32():
    model, hidden, targets = loss_case()
    expected, _ = cross_entropy(hidden, targets, model.output_weight, 30.0)
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = cross_entropy(hidden, targets, model.output_weight, 30.0)
    assert total.dtype == torch.float32 and total != expected
    torch.testing.assert_close(total, expected, rtol=1e-2, atol=0)
    total.backward()
    assert hidden.grad.dtype == model.embedding.grad.dtype == torch.float32
    ours, (theirs,) = hidden.grad, torch.autograd.grad(expected, hidden)
    assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_cross_entropy_never_holds_the_logits_of_a_batch(peak_bytes):
    """Peak memory of loss and gradient is some chunks, whatever the number of positions."""
    vocabulary, width, chunk_logits = 4096, 8, 2**16
    weight = torch.nn.Parameter(torch.randn(vocabulary, width))
    peaks = []
    for length in (64, 1024):
        hidden = torch.randn(1, length, width, requires_grad=True)
        targets = torch.randint(0, vocabulary, (1, length))

        def loss_and_gradients(hidden=hidden, targets=targets):
            cross_entropy(hidden, targets, weight, 30.0, chunk_logits)[0].backward()
            hidden.grad = weight.grad = None

        peaks.append(peak_bytes(loss_and_gradients))
    one_chunk = 4 * chunk_logits
    gradients = 4 * vocabulary * width * 4  # the weight's, in the making and scaled
    assert max(peaks) < 4.5 * one_chunk + gradients
    assert peaks[1] - peaks[0] < 0.1 * (1024 - 64) * vocabulary * 4


@pytest.fixture(scope="module")
def trained():
    return train(30)


def test_golden_loss(trained):
    """The losses of this seed, recorded: they move only when the numerics do."""
    _, losses, _ = trained
    for step, loss in GOLDEN.items():
        assert losses[step] == pytest.approx(loss, abs=2e-4), f"step {step}"


def test_training_beats_the_unigram(trained):
    _, _, metrics = trained
    unigram = torch.tensor(VOCABULARY).log().item()
    assert metrics["val/loss"] < unigram - 0.5


def test_logged_metrics(trained):
    module, _, metrics = trained
    assert metrics["train/tokens"] == 30 * 4 * 40
    assert metrics["train/gradient_norm"] > 0
    assert metrics["train/context_30s"] == 0
    assert {"train/context_4min", "train/context_16min"} <= set(metrics)
    targets = [module.summed_loss(chain(4, 40, 10_000 + i)) for i in range(4)]
    expected = sum(t for t, _ in targets) / sum(n for _, n in targets)
    torch.testing.assert_close(metrics["val/loss"], expected.detach(), atol=1e-5, rtol=1e-5)


def test_context_shares_count_positions_within_documents(monkeypatch):
    monkeypatch.setattr("speechssm.lm.module.CONTEXTS", {"short": 5, "long": 20, "longer": 21})
    _, _, metrics = train(1)
    # Rows of 40 are two documents of 20.
    assert metrics["train/context_short"] == pytest.approx(16 / 20)
    assert metrics["train/context_long"] == pytest.approx(1 / 20)
    assert metrics["train/context_longer"] == 0


def test_a_compiled_model_has_the_losses_and_the_names_of_a_plain_one(trained):
    plain, losses, _ = trained
    torch._dynamo.reset()
    compiled, compiled_losses, _ = train(4, compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert compiled_losses[:4] == pytest.approx(losses[:4], abs=1e-4)
    assert list(compiled.state_dict()) == list(plain.state_dict())


def test_xla_which_compiles_by_itself_refuses_compile():
    module = LanguageModelModule(MODEL, OPTIMIZER, compile=True)
    strategy = SimpleNamespace(root_device=SimpleNamespace(type="xla"))
    module._trainer = SimpleNamespace(strategy=strategy, ckpt_path=None)
    with pytest.raises(ConfigError, match=r"stage\.compile=true is not for XLA"):
        module.setup("fit")


def test_a_saved_module_loads_with_weights_only(trained, tmp_path):
    module, _, _ = trained
    path = tmp_path / "module.ckpt"
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}, path)
    content = torch.load(path, weights_only=True)
    again = LanguageModelModule(**content["hyper_parameters"])
    again.load_state_dict(content["state_dict"])
    batch = chain(2, 20, 1)
    assert torch.equal(again.summed_loss(batch)[0], module.summed_loss(batch)[0])


def test_a_row_without_targets_has_zero_loss():
    module = LanguageModelModule(MODEL, OPTIMIZER)
    batch = chain(1, 10, 0)
    batch["targets"][:] = -100
    total, count = module.summed_loss(batch)
    assert total == 0 and count == 0


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_memory_for_a_token_of_a_training_step_does_not_depend_on_the_length(
    peak_bytes, activation_checkpointing
):
    options = {"window": 64, "activation_checkpointing": activation_checkpointing}
    module = LanguageModelModule({**MODEL, **options}, OPTIMIZER)
    tokens, peaks = 8192, {}
    for length in (512, 4096):
        batch = chain(tokens // length, length, 0)

        def step(batch=batch):
            total, count = module.summed_loss(batch)
            (total / count).backward()

        step()  # the gradients, which later steps add to
        peaks[length] = peak_bytes(step) / tokens
    assert peaks[4096] == pytest.approx(peaks[512], rel=0.02)
    # Some tensors of the width for each layer, not a mask or a product over pairs of positions.
    assert peaks[4096] < 1000 * MODEL["width"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("inputs", VOCABULARY + 1, "inputs are ids from 0 to 17, but the model knows 0 to 16"),
        ("inputs", -1, "inputs are ids from -1"),
        ("targets", VOCABULARY, "targets are ids from 0 to 16, but the model knows 0 to 15"),
        ("targets", -2, "targets are ids from -2"),
    ],
)
def test_ids_of_a_batch_are_looked_at_before_they_reach_a_device(name, value, message):
    module = LanguageModelModule(MODEL, OPTIMIZER)
    batch = chain(4, 40, 0)
    assert module.on_before_batch_transfer(batch, 0) is batch
    batch[name][1, 7] = value
    with pytest.raises(ConfigError, match=message):
        module.on_before_batch_transfer(batch, 0)


def test_two_processes_have_the_gradients_of_one_under_ddp_and_fsdp(tmp_path):
    worker = Path(__file__).with_name("sharded_worker.py")
    processes = [
        subprocess.Popen([sys.executable, worker, str(rank), tmp_path], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1].decode() for process in processes]
    for rank, process in enumerate(processes):
        assert process.returncode == 0, errors[rank][-2000:]
        worst = json.loads((tmp_path / f"{rank}.json").read_text())
        assert worst.keys() == {"ddp", "fsdp"} and max(worst.values()) < 1e-5


@pytest.mark.parametrize("length", [1, 2])
def test_the_shortest_rows_train(length):
    module = LanguageModelModule(MODEL, OPTIMIZER)
    batch = {name: value[:, :length] for name, value in chain(2, 10, 0).items()}
    total, count = module.summed_loss(batch)
    (total / count).backward()
    assert count == 2 * length
    assert all(bool(torch.isfinite(p.grad).all()) for p in module.parameters())
    assert module.model.embedding.grad.any()


def test_an_unknown_optimizer_key_is_named():
    module = LanguageModelModule(MODEL, {**OPTIMIZER, "momentum": 0.9})
    module.trainer = lightning.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False
    )
    with pytest.raises(ConfigError, match="momentum"):
        module.configure_optimizers()
