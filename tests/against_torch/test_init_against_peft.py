"""Against PEFT: initialisations that read the weight, and what PEFT does with each on a table."""

from __future__ import annotations

from typing import Any
from unittest import mock

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from flax_tied_lora._adapters.init_from_weight import from_weight, orthogonal
from tests.against_torch.torch_models import KINDS, NOT_ENSURED, far, peft_warnings

ROWS, COLS, RANK, ALPHA = 24, 14, 4, 6
SCALING = ALPHA / RANK
KEY = jax.random.key(7)
HOWS = ("pissa", "pissa_niter_3", "olora")

pytestmark = pytest.mark.models


class Model(torch.nn.Module):
    """One layer, as PEFT wants a model."""

    def __init__(self, layer: torch.nn.Module):
        super().__init__()
        self.layer = layer


def weight(rows: int, cols: int) -> torch.Tensor:
    """A kernel in our layout, without equal singular values."""
    values = np.random.default_rng(rows).standard_normal((rows, cols)).astype(np.float32)
    return torch.from_numpy(values)


def linear(rows: int, cols: int, dtype: torch.dtype = torch.float32) -> torch.nn.Linear:
    layer = torch.nn.Linear(rows, cols, bias=False).to(dtype)
    layer.weight.data = weight(rows, cols).T.contiguous().to(dtype)
    return layer


def with_peft(layer: torch.nn.Module, how: Any, rank: int = RANK, **fields: Any) -> Any:
    config = peft.LoraConfig(
        r=rank, lora_alpha=ALPHA, target_modules=["layer"], init_lora_weights=how, **fields
    )
    return peft.get_peft_model(Model(layer), config).base_model.model.layer


def drawn_here(*size: Any, **_: Any) -> torch.Tensor:
    """torch.randn, with JAX's numbers for our key."""
    shape = size[0] if isinstance(size[0], tuple) else size
    return torch.from_numpy(np.array(jax.random.normal(KEY, shape, np.float32)))


def theirs(layer: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The factors and the base weight of one of PEFT's Linear layers, in our layout."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return tuple(x.detach().float().numpy().T for x in (a, b, layer.base_layer.weight))  # pyright: ignore


@pytest.mark.parametrize("shape", [(ROWS, COLS), (COLS, ROWS), (ROWS, ROWS)])
@pytest.mark.parametrize("how", HOWS)
def test_linear(how, shape):
    with mock.patch("torch.randn", drawn_here):
        layer = with_peft(linear(*shape), how)
    expected = theirs(layer)
    assert layer.scaling["default"] == SCALING
    found = from_weight(how, weight(*shape).numpy(), RANK, SCALING, KEY)
    np.testing.assert_allclose(found[0] @ found[1], expected[0] @ expected[1], atol=1e-5)
    np.testing.assert_allclose(found[2], expected[2], atol=1e-5)
    # The factors themselves, up to the signs of the rank's directions.
    np.testing.assert_allclose(np.abs(found[0]), np.abs(expected[0]), atol=2e-5)
    np.testing.assert_allclose(np.abs(found[1]), np.abs(expected[1]), atol=2e-5)
    x = torch.randn(3, shape[0])
    torch.testing.assert_close(layer(x), x @ weight(*shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_scaling(how, use_rslora):
    layer = with_peft(linear(ROWS, COLS), how, use_rslora=use_rslora)
    scaling = ALPHA / RANK**0.5 if use_rslora else SCALING
    found = from_weight(how, weight(ROWS, COLS).numpy(), RANK, scaling, None)
    expected = theirs(layer)
    np.testing.assert_allclose(found[0] @ found[1], expected[0] @ expected[1], atol=1e-5)
    np.testing.assert_allclose(found[2], expected[2], atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_small_floats(how, dtype):
    """The residual is rounded to the weight's dtype, here and there; the factors only by PEFT."""
    layer = with_peft(linear(ROWS, COLS, getattr(torch, dtype)), how)
    assert layer.lora_A["default"].weight.dtype == torch.float32
    assert layer.base_layer.weight.dtype == getattr(torch, dtype)
    expected = theirs(layer)
    kernel = jax.numpy.asarray(weight(ROWS, COLS).numpy(), dtype)
    *found, residual = from_weight(how, kernel, RANK, SCALING, None)
    assert residual.dtype == dtype
    unit = float(jax.numpy.finfo(dtype).eps)
    for ours, reference in zip(found, expected, strict=False):
        rounded = np.asarray(ours.astype(dtype), np.float32)
        np.testing.assert_allclose(np.abs(rounded), np.abs(reference), rtol=unit, atol=1e-5)
    # Rounding may go the other way where the two differ in float32's last digits.
    residual = np.asarray(residual, np.float32)
    np.testing.assert_allclose(residual, expected[2], rtol=unit, atol=1e-5)
    assert np.mean(residual == expected[2]) > 0.95
    # Ours start where the model was but for one rounding, PEFT's by two more.
    exact = np.asarray(kernel, np.float32)
    ours = np.linalg.norm(SCALING * found[0] @ found[1] + residual - exact)
    assert ours < 0.7 * np.linalg.norm(SCALING * expected[0] @ expected[1] + expected[2] - exact)


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_what_peft_refuses_we_refuse(how):
    with pytest.raises(TypeError, match="float"):
        with_peft(linear(ROWS, COLS, torch.float64), how)
    with jax.enable_x64(True), pytest.raises(TypeError, match="is float64; expected float32"):
        from_weight(how, weight(ROWS, COLS).numpy().astype(np.float64), RANK, SCALING, None)
    with pytest.raises(ValueError, match="should be 'pissa' or 'pissa_niter_"):
        with_peft(linear(ROWS, COLS), "pissa_3")
    with pytest.raises(ValueError, match="expected 'pissa', 'pissa_niter_"):
        from_weight("pissa_3", weight(ROWS, COLS).numpy(), RANK, SCALING, None)


def test_conv1d():
    """PiSSA of a Conv1D, whose weight is [inputs, outputs], is that of the kernel.

    PEFT's OLoRA forgets the layout: its factors do not fit the layer, which fails when it is used.
    """
    layer = Conv1D(COLS, ROWS)
    layer.weight.data = weight(ROWS, COLS)
    adapted = with_peft(layer, "pissa", fan_in_fan_out=True)
    found = from_weight("pissa", weight(ROWS, COLS).numpy(), RANK, SCALING, None)
    a, b, residual = theirs(adapted)
    np.testing.assert_allclose(found[0] @ found[1], a @ b, atol=1e-5)
    np.testing.assert_allclose(found[2], residual.T, atol=1e-5)
    layer = Conv1D(COLS, ROWS)
    broken = with_peft(layer, "olora", fan_in_fan_out=True)
    assert broken.lora_A["default"].weight.shape == (RANK, COLS)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        broken(torch.zeros(1, ROWS))


@pytest.mark.parametrize("how", [*HOWS, "orthogonal"])
def test_an_embedding_ignores_the_initialisation(how):
    """Without a word: zero and normal factors, as for True, and the table unchanged."""
    layer = torch.nn.Embedding(ROWS, COLS)
    before = layer.weight.detach().clone()
    adapted = with_peft(layer, how)
    assert isinstance(adapted, peft.tuners.lora.Embedding)
    assert not adapted.lora_embedding_A["default"].any()
    assert 0.6 < adapted.lora_embedding_B["default"].std() < 1.4
    assert torch.equal(adapted.base_layer.weight, before)


@pytest.mark.parametrize("how", ["pissa", "olora", "orthogonal"])
@pytest.mark.parametrize("ensure_weight_tying", [True, False])
def test_pefts_tied_head_changes_the_model_that_it_starts_from(how, ensure_weight_tying):
    """The head takes its part out of the shared weight, the lookup has nothing to put back.

    Nor are the factors tied any more, whatever ensure_weight_tying says. Of the initialisations
    here only the orthogonal one, which leaves the weight alone, begins with the same model.
    """
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(KINDS["llama"].config).eval()
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        before = model(tokens).logits
        table = model.lm_head.weight.clone()
    fields: dict[str, Any] = {"ensure_weight_tying": ensure_weight_tying}
    expected = [] if ensure_weight_tying else [NOT_ENSURED]
    with peft_warnings(*expected):
        config = peft.LoraConfig(
            r=RANK, target_modules=["embed_tokens", "lm_head"], init_lora_weights=how, **fields
        )
        adapted = peft.get_peft_model(model, config)
    lookup, head = adapted.base_model.model.model.embed_tokens, adapted.base_model.model.lm_head
    weights = [layer.base_layer.weight for layer in (lookup, head)]
    assert weights[0].data_ptr() == weights[1].data_ptr()
    assert lookup.lora_embedding_B["default"].data_ptr() != head.lora_A["default"].weight.data_ptr()
    assert not lookup.lora_embedding_A["default"].any()
    with torch.no_grad():
        distance = far(adapted(tokens).logits, before)
    if how == "orthogonal":
        assert torch.equal(weights[0], table)
        assert distance < 1e-5
        return
    assert distance > 0.2
    # One pair for both uses, as a tied table has it here, gives the model itself.
    a, b, residual = from_weight(how, table.numpy().T, RANK, config.lora_alpha / RANK, None)
    np.testing.assert_allclose(residual, weights[0].detach().numpy().T, atol=1e-5)
    restored = residual + config.lora_alpha / RANK * (a @ b)
    np.testing.assert_allclose(restored, table.numpy().T, atol=1e-5)


# PEFT's orthogonal factors


def test_orthogonal():
    """The same distribution; the product is zero and the base unchanged."""
    torch.manual_seed(3)
    rows, cols, rank = 200, 120, 8
    layer = with_peft(linear(rows, cols), "orthogonal", rank)
    a, b, base = theirs(layer)
    found = orthogonal(KEY, rows, cols, rank)
    np.testing.assert_array_equal(base, weight(rows, cols).numpy())
    for ours, expected in zip(found, (a, b), strict=True):
        assert ours.shape == expected.shape
        assert np.std(ours) == pytest.approx(np.std(expected), rel=0.2)
        assert np.linalg.matrix_rank(np.asarray(ours)) == np.linalg.matrix_rank(expected)
    assert np.abs(a @ b).max() < 1e-6
    assert np.abs(found[0] @ found[1]).max() < 1e-6


def test_orthogonal_of_the_same_numbers():
    """The same normals give the same factors, up to the signs of the square matrix's rows."""
    rows, cols, rank = 10, 6, 4
    square, left, right = jax.random.split(KEY, 3)
    keys = iter((square, left, right))

    def drawn(*shape: int) -> torch.Tensor:
        return torch.from_numpy(np.array(jax.random.normal(next(keys), shape, np.float32)))

    layer = linear(rows, cols)
    with mock.patch("torch.randn", drawn):
        expected = theirs(with_peft(layer, "orthogonal", rank))
    found = orthogonal(KEY, rows, cols, rank)
    for ours, reference in zip(found, expected, strict=False):
        np.testing.assert_allclose(ours, reference, atol=1e-6)


def test_an_odd_orthogonal_rank_is_refused():
    with pytest.raises(ValueError, match="rank to be even, got 3"):
        with_peft(linear(ROWS, COLS), "orthogonal", 3)
    with pytest.raises(ValueError, match="expected an even one"):
        orthogonal(KEY, ROWS, COLS, 3)
