"""Import of RecurrentGemma and Gemma: every tensor in its place, or an error that names it."""

import json
import logging
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file

from speechssm.configuration import compose
from speechssm.errors import CheckpointError
from speechssm.lm.checkpoints.configs import differences
from speechssm.lm.checkpoints.files import Stored
from speechssm.lm.checkpoints.initialise import check_tensors, initialise_from
from speechssm.lm.checkpoints.layouts import layout_of
from speechssm.lm.griffin import Griffin
from speechssm.lm.transformer import Transformer

GEMMA_WIDTHS = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 1}


def griffin(**options) -> Griffin:
    return Griffin(7, 32, 4, 4, **{"lru_width": 48, "window": 9, **options})


def transformer(**options) -> Transformer:
    return Transformer(7, 32, 3, 4, **{"mlp_width": 80, **options})


@pytest.fixture(scope="module")
def twin(transformers):
    """A RecurrentGemma of the size of `griffin()`, with a vocabulary of its own."""
    torch.manual_seed(0)
    config = transformers.RecurrentGemmaConfig(
        vocab_size=23,
        intermediate_size=192,
        num_hidden_layers=4,
        lru_width=48,
        attention_window_size=9,
        **GEMMA_WIDTHS,
    )
    model = transformers.RecurrentGemmaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def folder(twin, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("recurrentgemma")
    twin.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def sharded(twin, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    twin.save_pretrained(out, max_shard_size="60KB")
    assert len(list(out.glob("*.safetensors"))) > 3
    return out


@pytest.fixture(scope="module")
def gemma(transformers, tmp_path_factory) -> Path:
    config = transformers.GemmaConfig(
        vocab_size=23, intermediate_size=80, num_hidden_layers=3, head_dim=8, **GEMMA_WIDTHS
    )
    out = tmp_path_factory.mktemp("gemma")
    transformers.GemmaForCausalLM(config).save_pretrained(out)
    return out


def deepmind(model: Griffin) -> dict[str, torch.Tensor]:
    """The state dict that DeepMind's code would have with these weights."""
    theirs: dict[str, torch.Tensor] = {}
    for ours, tensor in model.state_dict().items():
        name = layout_of(model, "deepmind")[ours].name
        if name.endswith("ffw_up.w"):
            theirs.setdefault(name, torch.empty(2, *reversed(tensor.shape)))
            theirs[name][int("up" in ours.split(".")[-2])] = tensor.T
        elif name.endswith("ffw_up.b"):
            theirs.setdefault(name, torch.empty(2, 1, 1, *tensor.shape))
            theirs[name][int("up" in ours.split(".")[-2]), 0, 0] = tensor
        elif name.endswith("_gate.b"):
            theirs[name] = tensor.reshape(4, -1)
        else:
            theirs[name] = tensor
    return theirs


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if name != "embedding"}


def assert_same(model, other) -> None:
    for name, value in weights(model).items():
        assert torch.equal(value, weights(other)[name]), name


def test_one_file_and_shards_give_the_same_and_leave_the_embedding(folder, sharded):
    one, many = griffin(), griffin()
    embedding = one.embedding.clone()
    initialise_from(one, folder)
    report = initialise_from(many, sharded)
    assert torch.equal(one.embedding, embedding)
    assert_same(one, many)
    theirs = load_file(folder / "model.safetensors")
    assert torch.equal(
        one.blocks[2].temporal.query.weight, theirs["model.layers.2.temporal_block.q_proj.weight"]
    )
    assert report.loaded == len(theirs) - 1 and report.fresh == ("embedding",)
    assert report.numbers == sum(value.numel() for value in weights(many).values())
    assert report.ignored == ("model.embed_tokens.weight",)


def test_the_report_is_logged_in_one_line(folder, caplog):
    with caplog.at_level(logging.INFO, logger="speechssm"):
        initialise_from(griffin(), folder)
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}: 77 tensors of RecurrentGemma (transformers) fill 59,456 numbers; left fresh: "
        "embedding; ignored: model.embed_tokens.weight; positions differ: 0.5 of each head is "
        "rotated there, 0.0 here"
    ]
    assert initialise_from(griffin(positions="rotary"), folder).notes == ()


@pytest.mark.parametrize("nest", [(), ("model",), ("state_dict", "model")])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_deepminds_layout_gives_the_same(folder, tmp_path, nest, prefix):
    expected, model = griffin(), griffin()
    initialise_from(expected, folder)
    content = {prefix + name: value for name, value in deepmind(expected).items()}
    for key in nest:
        content = {key: content, "step": 3}
    torch.save(content, tmp_path / "2b-it.pt")
    report = initialise_from(model, tmp_path)
    assert_same(expected, model)
    # Two of ours in one of theirs, twice in each of four blocks.
    assert report.loaded == 77 - 4 * 2 and report.family == "deepmind"
    assert report.ignored == (f"{prefix}embedder.input_embedding",)
    assert "window and soft cap were not compared" in report.describe()


def test_gemma_goes_into_a_transformer(gemma):
    model = transformer()
    report = initialise_from(model, gemma / "model.safetensors")
    theirs = load_file(gemma / "model.safetensors")
    assert torch.equal(
        model.blocks[1].mlp.down.weight, theirs["model.layers.1.mlp.down_proj.weight"]
    )
    assert (report.loaded, report.family, report.notes) == (len(theirs) - 1, "gemma", ())


def test_weights_take_the_models_dtype(twin, folder, tmp_path, transformers):
    copy = transformers.RecurrentGemmaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    copy.save_pretrained(tmp_path)
    whole, half = griffin(), griffin().to(torch.bfloat16)
    initialise_from(whole, tmp_path)
    initialise_from(half, folder)
    assert whole.final_norm.scale.dtype == torch.float32
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(half)[name].float()), name


def test_an_untied_output_is_left_fresh_and_tied_copies_are_ignored(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.2.temporal_block.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, tmp_path / "model.safetensors")
    report = initialise_from(griffin(tied_embeddings=False), tmp_path)
    assert report.fresh == ("embedding", "output_embedding")
    assert len(report.ignored) == 3


def changed(folder: Path, out: Path, change) -> Path:
    """A copy of the folder with its tensors changed by a function of them."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    out.mkdir()
    save_file(tensors, out / "model.safetensors")
    shutil.copy(folder / "config.json", out)
    return out


GATE = "model.layers.1.temporal_block.rg_lru.input_gate_bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop(GATE),
            rf"lacks {GATE} \(1 tensors missing, 0 unexpected\)",
        ),
        (
            lambda tensors: tensors.update({GATE + "_2": torch.zeros(2)}),
            rf"holds {GATE}_2, which has no place \(0 tensors missing, 1 unexpected\)",
        ),
        (
            lambda tensors: tensors.update({GATE: torch.zeros(12, 4)}),
            rf"{GATE} is \[12, 4\], the model needs \[4, 12\]",
        ),
        (
            lambda tensors: tensors.update({GATE: torch.zeros(4, 12, dtype=torch.int8)}),
            rf"{GATE} is quantised or no floating-point tensor",
        ),
        (
            lambda tensors: tensors[GATE][2].fill_(math.nan),
            rf"{GATE} holds NaN or infinite numbers",
        ),
    ],
    ids=["missing", "unexpected", "misshaped", "quantised", "NaN"],
)
def test_a_tensor_out_of_place_is_named(folder, tmp_path, change, message):
    model = griffin()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        initialise_from(model, changed(folder, tmp_path / "changed", change))
    if "NaN" not in message:
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 8}, r"its config.json needs model.window=9 \(here 8\)$"),
        ({"logits_soft_cap": None}, r"model.logits_soft_cap=30.0 \(here null\)$"),
        ({"lru_width": 64}, r"model.lru_width=48 \(here 64\)$"),
        ({"conv_width": 3}, r"model.conv_width=4 \(here 3\)$"),
        ({"mlp_width": 64}, r"model.mlp_width=96 \(here 64\)$"),
        (
            {"block_pattern": ["recurrent", "attention"]},
            r"model.block_pattern=\['recurrent', 'recurrent', 'attention', 'recurrent'\] \(here",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_of_another_size_names_the_option(folder, options, message):
    with pytest.raises(CheckpointError, match=message):
        initialise_from(griffin(**options), folder)


def test_another_depth_without_a_config_names_the_tensor(folder):
    file = shutil.copy(folder / "model.safetensors", folder.parent / "alone.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks model.layers.4.temporal_pre_norm.weight"):
        initialise_from(Griffin(7, 32, 5, 4, lru_width=48, window=9), file)
    with pytest.raises(CheckpointError, match=r"holds model.layers.3.* which has no place"):
        initialise_from(Griffin(7, 32, 3, 4, lru_width=48, window=9), file)


def test_another_architecture_is_refused(folder, gemma, tmp_path):
    with pytest.raises(CheckpointError, match=r"Gemma \(.*, but a Griffin takes RecurrentGemma"):
        initialise_from(griffin(), gemma)
    with pytest.raises(CheckpointError, match=r"RecurrentGemma .*, but a Transformer takes Gemma"):
        initialise_from(transformer(), folder)
    save_file({"h.0.attn.c_attn.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"neither .* named like h.0.attn.c_attn.weight"):
        initialise_from(griffin(), tmp_path)
    shutil.copytree(gemma, tmp_path / "llama")
    config = json.loads((gemma / "config.json").read_text()) | {"model_type": "llama"}
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="holds llama, but a Transformer takes Gemma"):
        initialise_from(transformer(), tmp_path / "llama")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_damaged_and_missing_files_are_named(folder, sharded, tmp_path):
    def refuses(path: Path, message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            initialise_from(griffin(), path)

    refuses(tmp_path / "nowhere", r"nowhere: no such file or folder")
    refuses(tmp_path, r"holds no weights of RecurrentGemma or Gemma: model.safetensors, model")
    (tmp_path / "notes.txt").write_text("hello")
    refuses(tmp_path / "notes.txt", r"is neither a .safetensors nor a .pt file")

    copy = shutil.copytree(folder, tmp_path / "cut")
    truncate(copy / "model.safetensors")
    refuses(copy, r"cut/model.safetensors is truncated or no safetensors file \(")
    (copy / "config.json").write_text("{")
    refuses(copy, r"cut/config.json cannot be read")

    copy = shutil.copytree(sharded, tmp_path / "shards")
    shard = sorted(copy.glob("*.safetensors"))[1]
    truncate(shard)
    refuses(copy, rf"{shard.name} is truncated or no safetensors file")
    shard.unlink()
    refuses(copy, rf"{shard.name} is missing, which model.safetensors.index.json names")
    index = copy / "model.safetensors.index.json"
    index.write_text("{}")
    refuses(copy, r"index.json cannot be read")
    index.unlink()
    refuses(copy, r"holds several files of weights \(model-00001-")

    torch.save(deepmind(griffin()), tmp_path / "deepmind.pt")
    truncate(tmp_path / "deepmind.pt")
    refuses(tmp_path / "deepmind.pt", r"deepmind.pt is truncated or no torch file of tensors")
    torch.save({"optimiser": {"step": 3}}, tmp_path / "step.pt")
    refuses(tmp_path / "step.pt", r"step.pt holds no state dict")
    torch.save({"model": Path("x")}, tmp_path / "object.pt")
    refuses(tmp_path / "object.pt", r"object.pt is truncated or no torch file of tensors")


@pytest.mark.parametrize("form", ["safetensors", "pt"])
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's counters")
def test_peak_memory_is_below_1_2_times_the_model(tmp_path, form):
    width, layers = 1024, 3  # 150 MB
    model = Griffin(16, width, layers, 4, window=8)
    file = tmp_path / f"model.{form}"
    if form == "pt":
        torch.save(deepmind(model), file)
    else:
        layout = layout_of(model, "recurrent_gemma")
        theirs = {
            layout[name].name: layout[name].write(value).contiguous()
            for name, value in model.state_dict().items()
        }
        save_file(theirs, file)
    worker = Path(__file__).parent / "import_worker.py"
    command = [sys.executable, str(worker), str(file), str(width), str(layers)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    size, above = map(int, result.stdout.split())
    assert size > 140e6 and size + above < 1.2 * size


# The published config.json of each, as far as it tells the size.
PUBLISHED = {
    "griffin_2b": {
        "hidden_size": 2560,
        "intermediate_size": 15360,
        "num_hidden_layers": 26,
        "num_attention_heads": 10,
    },
    "griffin_9b": {
        "hidden_size": 4096,
        "intermediate_size": 24576,
        "num_hidden_layers": 38,
        "num_attention_heads": 16,
    },
    "transformer_2b": {
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "head_dim": 256,
    },
}


def ignored(model, family: str, theirs: torch.nn.Module, prefix: str) -> list[str]:
    """What an import of their weights would ignore; every other tensor has its place."""
    file = Path("meta")
    stored = {
        name: Stored(file, tuple(value.shape), value.dtype)
        for name, value in theirs.state_dict().items()
    }
    return check_tensors(layout_of(model, family), stored, prefix, file)


@pytest.mark.parametrize("name", PUBLISHED)
def test_paper_presets_take_every_tensor_of_the_published_models(name, transformers):
    config_class, model_class, family = (
        (transformers.GemmaConfig, transformers.GemmaForCausalLM, "gemma")
        if name == "transformer_2b"
        else (
            transformers.RecurrentGemmaConfig,
            transformers.RecurrentGemmaForCausalLM,
            "recurrent_gemma",
        )
    )
    with torch.device("meta"):
        ours = instantiate(compose("train", ["stage=lm", f"model={name}"]).model)
        theirs = model_class(config_class(num_key_value_heads=1, **PUBLISHED[name]))
    tied = ["model.embed_tokens.weight", "lm_head.weight"]
    assert ignored(ours, family, theirs, "model.") == tied
    assert differences(ours, theirs.config.to_dict()) == []


@pytest.mark.parametrize(
    ("name", "preset"),
    [("griffin_2b", "RECURRENT_GEMMA_2B_V1"), ("griffin_9b", "RECURRENT_GEMMA_9B_V1")],
)
def test_paper_presets_take_every_tensor_of_deepminds_models(name, preset, recurrentgemma):
    library, common = recurrentgemma
    config = common.GriffinConfig.from_preset(getattr(common.Preset, preset))
    with torch.device("meta"):
        ours = instantiate(compose("train", ["stage=lm", f"model={name}"]).model)
        theirs = library.Griffin(config, device="meta")
    assert ignored(ours, "deepmind", theirs, "") == ["embedder.input_embedding"]
