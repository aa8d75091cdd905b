"""Fingerprints: one model has one name, whatever the order; any change renames it."""

import pytest
import torch

from speechssm.fingerprint import fingerprint

CONFIG = {"window_seconds": 30, "padding": "repeat"}


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "codebook": torch.randn(4, 3, generator=generator),
        "count": torch.tensor(5),
        "half": torch.randn(2, generator=generator).bfloat16(),
    }


def test_order_of_keys_and_layout_in_memory_do_not_matter():
    reordered = dict(reversed(weights().items()))
    reordered["codebook"] = reordered["codebook"].t().contiguous().t()
    assert fingerprint(CONFIG, weights()) == fingerprint(dict(reversed(CONFIG.items())), reordered)


@pytest.mark.parametrize(
    "change",
    [
        lambda config, tensors: config.update(padding="silence"),
        lambda config, tensors: tensors["codebook"].__setitem__((0, 0), 9.0),
        lambda config, tensors: tensors.update(count=tensors["count"].int()),
        lambda config, tensors: tensors.update(half=tensors["half"].view(2, 1)),
        lambda config, tensors: tensors.pop("half"),
    ],
)
def test_any_change_of_config_value_dtype_shape_or_set_renames(change):
    config, tensors = dict(CONFIG), weights()
    change(config, tensors)
    assert fingerprint(config, tensors) != fingerprint(CONFIG, weights())
