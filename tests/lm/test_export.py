"""Export to `transformers`: what it loads has our logits, or there is a clear refusal."""

import json
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file

from speechssm.cli import main
from speechssm.errors import ConfigError
from speechssm.lm.checkpoints.export import to_transformers, write_transformers
from speechssm.lm.checkpoints.initialise import initialise_from
from speechssm.lm.griffin import Griffin
from speechssm.lm.module import LanguageModelModule
from speechssm.lm.transformer import Transformer
from speechssm.loading import export

VOCABULARY = 13
WINDOW = 6
MODELS = {
    "Griffin": {
        "_target_": "speechssm.lm.griffin.Griffin",
        "vocab_size": VOCABULARY,
        "width": 32,
        "num_layers": 5,
        "num_heads": 4,
        "lru_width": 48,
        "mlp_width": 40,
        "window": WINDOW,
    },
    "Transformer": {
        "_target_": "speechssm.lm.transformer.Transformer",
        "vocab_size": VOCABULARY,
        "width": 32,
        "num_layers": 2,
        "num_heads": 4,
    },
}
OPTIMIZER = {"lr": 1e-3}


@pytest.fixture(scope="module", params=MODELS)
def trained(request, tmp_path_factory) -> tuple[torch.nn.Module, Path]:
    """A language model and the checkpoint of its training."""
    torch.manual_seed(0)
    module = LanguageModelModule(model=MODELS[request.param], optimizer=OPTIMIZER)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("trained") / "last.ckpt"
    content = {
        "state_dict": module.state_dict(),
        "hyper_parameters": {"model": MODELS[request.param], "optimizer": OPTIMIZER},
        "speechssm": {"stage": "lm", "trained_on": {"tokenizer": "0123"}},
        "global_step": 7,
    }
    torch.save(content, path)
    return module.model.eval(), path


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "new" / "folder"
    assert main(["export", f"model={trained[1]}", f"out={out}", "format=transformers"]) == 0
    return out


def documents(count: int, length: int) -> torch.Tensor:
    tokens = torch.randint(0, VOCABULARY, (count, length))
    tokens[:, 0] = VOCABULARY  # BOS
    return tokens


@torch.no_grad()
def test_logits_are_the_same_after_saving_and_loading(trained, exported, transformers):
    ours, _ = trained
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported)
    assert type(theirs).__name__ in ("RecurrentGemmaForCausalLM", "GemmaForCausalLM")
    tokens = documents(2, 30)
    hidden, _ = ours(tokens, tokens == VOCABULARY)
    expected = theirs(tokens).logits
    assert expected.shape[-1] == VOCABULARY + 1 and expected.std() > 0.5
    torch.testing.assert_close(ours.logits(hidden), expected[..., :-1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_decoding_is_the_same_past_the_window(trained, exported, transformers):
    ours, _ = trained
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported)
    tokens = documents(2, 4 * WINDOW)
    cache = transformers.DynamicCache(config=theirs.config)
    state = ours.initial_state(2)
    begin = 0
    for end in range(3, tokens.shape[1] + 1):
        part = tokens[:, begin:end]
        expected = theirs(part, use_cache=True, past_key_values=cache).logits[..., :-1]
        hidden, state = ours(part, part == VOCABULARY, state)
        torch.testing.assert_close(ours.logits(hidden), expected, atol=1e-4, rtol=1e-4)
        begin = end


def test_generate_says_units_only(exported, transformers):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported)
    with torch.no_grad():  # BOS, if it were allowed, would win each time
        theirs.model.embed_tokens.weight[-1] *= 1e3
    transformers.set_seed(0)
    units = theirs.generate(documents(2, 5), max_new_tokens=20)[:, 5:]
    assert units.shape == (2, 20) and units.max() < VOCABULARY


def test_greedy_continuation_is_the_same(trained, exported, transformers):
    ours, _ = trained
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported)
    prompt = documents(2, 5)
    expected = theirs.generate(prompt, max_new_tokens=3 * WINDOW, do_sample=False)
    tokens = prompt
    with torch.no_grad():
        for _ in range(3 * WINDOW):
            hidden, _ = ours(tokens, tokens == VOCABULARY)
            following = ours.logits(hidden[:, -1:]).argmax(-1)
            tokens = torch.cat([tokens, following], dim=1)
    assert torch.equal(tokens, expected)


def test_the_folder_says_what_it_is(trained, exported):
    names = {path.name for path in exported.iterdir()}
    assert names == {"model.safetensors", "config.json", "generation_config.json", "CARD.md"}
    config = json.loads((exported / "config.json").read_text())
    assert config["bos_token_id"] == VOCABULARY == config["vocab_size"] - 1
    assert config["speechssm"]["details"]["trained_on"] == {"tokenizer": "0123"}
    card = (exported / "CARD.md").read_text()
    assert "AutoModelForCausalLM.from_pretrained" in card and "13 begins a document" in card
    assert config["architectures"][0] in card
    # Nothing is stored twice: the output is the embedding.
    assert "lm_head.weight" not in load_file(exported / "model.safetensors")
    if "RecurrentGemma" in config["architectures"][0]:
        assert config["rope_parameters"]["partial_rotary_factor"] == 0.0


def test_an_export_can_be_imported_again(trained, exported):
    ours, _ = trained
    copy = instantiate(MODELS[type(ours).__name__])
    assert initialise_from(copy, exported).notes == ()
    weights = ours.state_dict()
    for name, value in copy.state_dict().items():
        if name not in ("embedding", "final_norm.scale"):  # these two carry the embedding's scale
            assert torch.equal(value, weights[name]), name


def test_weights_keep_their_dtype(trained, tmp_path, transformers):
    ours, _ = trained
    half = instantiate(MODELS[type(ours).__name__]).to(torch.bfloat16)
    write_transformers(half, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    built = to_transformers(half)
    assert loaded.dtype == built.dtype == torch.bfloat16
    tokens = documents(2, 20)
    assert torch.equal(loaded(tokens).logits, built(tokens).logits)


def test_writing_takes_no_second_copy_of_the_model(tmp_path, peak_bytes):
    model = Griffin(VOCABULARY, 256, 3, 4)
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert peak_bytes(lambda: write_transformers(model, tmp_path)) < 0.01 * size
    assert (tmp_path / "model.safetensors").stat().st_size > size


def griffin(**options) -> Griffin:
    return Griffin(VOCABULARY, 32, 3, 4, **options)


def transformer(**options) -> Transformer:
    return Transformer(VOCABULARY, 32, 2, 4, **options)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            griffin(logits_soft_cap=None),
            "RecurrentGemmaForCausalLM .* express logits_soft_cap=null",
        ),
        (griffin(block_pattern=["recurrent"]), "express block_pattern without attention"),
        (griffin(tied_embeddings=False), "express tied_embeddings=false"),
        (transformer(logits_soft_cap=30.0), r"GemmaForCausalLM .* logits_soft_cap=30.0 \(.*null"),
        (transformer(window=8), "window=8"),
        (transformer(bias=True), "bias=true"),
        (transformer(positions="none"), "positions=none"),
        (transformer(rotary_fraction=0.5, bias=True), "rotary_fraction=0.5 .*; bias=true"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(model, message, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=message):
        write_transformers(model, out)
    assert not out.exists()
    with pytest.raises(ConfigError, match=message):
        to_transformers(model)


def test_formats_and_stages_are_checked(trained, tmp_path):
    _, path = trained
    with pytest.raises(ConfigError, match="format=onnx is unknown; choose one of: speechssm, tran"):
        export(path, tmp_path / "out", format="onnx")
    content = torch.load(path, weights_only=True)
    content["speechssm"]["stage"] = "soundstorm"
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ConfigError, match="holds the stage soundstorm: format=transformers is for"):
        export(tmp_path / "other.ckpt", tmp_path / "out", format="transformers")
    assert not (tmp_path / "out").exists()
