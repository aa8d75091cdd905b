"""Shapes: B batch, Q quantiser levels, T codec frames, U units, C codebook size."""

from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from speechssm.errors import ConfigError
from speechssm.soundstorm.loss import evaluate_levels, finer_loss, masked_score, masked_states
from speechssm.soundstorm.masking import draw, training_mask
from speechssm.soundstorm.model import SoundStorm

CONF = Path(__file__).parents[2] / "conf" / "model"
SIZES = dict(
    unit_vocab_size=11,
    codebook_size=13,
    num_quantizers=3,
    width=16,
    num_layers=2,
    num_heads=2,
    ffn_width=32,
    conv_kernel=3,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = SoundStorm(**SIZES).eval()
    torch.nn.init.normal_(model.head_weight_QCD, std=0.02)  # they start at zero
    return model


def batch(rows=2, units=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(0, 13, (rows, 3, 2 * units), generator=generator),
        torch.randint(0, 11, (rows, units), generator=generator),
    )


def test_a_level_tensor_gives_each_row_the_head_of_its_level(model):
    hidden_BTD = torch.randn(3, 5, 16)
    mixed = model.logits(hidden_BTD, torch.tensor([2, 0, 1]))
    for row, level in enumerate([2, 0, 1]):
        torch.testing.assert_close(mixed[row], model.logits(hidden_BTD, level)[row])


def test_a_frame_is_the_sum_of_its_levels_and_of_its_repeated_unit(model):
    codes_BQT, units_BU = batch()
    seen = {}
    model.conformer.register_forward_pre_hook(lambda _, arguments: seen.update(x=arguments[0]))
    model(codes_BQT, units_BU)
    for frame in range(12):
        expected = model.unit_embedding.weight[units_BU[1, frame // 2]]
        for level in range(3):
            expected = expected + model.level_embedding_QCD[level, codes_BQT[1, level, frame]]
        torch.testing.assert_close(seen["x"][1, frame], expected)


def test_every_level_has_a_mask_id_of_its_own(model):
    codes_BQT, units_BU = batch()
    hidden = []
    for level in range(3):
        masked = codes_BQT.clone()
        masked[:, level] = model.mask_id
        hidden.append(model(masked, units_BU))
    assert not torch.allclose(hidden[0], hidden[1]) and not torch.allclose(hidden[1], hidden[2])


def test_attention_is_bidirectional_and_padding_does_not_matter(model):
    codes_BQT, units_BU = batch()
    valid_BT = torch.arange(12)[None].expand(2, -1) < 8
    base = model(codes_BQT, units_BU, valid_BT)
    last_changed, padding_changed = units_BU.clone(), units_BU.clone()
    last_changed[:, 3] = (units_BU[:, 3] + 1) % 11
    padding_changed[:, 4:] = (units_BU[:, 4:] + 1) % 11
    assert not torch.allclose(model(codes_BQT, last_changed, valid_BT)[:, 0], base[:, 0])
    torch.testing.assert_close(model(codes_BQT, padding_changed, valid_BT)[:, :8], base[:, :8])


def test_positions_matter(model):
    codes_BQT, units_BU = batch()
    codes_BQT[:], units_BU[:] = 1, 2
    units_BU[:, 0] = 3
    hidden_BTD = model(codes_BQT, units_BU)
    assert not torch.allclose(hidden_BTD[0, 6], hidden_BTD[0, 7], atol=1e-5)


def test_gradient_reaches_the_logits_of_masked_tokens_of_the_drawn_level_only(model):
    codes_BQT, units_BU = batch(rows=8)
    length_B = torch.tensor([12, 12, 8, 12, 6, 12, 12, 2])
    mask = training_mask(draw(8, 12, generator=torch.Generator().manual_seed(3)), length_B, 3)
    kept = {}

    def keep(hidden_BTD, level):
        kept["logits"] = SoundStorm.logits(model, hidden_BTD, level)
        kept["logits"].retain_grad()
        return kept["logits"]

    model.logits = keep
    masked_score(model, codes_BQT, units_BU, length_B, mask).nats_B.sum().backward()
    touched_BT = (kept["logits"].grad != 0).any(-1)
    assert torch.equal(touched_BT, mask.target_BT) and touched_BT.any()
    drawn = set(mask.level_B[mask.target_BT.any(1)].tolist())
    for level in range(3):
        touched = bool((model.head_weight_QCD.grad[level] != 0).any())
        assert touched == (level in drawn)


def test_the_loss_is_the_mean_negative_log_probability_of_the_hidden_codes(model):
    codes_BQT, units_BU = batch(rows=4)
    length_B = torch.tensor([12, 10, 12, 6])
    mask = training_mask(draw(4, 12, generator=torch.Generator().manual_seed(5)), length_B, 3)
    score = masked_score(model, codes_BQT, units_BU, length_B, mask)
    expected, tokens = torch.zeros(4), torch.zeros(4)
    for row in range(4):
        level, length = mask.level_B[row].item(), length_B[row].item()
        seen = codes_BQT[row : row + 1, :, :length].clone()
        seen[mask.hidden_BQT[row : row + 1, :, :length]] = 13
        logits_TC = model.logits(model(seen, units_BU[row : row + 1, : length // 2]), level)[0]
        for frame in mask.target_BT[row].nonzero()[:, 0].tolist():
            expected[row] -= logits_TC[frame].log_softmax(-1)[codes_BQT[row, level, frame]].item()
            tokens[row] += 1
    torch.testing.assert_close(score.nats_B, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(score.tokens_B, tokens)


def test_a_new_model_predicts_the_frequencies_of_the_codes_it_was_shown(model):
    codes_BQT, units_BU = batch(rows=4, units=20)
    valid_BT = torch.arange(40)[None].expand(4, -1) < 30
    model.count_codes(codes_BQT, valid_BT)
    torch.nn.init.zeros_(model.head_weight_QCD)
    for level in range(3):
        count_C = torch.bincount(codes_BQT[:, level, :30].flatten(), minlength=13)
        assert torch.equal(model.code_count_QC[level], count_C)
        probability = model.logits(model(codes_BQT, units_BU), level).softmax(-1)
        expected = (count_C + 1.0) / (count_C + 1.0).sum()
        torch.testing.assert_close(probability, expected.expand_as(probability))


def test_held_out_figures_repeat_and_start_near_the_uniform_distribution(model):
    codes_BQT, units_BU = batch(rows=4, units=20)
    batches = [{"codes": codes_BQT, "units": units_BU, "length": torch.tensor([40, 40, 30, 20])}]
    first, second = (evaluate_levels(model, batches, seed=1) for _ in range(2))
    assert first == second and first != evaluate_levels(model, batches, seed=2)
    assert len(first["nats"]) == 3
    for nats in first["nats"]:
        assert abs(nats - torch.tensor(13.0).log().item()) < 0.3


@torch.inference_mode()
def test_a_bfloat16_conformer_says_nearly_the_same_and_leaves_the_model_as_it_was(model):
    codes_BQT, units_BU = batch()
    faster = model.for_decoding("bf16-true")
    exact, rounded = model(codes_BQT, units_BU), faster(codes_BQT, units_BU)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, atol=0.1, rtol=0.05)
    assert faster.head_weight_QCD is model.head_weight_QCD
    assert faster.conformer_dtype == torch.bfloat16 and model.conformer_dtype == torch.float32
    assert model.for_decoding().conformer is model.conformer
    with pytest.raises(ConfigError, match="precision=fp8 is unknown"):
        model.for_decoding("fp8")


def test_compiling_is_for_one_shape_each_and_of_the_conformer_alone(model, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda *a, **k: asked.append((a, k)) or a[0])
    assert model.for_decoding(compile=True).conformer is model.conformer
    assert asked == [((model.conformer,), {"dynamic": False})]


@pytest.mark.parametrize(("levels", "frames"), [(2, 12), (3, 11)])
def test_codes_of_another_codec_or_length_are_refused_in_one_line(model, levels, frames):
    with pytest.raises(ConfigError) as caught:
        model(torch.zeros(1, levels, frames, dtype=torch.int64), torch.zeros(1, 6).long())
    assert "\n" not in str(caught.value)


def test_a_vocabulary_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="unit_vocab_size"):
        SoundStorm(**(SIZES | {"unit_vocab_size": 0}))


@pytest.mark.parametrize(
    ("name", "layers", "millions"),
    [("soundstorm_demo", 2, (1, 3)), ("soundstorm_350m", 12, (340, 360)),
     ("soundstorm_600m", 24, (590, 650))],
)  # fmt: skip
def test_configs_have_the_published_size(name, layers, millions):
    with torch.device("meta"):
        model = hydra.utils.instantiate(OmegaConf.load(CONF / f"{name}.yaml"))
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions[0] <= count <= millions[1]
    assert len(model.conformer.layers) == layers


def test_finer_levels_are_predicted_after_the_prompt_and_never_at_the_last_level(model):
    codes_BQT, units_BU = batch(rows=3)
    length_B = torch.tensor([12, 10, 12])
    draws = draw(3, 12, generator=torch.Generator().manual_seed(5))
    mask = training_mask(draws, length_B, 3, level_B=torch.tensor([0, 1, 2]))
    hidden_BTD = masked_states(model, codes_BQT, units_BU, length_B, mask)
    uniform_NB = torch.tensor([[0.0, 0.0, 0.0], [0.99, 0.99, 0.99]])
    loss = finer_loss(model, hidden_BTD, codes_BQT, length_B, mask, uniform_NB)
    expected = []
    for row, level in ((0, 1), (0, 2), (1, 2), (1, 2)):  # both draws of row 1 are its only one
        first, stop = int(mask.prompt_B[row]), int(length_B[row])
        log_TC = model.logits(hidden_BTD[row : row + 1, first:stop], level)[0].log_softmax(-1)
        expected.append(-log_TC.gather(1, codes_BQT[row, level, first:stop, None]))
    assert loss.item() == pytest.approx(torch.cat(expected).mean().item(), rel=1e-5)


def count_on_rank(rank: int, folder: str, codes_BQT: torch.Tensor) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    model = SoundStorm(**SIZES)
    model.count_codes(codes_BQT[rank : rank + 1], torch.ones(1, 12, dtype=torch.bool))
    torch.save(model.code_count_QC, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_count_the_codes_of_both(model, tmp_path):
    codes_BQT, _ = batch()
    model.count_codes(codes_BQT, torch.ones(2, 12, dtype=torch.bool))
    torch.multiprocessing.spawn(count_on_rank, (str(tmp_path), codes_BQT), nprocs=2)
    for rank in (0, 1):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), model.code_count_QC)


def test_it_can_begin_with_the_geometry_of_the_codec(model):
    codebook_QCE = torch.randn(3, 13, 8) * torch.tensor([4.0, 2.0, 1.0])[:, None, None] + 3
    codebook_QCE[1, 5] = codebook_QCE[1, 2]
    model.begin_with_codebooks(codebook_QCE)
    for level in range(3):
        ours, theirs = torch.pdist(model.head_weight_QCD[level]), torch.pdist(codebook_QCE[level])
        torch.testing.assert_close(ours / ours.mean(), theirs / theirs.mean(), rtol=1e-3, atol=1e-3)
    assert torch.equal(model.level_embedding_QCD[1, 5], model.level_embedding_QCD[1, 2])
    # Frames differ as their vectors do, whichever levels make the difference.
    codes_NQ = torch.randint(0, 13, (40, 3))
    frames = [
        sum(table_QCX[level, codes_NQ[:, level]] for level in range(3))
        for table_QCX in (model.level_embedding_QCD, codebook_QCE)
    ]
    assert torch.corrcoef(torch.stack([torch.pdist(frame) for frame in frames]))[0, 1] > 0.95


@pytest.mark.parametrize("dimensions", [8, 32])
def test_codebooks_enter_at_one_size_whatever_their_own(model, dimensions):
    model.begin_with_codebooks(1e-3 * torch.randn(3, 13, dimensions))
    assert model.level_embedding_QCD[0, :13].var().item() == pytest.approx(0.5, rel=0.3)
    # A new model still predicts about what the unigram does.
    assert 0.2 < model.logits(torch.randn(2, 5, 16), 0).std() < 1


def test_codebooks_of_another_codec_are_refused(model):
    with pytest.raises(ConfigError, match=r"stage.codec has 3 levels of 12 codes.*3 of 13"):
        model.begin_with_codebooks(torch.randn(3, 12, 8))
