from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn import functional

from revox.model.layers import RMSNorm
from revox.model.voxtral import Voxtral

TYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def _every_warning():
    """torch gives this one once in a process otherwise."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(before)


@pytest.mark.parametrize("weight_type", TYPES)
@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("trained", [True, False])
def test_a_norm_of_any_types_is_torchs_without_its_warning(trained, type, weight_type):
    torch.manual_seed(0)
    norm = RMSNorm(64, eps=1e-5).requires_grad_(trained)
    norm.weight.data = torch.randn(64).to(weight_type)
    x = (3 * torch.randn(5, 7, 64)).to(type)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = functional.rms_norm(x, (64,), norm.weight, 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.set_grad_enabled(trained):
            found = norm(x)
    assert found.dtype == expected.dtype == type
    # One unit in the last place of the type at most: the order of the products differs.
    torch.testing.assert_close(found, expected, rtol=2**-8 if type == torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("weight_type", TYPES)
def test_the_model_under_autocast_warns_of_nothing(weight_type, tiny_config):
    torch.manual_seed(0)
    model = Voxtral(tiny_config, with_encoder=True).to(weight_type).eval()
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        warnings.simplefilter("error")
        codes = model.audio_tokenizer.encode(torch.randn(1, 1920 * 3))
        model.audio_tokenizer.decode(codes)
