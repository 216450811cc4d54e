"""`kvbench capture`: what a model's attention was given, with where it is from, in the form that everything reads."""
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from kvbench import cli, data
from kvbench.data import make
from kvbench.evaluate import capture, models
from kvbench.reference import attention
from strategies.models import TEXT, save_tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return models.load(str(folder))


def test_captures_are_what_attention_was_given(model):
    """Attention in float64 on the captured tensors is the output of the model's own attention, to float16 rounding."""
    seen = []
    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
             for layer in model.network.model.layers]
    text = models.Text("words", TEXT)
    layers = capture.capture(model, text, 48, [1, 0], "a test")
    for hook in hooks:
        hook.remove()
    assert model.network.config._attn_implementation == "sdpa", "the model is left as it was"
    for captured, output in zip(layers, reversed(seen)):
        assert captured.keys.shape == captured.values.shape == (1, 2, 48, 32)
        assert captured.positions.tolist() == [0, 1, 2, 3, 4, 5, 45, 46, 47]
        for row, position in enumerate(captured.positions):
            part = [x[:, :, :position + 1].astype(np.float64) for x in (captured.keys, captured.values)]
            expected, _ = attention.decode(captured.queries[:, :, row].astype(np.float64), *part)
            # Three tensors rounded to 2^-11 of numbers up to about 30: logits move by less than 0.05.
            np.testing.assert_allclose(output[0, position].numpy().reshape(4, 32), expected[0], rtol=0,
                                       atol=0.06 * np.abs(part[1]).max())
        assert captured.metadata["layer"] in captured.source and captured.metadata["text_sha256"] == text.sha256


def test_the_command_writes_files_that_every_reader_takes(folder, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ["capture", "--model", str(folder), "--text", str(tmp_path / "text.txt"), "--tokens", "64",
                 "--layers", "0,1", "--out", str(tmp_path / "kv.safetensors")]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert "\r" not in printed.err
    for layer in (0, 1):
        path = tmp_path / f"kv_layer{layer:02d}.safetensors"
        assert path.name in printed.out
        captured = capture.read(path)
        assert captured.metadata["layer"] == str(layer) and captured.metadata["tokens"] == "64"
        assert captured.metadata["text"] == "text.txt" and str(folder) in captured.metadata["made_with"]
        part = make.cut(load_file(path), 1, 60, 4)                  # what ships a sample
        assert np.array_equal(part["keys"], captured.keys[:, 1:])
    assert not list(tmp_path.glob(".*")), "no part of a file is left"
    assert cli.main([*arguments[:-4], "--out", str(tmp_path / "one.safetensors")]) == 0
    assert capture.read(tmp_path / "one.safetensors").metadata["layer"] == "1", "the middle one of two"


@given(st.integers(1, 3000))
def test_query_positions_are_ascending_and_end_the_text(tokens):
    positions = capture.query_positions(tokens)
    assert positions.dtype == np.int32 and (np.diff(positions) > 0).all()
    assert positions[0] == 0 and positions[-1] == tokens - 1


def test_a_long_text_keeps_its_first_eighth_and_last_sixteenth():
    assert np.array_equal(capture.query_positions(8192), np.r_[0:1024, 7680:8192])


def small(**changes):
    rng = np.random.default_rng(0)
    tensors = {"keys": rng.standard_normal((1, 2, 9, 8)), "values": rng.standard_normal((1, 2, 9, 8)),
               "queries": rng.standard_normal((1, 4, 3, 8))}
    return {name: x.astype(np.float16) for name, x in tensors.items()} \
        | {"query_positions": np.array([2, 7, 8], np.int32)} | changes


@pytest.mark.parametrize("changes", [
    {"keys": np.zeros((2, 2, 9, 8), np.float16)}, {"queries": np.zeros((1, 3, 3, 8), np.float16)},
    {"queries": np.zeros((1, 4, 2, 8), np.float16)}, {"query_positions": np.array([2, 7, 9], np.int32)},
    {"query_positions": np.array([7, 2, 8], np.int32)}, {"values": np.zeros((1, 2, 9, 8), np.float32)},
])
def test_files_that_are_no_captures_are_refused(tmp_path, changes):
    path = tmp_path / "kv.safetensors"
    save_file(small(), path)
    assert capture.read(path).keys.shape == (1, 2, 9, 8)
    save_file(small(**changes), path)
    with pytest.raises(ValueError, match="kv.safetensors: not a capture"):
        capture.read(path)
    for content in (b"", b"no safetensors", json.dumps({}).encode()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="kv.safetensors: not a capture"):
            capture.read(path)


def test_the_shipped_sample_is_a_capture():
    sample = capture.sample()
    assert np.array_equal(sample.keys, data.sample().keys) and len(sample.positions) == sample.queries.shape[2]


@pytest.mark.parametrize("arguments, message", [
    (["--tokens", "9999"], "expected at least 9999 tokens"), (["--layers", "7"], "expected 0 to 1, got 7"),
    (["--text", "/nonexistent"], "cannot read '/nonexistent'"), (["--dtype", "int4"], "got 'int4'"),
])
def test_wrong_wishes_are_refused(folder, tmp_path, capsys, arguments, message):
    (tmp_path / "text.txt").write_text(TEXT)
    given = ["capture", "--model", str(folder), "--text", str(tmp_path / "text.txt"), "--tokens", "16", "--out",
             str(tmp_path / "kv.safetensors")]
    assert cli.main(given + arguments) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "kv.safetensors").exists()


def test_models_that_are_not_there_are_refused(capsys, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="expected smollm2, a GGUF file or a folder"):
        models.load(str(tmp_path / "nothing"))
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["capture", "--model", "smollm2", "--out", str(tmp_path / "kv.safetensors")]) == 2
    assert "pip install 'kvbench[eval]'" in capsys.readouterr().err


def test_the_shipped_text_is_plain_english():
    text = models.read_text(None)
    assert text.title == models.TEXT_TITLE and len(text.content.split()) > 7000
    assert "poet" in text.content and all(ord(letter) < 0x3000 for letter in text.content)


@pytest.mark.models
def test_smollm2_captures_are_those_of_the_shipped_sample():
    """Another text, but the same layer and head: channels are as large as the sample's, and those of others are not."""
    model = models.load("smollm2")
    captured, = capture.capture(model, models.read_text(None), 512, [22], "a test")
    sample = np.sqrt(np.mean(data.sample().keys[0, 0].astype(np.float64) ** 2, axis=0))
    likeness = [np.corrcoef(np.sqrt(np.mean(head.astype(np.float64) ** 2, axis=0)), sample)[0, 1]
                for head in captured.keys[0]]
    assert captured.keys.shape == (1, 3, 512, 64) and captured.queries.shape[1] == 9
    assert likeness[1] > 0.7 and max(likeness[0], likeness[2]) < 0.3, likeness
