"""Residual vector quantiser against a plain reference, and the life of its codebooks."""

import pytest
import torch

from speechssm.errors import ConfigError, FingerprintError
from speechssm.nn.residual_quantization import ResidualVectorQuantizer


def make(**options) -> ResidualVectorQuantizer:
    torch.manual_seed(0)
    arguments = {"num_quantizers": 4, "codebook_size": 16, "width": 6} | options
    return ResidualVectorQuantizer(**arguments)


def reference(quantizer: ResidualVectorQuantizer, x_BTD: torch.Tensor):
    """Residual quantisation as its definition reads: one vector, one level, one code at a time."""
    codes = torch.zeros(x_BTD.shape[0], quantizer.num_quantizers, x_BTD.shape[1], dtype=torch.int64)
    sums = torch.zeros_like(x_BTD)
    for b in range(x_BTD.shape[0]):
        for t in range(x_BTD.shape[1]):
            residual = x_BTD[b, t].clone()
            for level in range(quantizer.num_quantizers):
                distances = [(residual - code).norm() for code in quantizer.codebook_QKD[level]]
                best = int(torch.stack(distances).argmin())
                codes[b, level, t] = best
                residual = residual - quantizer.codebook_QKD[level, best]
                sums[b, t] += quantizer.codebook_QKD[level, best]
    return codes, sums


def test_codes_and_sums_equal_a_hand_written_residual_reference():
    quantizer = make().eval()
    x_BTD = torch.randn(2, 7, 6)
    codes, sums = reference(quantizer, x_BTD)
    quantized_BTD, codes_BQT, _ = quantizer(x_BTD)
    torch.testing.assert_close(codes_BQT, codes)
    torch.testing.assert_close(quantized_BTD, sums)
    torch.testing.assert_close(quantizer.encode(x_BTD), codes)
    torch.testing.assert_close(quantizer.decode(codes), sums)


def test_dropped_rows_use_their_first_levels_only():
    quantizer = make().eval()
    x_BTD = torch.randn(4, 5, 6)
    num_used_B = torch.tensor([1, 2, 3, 4])
    quantized_BTD, codes_BQT, _ = quantizer(x_BTD, num_used_B)
    for row, used in enumerate(num_used_B.tolist()):
        expected = quantizer.decode(codes_BQT[row : row + 1, :used])
        torch.testing.assert_close(quantized_BTD[row : row + 1], expected)
    assert not torch.allclose(quantized_BTD[0], quantizer.decode(codes_BQT)[0])


def test_commitment_is_the_mean_squared_residual_of_the_used_levels():
    quantizer = make().eval()
    x_BTD = torch.randn(2, 5, 6)
    num_used_B = torch.tensor([1, 3])
    codes_BQT = quantizer.encode(x_BTD)
    errors = [
        (x_BTD[row] - quantizer.decode(codes_BQT[row : row + 1, : level + 1])[0]).square().mean()
        for row, used in enumerate(num_used_B.tolist())
        for level in range(used)
    ]
    torch.testing.assert_close(quantizer(x_BTD, num_used_B)[2], torch.stack(errors).mean())


def test_gradient_passes_straight_through_and_commitment_pulls_to_the_codes():
    quantizer = make().eval()
    x_BTD = torch.randn(1, 3, 6, requires_grad=True)
    quantized_BTD, codes_BQT, commitment = quantizer(x_BTD)
    weight_BTD = torch.randn_like(x_BTD)
    (gradient,) = torch.autograd.grad((quantized_BTD * weight_BTD).sum(), x_BTD, retain_graph=True)
    torch.testing.assert_close(gradient, weight_BTD)
    (gradient,) = torch.autograd.grad(commitment, x_BTD)
    residuals = sum(x_BTD - quantizer.decode(codes_BQT[:, : level + 1]) for level in range(4))
    torch.testing.assert_close(gradient, 2 * residuals / (4 * x_BTD.numel()))


def test_one_training_step_moves_the_codebook_by_its_moving_average():
    quantizer = make(num_quantizers=1, codebook_size=3, ema_decay=0.9, dead_code_threshold=0.0)
    before_KD = quantizer.codebook_QKD[0].clone()
    x_BTD = torch.randn(2, 8, 6)
    _, codes_BQT, _ = quantizer.train()(x_BTD)
    for code in range(3):
        chosen_ND = x_BTD[codes_BQT[:, 0] == code]
        share = 3 / 16  # codes over frames: the mean code counts 1
        count = 0.9 + 0.1 * len(chosen_ND) * share
        expected_D = (0.9 * before_KD[code] + 0.1 * chosen_ND.sum(0) * share) / count
        torch.testing.assert_close(quantizer.codebook_QKD[0, code], expected_D)


def test_a_code_that_nothing_chooses_is_replaced_by_a_frame_of_the_batch():
    quantizer = make(num_quantizers=1, ema_decay=0.5, dead_code_threshold=0.2).train()
    quantizer.codebook_QKD[0, 3] = 1e4
    x_BTD = torch.randn(4, 25, 6)
    for _ in range(12):
        quantizer(x_BTD)
    distance = (quantizer.codebook_QKD[0, 3] - x_BTD).norm(dim=-1).min()
    assert distance < 1e2
    assert (quantizer.codebook_QKD.abs() < 1e2).all()


def test_evaluation_changes_nothing():
    quantizer = make().eval()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer(torch.randn(2, 9, 6))
    for name, value in quantizer.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_fit_finds_separate_clusters():
    quantizer = make(num_quantizers=1, codebook_size=4, width=2)
    centres_KD = torch.tensor([[0.0, 0], [10, 0], [0, 10], [10, 10]])
    x_ND = (centres_KD.repeat(50, 1) + 0.1 * torch.randn(200, 2))[torch.randperm(200)]
    quantizer.fit(x_ND[None])
    found = torch.cdist(centres_KD, quantizer.codebook_QKD[0]).min(dim=1)
    assert (found.values < 0.2).sum() >= 3
    error = (x_ND - quantizer.decode(quantizer.encode(x_ND[None]))[0]).square().mean()
    assert error < 0.2 * x_ND.var()


def test_each_level_lowers_the_error_after_fit():
    quantizer = make()
    x_BTD = torch.randn(1, 400, 6)
    quantizer.fit(x_BTD)
    codes_BQT = quantizer.encode(x_BTD)
    errors = [
        float((x_BTD - quantizer.decode(codes_BQT[:, :levels])).square().mean())
        for levels in range(1, 5)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.3 * errors[0]


def test_training_repeats_from_a_saved_state_whatever_the_global_generator():
    first, second = make().train(), make().train()
    first.fit(torch.randn(1, 100, 6))
    batches = [torch.randn(2, 20, 6) for _ in range(6)]
    for batch in batches[:3]:
        first(batch)
    second.load_state_dict(first.state_dict())
    for batch in batches[3:]:
        first(batch)
    torch.manual_seed(99)
    for batch in batches[3:]:
        second(batch)
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)


def test_codebooks_stay_float32_in_a_bfloat16_model():
    quantizer = make().to(torch.bfloat16)
    assert quantizer.codebook_QKD.dtype == torch.float32
    assert quantizer(torch.randn(1, 2, 6, dtype=torch.bfloat16))[0].dtype == torch.bfloat16


@pytest.mark.parametrize("levels", [0, 5])
def test_levels_outside_the_codec_are_refused(levels):
    with pytest.raises(ConfigError, match="levels 1 to 4"):
        make().encode(torch.randn(1, 2, 6), levels)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.full((1, 4, 2), 16), "codes run from 16 to 16"),
        (torch.full((1, 4, 2), -1), "codes run from -1"),
        (torch.zeros(1, 5, 2, dtype=torch.int64), "5 levels"),
        (torch.zeros(4, 2, dtype=torch.int64), "shape"),
        (torch.zeros(1, 4, 2), "integers"),
    ],
)
def test_codes_of_another_codec_are_refused(codes, message):
    with pytest.raises(FingerprintError, match=message):
        make().decode(codes)


def trained_on(x_BTD: torch.Tensor, **options) -> dict[str, torch.Tensor]:
    """State after a k-means start and three steps on a rank's rows."""
    quantizer = make(ema_decay=0.8, **options)
    quantizer.fit(x_BTD, iterations=3)
    for _ in range(3):
        quantizer(x_BTD)
    return quantizer.state_dict()


def train_on_rank(rank: int, folder: str, x_BTD: torch.Tensor) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    for threshold in (0.0, 0.5):
        state = trained_on(x_BTD[rank : rank + 1], dead_code_threshold=threshold)
        torch.save(state, f"{folder}/{threshold}_{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_hold_one_codebook_that_both_batches_made(tmp_path):
    x_BTD = torch.randn(2, 60, 6)
    torch.multiprocessing.spawn(train_on_rank, (str(tmp_path), x_BTD), nprocs=2)
    for threshold in (0.0, 0.5):
        first, second = (torch.load(tmp_path / f"{threshold}_{rank}.pt") for rank in (0, 1))
        for name, value in first.items():
            torch.testing.assert_close(value, second[name], rtol=1e-5, atol=1e-6)
        alone = trained_on(x_BTD[:1], dead_code_threshold=threshold)
        errors = []
        for state in (first, alone):  # on what the first rank has never seen
            quantizer = make().eval()
            quantizer.load_state_dict(state)
            errors.append((quantizer(x_BTD[1:])[0] - x_BTD[1:]).square().mean().item())
        assert errors[0] < 0.7 * errors[1], errors
