"""The cache for `generate` of transformers: the exact preset gives the library's own tokens, and nothing is wrong in
silence.  Models are tiny and random; tokens are compared in float32, where two ways of the same sum differ by far less
than the logits of two tokens."""
import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvbench import caches, ops  # noqa: E402
from kvbench.errors import CapacityError  # noqa: E402
from kvbench.evaluate import chunks  # noqa: E402
from kvbench.integrations import transformers as integration  # noqa: E402
from kvbench.integrations.transformers import KVBenchCache  # noqa: E402

SIZES = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, max_position_embeddings=128,
             tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=None)
# name -> (configuration class, what differs): other groups, head sizes, rotary pairs and parts, biases, mixed layers.
ARCHITECTURES = {
    "llama": ("LlamaConfig", dict(num_attention_heads=4, num_key_value_heads=2, head_dim=32)),
    "glm": ("GlmConfig", dict(num_attention_heads=4, num_key_value_heads=1, head_dim=24, partial_rotary_factor=0.5)),
    "stablelm": ("StableLmConfig", dict(num_attention_heads=2, num_key_value_heads=2, partial_rotary_factor=0.25)),
    "qwen2": ("Qwen2Config", dict(num_attention_heads=8, num_key_value_heads=2, use_sliding_window=True,
                                  sliding_window=8, max_window_layers=1)),
}
NEW = 10


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_model(name, **changes):
    kind, own = ARCHITECTURES[name]
    torch.manual_seed(5)
    config = getattr(transformers, kind)(**{**SIZES, **own, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():                       # the layers of a fresh model hardly change what it repeats
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(8)
    return model


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="module")
def llama():
    return make_model("llama")


def prompt(batch=1, tokens=17, seed=0):
    return torch.randint(2, SIZES["vocab_size"], (batch, tokens), generator=torch.Generator().manual_seed(seed))


def left_padded(tokens=17, lengths=(17, 9, 14)):
    ids = prompt(len(lengths), tokens)
    mask = torch.stack([torch.arange(tokens) >= tokens - length for length in lengths]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def stock(model, **inputs):
    model.set_attn_implementation("sdpa")
    return model.generate(**inputs)


GREEDY = dict(max_new_tokens=NEW, do_sample=False)


# ---- the library's own tokens

@pytest.mark.parametrize("options", [{}, dict(sinks=2, tail=5)])
def test_generate_gives_the_tokens_of_stock_transformers(model, options):
    inputs = {"input_ids": prompt(), **GREEDY}
    cache = KVBenchCache(model, "exact", **options)
    tokens = model.generate(**inputs, past_key_values=cache)
    assert cache.packed and all(len(packed) == 17 + NEW - 1 for packed in cache.packed)
    assert torch.equal(tokens, stock(model, **inputs))
    assert len(set(tokens[0, 17:].tolist())) > 2, "a model that repeats itself would hide differences"


def test_padded_batches_give_the_tokens_of_stock_transformers(model):
    inputs = {**left_padded(), **GREEDY}
    cache = KVBenchCache(model, "exact", tail=3)
    tokens = model.generate(**inputs, past_key_values=cache)
    assert torch.equal(tokens, stock(model, **inputs))
    assert cache.packed[0].lengths.tolist() == [length + NEW - 1 for length in (17, 9, 14)], "padding is not stored"


def test_padding_would_be_ignored_without_the_mask_interface(llama, monkeypatch):
    """Why the name is registered twice: this must be able to fail."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    inputs = {**left_padded(), **GREEDY}
    expected = stock(llama, **inputs)
    monkeypatch.delitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, integration.ATTENTION)
    assert not torch.equal(llama.generate(**inputs, past_key_values=KVBenchCache(llama, "exact")), expected)


def test_beam_search_reorders_the_cache(llama):
    inputs = {**left_padded(), **GREEDY, "num_beams": 3}
    cache = KVBenchCache(llama, "exact", sinks=1, tail=4)
    assert torch.equal(llama.generate(**inputs, past_key_values=cache), stock(llama, **inputs))


def test_a_large_exact_tail_makes_every_preset_exact(llama):
    inputs = {**left_padded(), **GREEDY}
    cache = KVBenchCache(llama, "turboquant", centred=False, tail=64)
    assert torch.equal(llama.generate(**inputs, past_key_values=cache), stock(llama, **inputs))


def logits_of(model, cache, *parts, mask=None):
    found, seen = [], 0
    with torch.no_grad():
        for part in parts:
            seen += part.shape[1]
            known = {} if mask is None else {"attention_mask": mask[:, :seen]}
            found.append(model(input_ids=part, past_key_values=cache, **known).logits)
    return torch.cat(found, dim=1)


@given(st.integers(1, 16), st.integers(1, 5), st.booleans())
@settings(max_examples=6)
def test_a_prompt_in_parts_gives_the_logits_of_stock_transformers(llama, first, second, padded):
    inputs = left_padded() if padded else {"input_ids": prompt(2), "attention_mask": None}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    parts = ids.split([first, *[second] * ((17 - first) // second), (17 - first) % second], dim=1)
    llama.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = llama(input_ids=ids, attention_mask=mask).logits
    cache = KVBenchCache(llama, "exact", sinks=2, tail=3)
    found = logits_of(llama, cache, *(part for part in parts if part.shape[1]), mask=mask)
    real = slice(None) if mask is None else mask.bool()
    # Two float32 ways of one sum, through two layers.
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-3)


def test_copies_and_reset_caches_go_on_as_the_original(llama):
    ids = prompt()
    cache = KVBenchCache(llama, "turboquant", sinks=1, tail=2)
    first = logits_of(llama, cache, ids[:, :12])
    twin = copy.deepcopy(cache)
    rest = logits_of(llama, cache, ids[:, 12:])
    assert torch.equal(logits_of(llama, twin, ids[:, 12:]), rest)
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.packed
    assert torch.equal(logits_of(llama, cache, ids[:, :12]), first)
    assert torch.equal(logits_of(llama, cache, ids[:, 12:]), rest)


def test_sequences_can_be_chosen_and_repeated(llama):
    inputs = left_padded()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = KVBenchCache(llama, "turboquant", sinks=1, tail=2)
    logits_of(llama, cache, ids, mask=mask)
    expected = copy.deepcopy(cache)
    cache.batch_repeat_interleave(2)
    assert cache.packed[0].lengths.tolist() == [17, 17, 9, 9, 14, 14]
    cache.batch_select_indices(torch.tensor([0, 2, 4]))
    mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    step = ids[:, -1:]
    with torch.no_grad():
        a, b = (llama(input_ids=step, attention_mask=mask, past_key_values=c).logits for c in (cache, expected))
    assert torch.equal(a, b)


# ---- compressed

def test_padding_never_reaches_the_codes(llama):
    """Every sequence of a padded batch holds the very codes that it holds alone: no group, mean or sink has padding."""
    inputs = left_padded()
    cache = KVBenchCache(llama, "turboquant", sinks=2, tail=3)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)            # as `generate` counts them
    with torch.no_grad():
        llama(**inputs, position_ids=positions, past_key_values=cache)
    for i, length in enumerate((17, 9, 14)):
        alone = KVBenchCache(llama, "turboquant", sinks=2, tail=3)
        logits_of(llama, alone, inputs["input_ids"][i:i + 1, 17 - length:])
        for packed, expected in zip(cache.packed, alone.packed):
            for found, wanted in zip(packed.stored(i), expected.stored()):
                # Keys differ by rounding, and a coordinate next to a decision may then get another code; a mean or a
                # scale with padding in it would change every vector.
                same = np.abs(found - wanted).max(axis=2) < 1e-2 * np.abs(wanted).max()
                assert found.shape == wanted.shape and same.mean() > 0.9


def test_every_layer_counts_all_tokens_and_holds_few_bytes(llama):
    ids = prompt(tokens=90)
    cache = KVBenchCache(llama, "turboquant", key_bits=2, value_bits=2, sinks=0, tail=0)
    for tokens in (80, 81, 82):
        logits_of(llama, cache, ids[:, cache.get_seq_length():tokens])
        assert [cache.get_seq_length(layer) for layer in range(2)] == [tokens] * 2
    # 2 bits and a float16 scale, and one float32 mean per head, of 32 numbers.
    assert cache.bits_per_element == pytest.approx(2 + 16 / 32 + 0.5 * 32 / 82)
    assert cache.nbytes_used == round(cache.bits_per_element * 2 * 2 * 2 * 82 * 32 / 8) < cache.nbytes


def test_decoding_goes_through_the_packed_operator(llama, monkeypatch):
    cache = KVBenchCache(llama, "turboquant", sinks=0, tail=0)
    logits_of(llama, cache, prompt())
    calls = []
    packed = ops.turboquant.decode_attention
    monkeypatch.setattr(ops.turboquant, "decode_attention", lambda *a, **k: calls.append(1) or packed(*a, **k))
    logits_of(llama, cache, prompt(tokens=1))
    assert len(calls) == 2, "one call per layer and token"


@given(st.sampled_from(["exact", "turboquant"]), st.integers(0, 30), st.integers(0, 20), st.integers(1, 30),
       st.integers(1, 40))
@settings(max_examples=25)
def test_chunks_are_what_single_steps_give(preset, sinks, tail, past, new):
    generator = torch.Generator().manual_seed(sinks + 100 * tail)
    keys, values = torch.randn(2, 1, 2, past + new, 32, generator=generator)
    queries = torch.randn(1, 6, past + new, 32, generator=generator)
    cache = caches.PRESETS[preset].function(1, 2, 6, 32, capacity=80, sinks=sinks, tail=tail, dtype="float32")
    cache.append(keys[:, :, :past], values[:, :, :past])
    single = copy.deepcopy(cache)
    found = chunks.attend(cache, queries[:, :, past:], keys[:, :, past:], values[:, :, past:], 0.3)
    for i in range(past, past + new):
        single.append(keys[:, :, i:i + 1], values[:, :, i:i + 1])
        expected = single.attend(queries[:, :, i].contiguous(), scale=0.3)
        # Decoded keys are float16 of up to 8: a logit moves by 2^-11 |q| |k| scale < 0.03, a value by 2^-11 of it.
        torch.testing.assert_close(found[:, i - past], expected, rtol=0, atol=0.06 if preset != "exact" else 1e-5)
    for a, b in zip(cache.stored(), single.stored()):
        np.testing.assert_array_equal(a, b)


# ---- refused

def test_lost_handles_are_refused(llama, monkeypatch):
    """A model that changes keys after `update` must not attend to its new token alone."""
    update = integration.PackedLayer.update
    monkeypatch.setattr(integration.PackedLayer, "update",
                        lambda self, k, v, *rest, **more: (update(self, k, v)[0].clone(), v))
    cache = KVBenchCache(llama, "exact")
    ids = prompt(2)
    with torch.no_grad():
        llama(input_ids=ids, past_key_values=cache)
        with pytest.raises(RuntimeError, match="never stored|not those that the cache returned"):
            llama(input_ids=ids[:, :1], past_key_values=cache)


def test_keys_without_a_handle_must_be_all_there_are():
    module, x = torch.nn.Module(), torch.zeros(1, 2, 1, 8)
    with pytest.raises(RuntimeError, match="not those that the cache returned"):
        integration._attend(module, x, x, x, torch.ones(1, 1, 1, 5, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="not those that the cache returned"):
        integration._attend(module, x, x, x, None, position_ids=torch.tensor([[4]]))
    assert integration._attend(module, x, x, x, None, position_ids=torch.tensor([[0]]))[0].shape == (1, 1, 2, 8)


def test_masks_of_another_meaning_are_refused(llama):
    ids = prompt(2)
    right = torch.ones_like(ids)
    right[0, -3:] = 0
    hole = torch.ones_like(ids)
    hole[1, 5] = 0
    every, biased = torch.zeros(2, 1, 17, 17), torch.full((2, 1, 17, 17), -0.5)
    for mask, message in ((right, "causal attention"), (hole, "causal attention"), (every, "causal attention"),
                          (biased, "boolean mask")):
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            llama(input_ids=ids, attention_mask=mask, past_key_values=KVBenchCache(llama, "exact"))


def test_additive_masks_are_read_as_boolean_ones(llama):
    """Models of older releases make them; whatever is masked out weighs exp(-3e38)."""
    ids = prompt()
    mask = torch.full((1, 1, 17, 17), torch.finfo(torch.float32).min).triu(1)
    with torch.no_grad():
        found = llama(input_ids=ids, attention_mask=mask, past_key_values=KVBenchCache(llama, "exact")).logits
    torch.testing.assert_close(found, logits_of(llama, KVBenchCache(llama, "exact"), ids), rtol=1e-4, atol=1e-3)


def test_padding_must_stay_the_same(llama):
    inputs = left_padded()
    cache = KVBenchCache(llama, "exact")
    logits_of(llama, cache, inputs["input_ids"], mask=inputs["attention_mask"])
    with torch.no_grad(), pytest.raises(ValueError, match=r"expected padding up to \[0, 8, 3\]"):
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        mask[0, 0] = 0
        llama(input_ids=inputs["input_ids"][:, -1:], attention_mask=mask, past_key_values=cache)
    other = KVBenchCache(llama, "exact")
    logits_of(llama, other, prompt(2))
    with torch.no_grad(), pytest.raises(ValueError, match="batch of 2"):
        llama(input_ids=prompt(3)[:, :1], past_key_values=other)


@pytest.mark.parametrize("options, message", [
    (dict(preset="turboquan"), "unknown preset 'turboquan'; did you mean turboquant"),
    (dict(preset="turboquant", key_bit=3), "no option 'key_bit'; did you mean key_bits"),
])
def test_wrong_options_name_the_nearest(llama, options, message):
    with pytest.raises(ValueError, match=message):
        KVBenchCache(llama, **options)


def test_what_packed_attention_cannot_do_is_refused(llama):
    cache = KVBenchCache(llama, "exact", capacity=20)
    logits_of(llama, cache, prompt())
    for call in (cache.layers[0].offload, cache.layers[0].prefetch, lambda: cache.layers[0].crop(-1)):
        with pytest.raises(NotImplementedError, match="KVBenchCache"):
            call()
    assert not cache.layers[0].is_croppable and not cache.is_compileable and cache.layers[0].get_max_length() == 20
    with pytest.raises(CapacityError, match="capacity 20"):
        logits_of(llama, cache, prompt(tokens=4))
    query, keys, values = torch.zeros(1, 4, 1, 32), torch.zeros(1, 2, 1, 32), torch.zeros(1, 2, 1, 32)
    handle, _ = KVBenchCache(llama, "exact").layers[0].update(keys, values)
    for options, message in ((dict(dropout=0.1), "dropout"), (dict(softcap=30.0), "softcap"),
                             (dict(output_attentions=True), "output_attentions")):
        with pytest.raises(ValueError, match=message):
            integration._attend(torch.nn.Module(), query, handle, values, None, **options)
    handle, _ = KVBenchCache(llama, "exact").layers[0].update(keys.requires_grad_(), values)
    with pytest.raises(ValueError, match="gradients"):
        integration._attend(torch.nn.Module(), query, handle, values, None)


def test_layers_without_attention_are_refused(llama):
    class Config:
        layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="linear_attention"):
        integration._layer_kinds(Config)
