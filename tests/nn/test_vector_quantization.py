"""Vector quantiser: both ways to learn against a written-out reference, no collapse, no leaks."""

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing

from speechssm.errors import ConfigError
from speechssm.nn import vector_quantization
from speechssm.nn.vector_quantization import VectorQuantizer, inverse_square_root, nearest_code


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def with_codebook(quantizer: VectorQuantizer, codebook: torch.Tensor) -> VectorQuantizer:
    """Put known codes in, as if each had been chosen once."""
    quantizer.codebook_VC.data.copy_(codebook)
    if not quantizer.by_gradient:
        quantizer.code_sum_VC.copy_(codebook)
    quantizer.code_count_V.fill_(1.0)
    quantizer.initialized.fill_(True)
    return quantizer


def test_moving_averages_equal_a_loop_over_vectors():
    size, width, decay = 5, 3, 0.9
    quantizer = VectorQuantizer(size, width, ema_decay=decay, dead_code_threshold=0.0)
    codebook = torch.randn(size, width)
    with_codebook(quantizer, codebook).train()
    codes, sums, counts = codebook.numpy().copy(), codebook.numpy().copy(), np.ones(size)
    for _ in range(6):
        x = torch.randn(2, 7, width)
        quantized, indices, loss = quantizer(x)
        vectors = x.reshape(-1, width).numpy()
        chosen = [int(((v - codes) ** 2).sum(-1).argmin()) for v in vectors]
        assert indices.flatten().tolist() == chosen
        np.testing.assert_allclose(
            quantized.reshape(-1, width).detach().numpy(), codes[chosen], atol=1e-6
        )
        expected_loss = np.mean([(v - codes[c]) ** 2 for v, c in zip(vectors, chosen, strict=True)])
        assert float(loss) == pytest.approx(expected_loss, rel=1e-5)
        for code in range(size):
            members = [v for v, c in zip(vectors, chosen, strict=True) if c == code]
            counts[code] = decay * counts[code] + (1 - decay) * len(members)
            sums[code] = decay * sums[code] + (1 - decay) * np.sum(members, axis=0)
            codes[code] = sums[code] / counts[code]
    np.testing.assert_allclose(quantizer.codebook_VC.numpy(), codes, atol=1e-5)


@pytest.mark.parametrize("cosine", [False, True])
def test_gradients_of_the_codebook_equal_a_loop_over_vectors(cosine):
    size, width = 5, 3
    quantizer = VectorQuantizer(size, width, learning="gradient", cosine=cosine)
    with_codebook(quantizer, torch.randn(size, width)).train()
    x, weight = torch.randn(2, 7, width, requires_grad=True), torch.randn(2, 7, width)
    valid = torch.arange(7)[None] < torch.tensor([[7], [4]])
    quantized, indices, loss = quantizer(x, valid)
    (loss + (quantized * weight).sum()).backward()

    code = quantizer.codebook_VC.detach().clone().requires_grad_()
    vector = x.detach().clone().requires_grad_()
    expected, straight = 0.0, (vector * weight).sum()  # straight through: as if it were the input
    for b, t in torch.cartesian_prod(torch.arange(2), torch.arange(7)).tolist():
        z, candidates = vector[b, t], code
        if cosine:
            z = z / z.norm() * width**0.5
            candidates = code / code.norm(dim=-1, keepdim=True) * width**0.5
            straight = straight + ((z - vector[b, t]) * weight[b, t]).sum()
        chosen = int((z - candidates).square().sum(-1).argmin())
        assert int(indices[b, t]) == chosen
        torch.testing.assert_close(quantized[b, t], candidates[chosen], atol=1e-5, rtol=1e-5)
        if valid[b, t]:
            expected = expected + (z - candidates[chosen].detach()).square().mean() / 11
            expected = expected + (z.detach() - candidates[chosen]).square().mean() / 11
    torch.testing.assert_close(loss, expected)
    (expected + straight).backward()
    torch.testing.assert_close(quantizer.codebook_VC.grad, code.grad)
    torch.testing.assert_close(x.grad, vector.grad, atol=1e-5, rtol=1e-4)
    assert quantizer.eval()(x, valid)[2] < loss  # the commitment alone


@pytest.mark.parametrize("learning", ["moving_average", "gradient"])
def test_codes_start_at_vectors_of_the_first_batch(learning):
    options = {"ema_decay": 0.0, "dead_code_threshold": 0.0, "learning": learning}
    quantizer = VectorQuantizer(8, 4, **options).train()
    x = torch.randn(2, 10, 4)
    quantized, _, _ = quantizer(x)
    distance = torch.cdist(quantized.detach().reshape(-1, 4), x.reshape(-1, 4)).min(dim=1).values
    assert distance.max() < 1e-3  # cdist's own rounding
    assert bool(quantizer.initialized)


def toy_mixture(count: int = 64, points: int = 512) -> torch.Tensor:
    centres = 5 * torch.randn(count, 6)
    return (centres[torch.randint(count, (points,))] + 0.1 * torch.randn(points, 6))[None]


def used_perplexity(quantizer: VectorQuantizer, x: torch.Tensor) -> float:
    share = torch.bincount(quantizer.quantize(x).flatten(), minlength=quantizer.codebook_size)
    share = share / share.sum()
    return float(torch.exp(-torch.xlogy(share, share).sum()))


@pytest.mark.parametrize("learning", ["moving_average", "gradient"])
@pytest.mark.parametrize("cosine", [False, True])
def test_restarts_keep_a_codebook_in_use_that_would_collapse_without(learning, cosine):
    x = toy_mixture()
    reached = {}
    for threshold in (0.0, 0.2):
        options = {"dead_code_threshold": threshold, "learning": learning, "cosine": cosine}
        quantizer = VectorQuantizer(64, 6, ema_decay=0.9, **options).train()
        far = torch.randn(64, 6) * 0.01 + 20.0  # far from all data, and all in one direction
        with_codebook(quantizer, far)
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1)), *quantizer.parameters()])
        for _ in range(200):
            _, _, loss = quantizer(x)
            if learning == "gradient":
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        reached[threshold] = used_perplexity(quantizer, x)
    assert reached[0.0] < 16 and reached[0.2] > 40


@pytest.mark.parametrize("cosine", [False, True])
def test_a_codebook_learned_by_gradient_comes_as_close_as_moving_averages(cosine):
    x = toy_mixture(count=16)
    error = {}
    for learning in ("moving_average", "gradient"):
        torch.manual_seed(1)
        quantizer = VectorQuantizer(16, 6, learning=learning, ema_decay=0.9, cosine=cosine).train()
        losses = []
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1)), *quantizer.parameters()])
        optimizer.param_groups[0]["lr"] = 0.05
        for _ in range(150):
            _, _, loss = quantizer(x)
            losses.append(float(loss.detach()))
            if learning == "gradient":
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        error[learning] = float(quantizer.eval()(x)[2])
        assert error[learning] < 0.5 * losses[0]
    assert error["gradient"] < 1.5 * error["moving_average"] + 0.01


@pytest.mark.parametrize("learning", ["moving_average", "gradient"])
def test_a_codebook_in_full_use_is_left_alone(learning):
    options = {"ema_decay": 0.5, "dead_code_threshold": 0.5, "learning": learning}
    quantizer = VectorQuantizer(4, 2, **options).train()
    corners = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    with_codebook(quantizer, corners)
    for _ in range(10):
        quantizer(corners[None])
    torch.testing.assert_close(quantizer.codebook_VC.detach(), corners)


def test_search_in_blocks_finds_the_nearest_of_32768_codes(monkeypatch):
    codebook, z = torch.randn(32_768, 16), torch.randn(700, 16)
    seen = []
    product = torch.Tensor.__matmul__

    def watched(left, right):
        result = product(left, right)
        seen.append(result.numel())
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    found = nearest_code(z, codebook)
    assert len(seen) == 2 and max(seen) <= vector_quantization.MAX_SCORES
    assert sum(seen) == 700 * 32_768
    monkeypatch.undo()
    some = torch.randperm(700)[:50]
    distance = (z[some, None].double() - codebook[None].double()).square().sum(dim=-1)
    # In float32 two codes may be equally near: the distance counts, not the index.
    chosen = distance.gather(1, found[some, None])[:, 0]
    torch.testing.assert_close(chosen, distance.amin(dim=1), atol=1e-5, rtol=1e-5)
    assert nearest_code(z[:0], codebook).shape == (0,)


@pytest.mark.parametrize("learning", ["moving_average", "gradient"])
def test_32768_codes_learn_restart_and_go_the_way_back(learning):
    options = {"learning": learning, "cosine": True, "whiten": True, "ema_decay": 0.5}
    quantizer = VectorQuantizer(32_768, 24, 16, **options).train()
    x = torch.randn(1, 400, 24)
    for _ in range(3):
        _, indices, loss = quantizer(x)
        loss.backward()
    assert indices.unique().numel() > 300
    quantizer.eval()
    indices = quantizer.quantize(x)
    torch.testing.assert_close(quantizer.lookup(indices), quantizer(x)[0], atol=1e-5, rtol=1e-5)


def test_checkpoints_of_moving_averages_hold_what_they_always_held():
    names = ["codebook_VC", "code_sum_VC", "code_count_V", "initialized", "mean_C"]
    assert list(VectorQuantizer(8, 4).state_dict()) == [*names, "covariance_CC"]


def test_whitening_makes_units_independent_of_scale_and_offset():
    x = torch.randn(4, 200, 8) @ torch.randn(8, 8)
    units = []
    for scale, offset in ((1.0, 0.0), (1e-3, 5.0)):
        torch.manual_seed(1)
        quantizer = VectorQuantizer(16, 8, ema_decay=0.0, whiten=True).train()
        quantizer(x * scale + offset)
        units.append(quantizer.eval().quantize(x * scale + offset))
    assert (units[0] == units[1]).float().mean() > 0.95


def test_inverse_square_root_whitens():
    x = torch.randn(5000, 6) @ torch.randn(6, 6)
    covariance = torch.cov(x.T)
    values, vectors = torch.linalg.eigh(covariance)
    expected = vectors @ torch.diag(values**-0.5) @ vectors.T
    torch.testing.assert_close(
        inverse_square_root(covariance, iterations=30), expected, atol=1e-2, rtol=1e-2
    )


def test_whitening_takes_the_reward_out_of_shrinking():
    """Following the commitment loss alone, the encoder's output must keep its size."""
    x = torch.randn(1, 256, 4)
    scale = torch.ones(4, requires_grad=True)
    VectorQuantizer(8, 4, whiten=True).train()(x * scale)[2].backward()
    plain = torch.ones(4, requires_grad=True)
    VectorQuantizer(8, 4, whiten=False).train()(x * plain)[2].backward()
    assert scale.grad.sum().abs() < 1e-3 < plain.grad.sum()


def test_gradients_pass_straight_through():
    quantizer = with_codebook(VectorQuantizer(8, 4), torch.randn(8, 4)).eval()
    x = torch.randn(1, 5, 4, requires_grad=True)
    weight = torch.randn(1, 5, 4)
    (quantizer(x)[0] * weight).sum().backward()
    torch.testing.assert_close(x.grad, weight)


@pytest.mark.parametrize("learning", ["moving_average", "gradient"])
@pytest.mark.parametrize("cosine", [False, True])
def test_evaluation_changes_nothing_and_lookup_undoes_quantize(cosine, learning):
    quantizer = VectorQuantizer(16, 12, 4, cosine=cosine, whiten=True, learning=learning).train()
    x = torch.randn(2, 40, 12)
    quantizer(x)
    quantizer.eval()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantized, indices, _ = quantizer(x)
    assert torch.equal(indices, quantizer.quantize(x))
    torch.testing.assert_close(quantizer.lookup(indices), quantized, atol=1e-5, rtol=1e-5)
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_frames_that_are_not_valid_leave_no_trace():
    x = torch.randn(2, 30, 6)
    valid = torch.arange(30)[None] < torch.tensor([[30], [12]])
    results = []
    for filling in (0.0, 50.0):
        torch.manual_seed(3)
        quantizer = VectorQuantizer(8, 6, ema_decay=0.5, whiten=True).train()
        padded = torch.where(valid[..., None], x, torch.full_like(x, filling))
        losses = [float(quantizer(padded, valid)[2]) for _ in range(3)]
        results.append((losses, quantizer.codebook_VC.clone()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-4, rtol=1e-4)


def test_a_batch_without_valid_frames_changes_nothing():
    quantizer = VectorQuantizer(8, 6, whiten=True).train()
    x = torch.randn(1, 30, 6)
    quantizer(x, torch.zeros(1, 30, dtype=torch.bool))
    assert not bool(quantizer.initialized)
    quantizer(x)
    units = quantizer.quantize(x)
    _, _, loss = quantizer(10 * x, torch.zeros(1, 30, dtype=torch.bool))
    assert float(loss) == 0.0 and torch.equal(quantizer.quantize(x), units)


@pytest.mark.parametrize("learning", ["moving_average", "gradient"])
def test_codes_stay_float32_and_exact_in_bfloat16(learning):
    quantizer = VectorQuantizer(8, 6, 4, learning=learning).train()
    quantizer(torch.randn(1, 30, 6))
    codebook = quantizer.codebook_VC.detach().clone()
    quantizer.bfloat16()
    assert quantizer.project_in.weight.dtype == torch.bfloat16
    assert torch.equal(quantizer.codebook_VC, codebook)
    assert quantizer(torch.randn(1, 30, 6, dtype=torch.bfloat16))[0].dtype == torch.bfloat16


@pytest.mark.parametrize("learning", ["moving_average", "gradient"])
def test_steps_run_with_shapes_alone(learning):
    """The meta device knows no values: a branch on one or a boolean index would raise."""
    with torch.device("meta"):
        quantizer = VectorQuantizer(32, 8, 4, cosine=True, whiten=True, learning=learning).train()
        quantized, indices, _ = quantizer(torch.randn(2, 9, 8))
    assert quantized.shape == (2, 9, 8) and indices.shape == (2, 9)


@pytest.mark.parametrize(
    "wrong", [{"ema_decay": 1.0}, {"dead_code_threshold": 2.0}, {"learning": "by_heart"}]
)
def test_impossible_options_are_refused(wrong):
    with pytest.raises(ConfigError):
        VectorQuantizer(8, 4, **wrong)


def trained(rows: torch.Tensor, world: int, options: dict) -> VectorQuantizer:
    """The quantiser after three steps on a rank's rows, as a data-parallel training does them."""
    torch.manual_seed(9)
    quantizer = with_codebook(VectorQuantizer(12, 4, ema_decay=0.8, **options), torch.randn(12, 4))
    torch.manual_seed(torch.distributed.get_rank() if world > 1 else 0)
    for _ in range(3):
        _, _, loss = quantizer(rows)
        if quantizer.by_gradient:
            (gradient,) = torch.autograd.grad(loss, quantizer.codebook_VC)
            if world > 1:  # what DistributedDataParallel does
                torch.distributed.all_reduce(gradient)
            quantizer.codebook_VC.data -= gradient / world
    return quantizer


def train_on_rank(rank: int, folder: str, x: torch.Tensor, cases: list[dict]) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    for number, options in enumerate(cases):
        state = trained(x[rank : rank + 1], 2, options).state_dict()
        torch.save(state, f"{folder}/case{number}_rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_hold_one_codebook_the_one_of_both_batches_together(tmp_path):
    x = torch.randn(2, 50, 4)
    cases = [
        {"learning": learning, **options}
        for learning in ("moving_average", "gradient")
        for options in ({"dead_code_threshold": 0.0}, {"dead_code_threshold": 0.3, "whiten": True})
    ]
    torch.multiprocessing.spawn(train_on_rank, (str(tmp_path), x, cases), nprocs=2)
    for number, options in enumerate(cases):
        first, second = (torch.load(tmp_path / f"case{number}_rank{rank}.pt") for rank in (0, 1))
        for name in first:
            torch.testing.assert_close(first[name], second[name], atol=1e-6, rtol=1e-5)
        if not options.get("whiten"):
            # A restart draws at random, whitening takes a rank's own moments; all else adds up.
            joint = trained(x, 1, options).state_dict()
            for name in first:
                torch.testing.assert_close(first[name], joint[name], atol=1e-5, rtol=1e-5)
        half = trained(x[:1], 1, options).state_dict()
        assert (half["codebook_VC"] - first["codebook_VC"]).abs().max() > 1e-3
