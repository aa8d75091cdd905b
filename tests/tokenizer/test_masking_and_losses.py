"""Masks, frozen targets and losses against plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from speechssm.tokenizer.losses import ctc_loss, histogram, mean_where, perplexity, prediction_loss
from speechssm.tokenizer.masking import repeat_frames, span_mask, warp_frequencies
from speechssm.tokenizer.random_projection import RandomProjectionQuantizer, seeded_normal


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_spans_cover_the_frames_after_each_start():
    uniform = torch.ones(2, 12)
    uniform[0, 2] = uniform[0, 4] = uniform[1, 10] = 0.0
    mask = span_mask(uniform, probability=0.5, span=4)
    assert torch.where(mask[0])[0].tolist() == [2, 3, 4, 5, 6, 7]
    assert torch.where(mask[1])[0].tolist() == [10, 11]


def test_share_of_masked_frames_is_as_documented():
    mask = span_mask(torch.rand(64, 4000), probability=0.04, span=10)
    assert float(mask.float().mean()) == pytest.approx(1 - 0.96**10, abs=0.01)


def test_repeated_frames_stay_in_order():
    mask = torch.tensor([[True, False, True]])
    assert repeat_frames(mask, 2).tolist() == [[True, True, False, False, True, True]]


def test_targets_are_the_nearest_normalised_codes():
    quantizer = RandomProjectionQuantizer(12, 3, 7, 4, seed=5)
    features = torch.randn(2, 5, 12)
    targets = quantizer(features)
    assert targets.shape == (2, 5, 3)
    for q in range(3):
        projected = F.normalize(features @ quantizer.projection_QPC[q], dim=-1)
        distance = (projected[..., None, :] - quantizer.codebook_QKC[q]).square().sum(-1)
        assert torch.equal(targets[..., q], distance.argmin(dim=-1))


def test_targets_depend_on_the_seed_alone_and_are_in_the_checkpoint():
    first = RandomProjectionQuantizer(12, 2, 7, 4, seed=5)
    torch.manual_seed(99)
    again = RandomProjectionQuantizer(12, 2, 7, 4, seed=5)
    other = RandomProjectionQuantizer(12, 2, 7, 4, seed=6)
    assert set(first.state_dict()) == {"projection_QPC", "codebook_QKC"}
    assert not list(first.parameters())
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert not torch.equal(value, other.state_dict()[name])
    with torch.device("meta"):
        assert seeded_normal((3,), 0).is_meta


def test_masked_prediction_counts_masked_frames_alone():
    logits, targets = torch.randn(2, 6, 3, 5), torch.randint(5, (2, 6, 3))
    mask = torch.rand(2, 6) < 0.5
    loss, correct = prediction_loss(logits, targets)
    expected = F.cross_entropy(logits[mask].flatten(0, 1), targets[mask].flatten())
    torch.testing.assert_close(mean_where(loss, mask), expected)
    hits = (logits[mask].argmax(-1) == targets[mask]).float()
    torch.testing.assert_close(mean_where(correct, mask), hits.mean())
    assert mean_where(loss, torch.zeros_like(mask)).item() == 0.0


def enumerated_ctc(probability: torch.Tensor, labels: list[int]) -> float:
    """-log of the summed probability of all paths that collapse to `labels` (blank 0)."""
    total = 0.0
    num_frames, num_classes = probability.shape
    for number in range(num_classes**num_frames):
        path = [(number // num_classes**t) % num_classes for t in range(num_frames)]
        merged = [c for t, c in enumerate(path) if t == 0 or c != path[t - 1]]
        if [c for c in merged if c != 0] == labels:
            total += math.prod(float(probability[t, c]) for t, c in enumerate(path))
    return -math.log(total)


def test_ctc_shifts_text_ids_past_the_blank():
    """Text ids 0 and 1 are classes 1 and 2: sentencepiece starts at 0, where CTC has its blank."""
    logits = torch.randn(1, 4, 3)
    text = torch.tensor([[0, 1, 0, 0]])
    loss = ctc_loss(logits, torch.tensor([4]), text, torch.tensor([2]))
    expected = enumerated_ctc(logits[0].softmax(dim=-1), [1, 2])
    assert float(loss) == pytest.approx(expected / 2, rel=1e-5)  # per text piece


def test_ctc_leaves_out_rows_without_text_and_texts_that_do_not_fit():
    logits = torch.randn(3, 4, 3, requires_grad=True)
    text = torch.tensor([[0, 1, 0, 0, 1, 0], [0] * 6, [0, 1, 0, 1, 0, 1]])
    frames = torch.tensor([4, 4, 4])
    loss = ctc_loss(logits, frames, text, torch.tensor([2, 0, 6]))
    alone = ctc_loss(logits[:1], frames[:1], text[:1], torch.tensor([2]))
    assert loss.item() == pytest.approx(alone.item() * 2 / 8, rel=1e-5)
    loss.backward()
    assert logits.grad[0].abs().sum() > 0
    assert (logits.grad[1:] == 0).all()
    assert ctc_loss(logits, frames, text, torch.zeros(3, dtype=torch.int64)).item() == 0.0


def test_perplexity_of_a_histogram():
    counts = histogram(torch.tensor([[0, 1, 1, 3]]), torch.tensor([[True, True, True, False]]), 6)
    assert counts.tolist() == [1, 2, 0, 0, 0, 0]
    assert float(perplexity(torch.ones(8))) == pytest.approx(8.0)
    assert float(perplexity(torch.tensor([5.0, 0.0]))) == pytest.approx(1.0)


def test_a_warped_mel_axis_moves_peaks_by_the_factor():
    mel = torch.zeros(3, 4, 40)
    mel[:, :, 20] = 1.0
    warped = warp_frequencies(mel, torch.tensor([1.0, 1.25, 0.8]))
    assert torch.equal(warped[0], mel[0])
    assert warped[1].argmax(-1).tolist() == [16] * 4 and warped[2].argmax(-1).tolist() == [25] * 4


def test_a_warped_mel_axis_repeats_its_end():
    mel = torch.arange(10.0).expand(1, 2, 10)
    warped = warp_frequencies(mel, torch.tensor([1.5]))
    assert torch.allclose(warped[0, 0], (1.5 * torch.arange(10)).clamp(max=9))
