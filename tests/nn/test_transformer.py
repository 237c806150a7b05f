from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformer_oracle import OracleTransformer

from cvmk import ops
from cvmk.config.schema import ModelConfig
from cvmk.errors import ConfigError
from cvmk.nn import CVMTransformer, count_parameters
from cvmk.nn.mixers import build_mixer, mixer_names

PAD, BOS, EOS, VOCAB = 0, 2, 3, 23
SMALL = {"d_model": 16, "ffn": 24, "heads": 4, "encoder_layers": 2, "decoder_layers": 2, "max_length": 32}
VARIANTS = [
    {},
    {"norm": "rmsnorm", "positions": "rotary", "activation": "swiglu", "kv_heads": 2, "bias": False},
    {"activation": "gelu", "kv_heads": 1, "tie_embeddings": False, "encoder_layers": 3, "decoder_layers": 1},
    {"positions": "rotary", "rotary_base": 500.0, "norm_eps": 1e-3},
    {"norm": "rmsnorm", "tie_embeddings": False, "bias": True},
]


def make(seed: int = 0, **options: object) -> CVMTransformer:
    """A float64 model in evaluation mode whose biases and norms are not at their neutral initial values."""
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float64)
    try:
        model = CVMTransformer(ModelConfig(**{**SMALL, **options}), VOCAB).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def padded(rows: list[list[int]]) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])


SRC = [[5, 6, 7, 8, EOS], [9, EOS], [10, 11, 4, 12, 13, 14, EOS]]
TGT = [[BOS, 5, 5, 9], [BOS, 20, 21, 22, 4, 6], [BOS]]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_forward_agrees_with_the_numpy_oracle(options: dict) -> None:
    model = make(**options)
    oracle = OracleTransformer({name: value.numpy() for name, value in model.state_dict().items()}, model.config)
    with torch.no_grad():
        logits, hidden, maps = model(padded(SRC), padded(TGT), return_hidden=True, return_attention=True)
    assert hidden is not None and maps is not None
    for row, (src, tgt) in enumerate(zip(SRC, TGT, strict=True)):
        expected = oracle(src, tgt)
        s, t = len(src), len(tgt)
        np.testing.assert_allclose(logits[row, :t].numpy(), expected["logits"], atol=1e-10)
        for name, states, length in (("encoder", hidden.encoder, s), ("decoder", hidden.decoder, t)):
            assert len(states) == len(expected[name])
            for state, want in zip(states, expected[name], strict=True):
                np.testing.assert_allclose(state[row, :length].numpy(), want, atol=1e-10)
        for name, found, queries, keys in (("encoder", maps.encoder, s, s), ("decoder", maps.decoder, t, t), ("cross", maps.cross, t, s)):
            assert len(found) == len(expected[f"{name}_maps"])
            for attention, want in zip(found, expected[f"{name}_maps"], strict=True):
                weights = attention.probabilities()[row]
                np.testing.assert_allclose(weights[:, :queries, :keys].numpy(), want, atol=1e-10)
                assert not weights[:, :queries, keys:].any()


def test_nothing_extra_unless_asked_for() -> None:
    model = make()
    _, hidden, maps = model(padded(SRC), padded(TGT))
    assert hidden is None and maps is None


@pytest.mark.parametrize("options", VARIANTS[:3], ids=str)
def test_a_loss_may_be_computed_without_logits(options: dict) -> None:
    """`forward_features` gives what the output layer reads, and all else that forward gives."""
    model, teacher = make(**options), make(1, **options)
    src, tgt, target = padded(SRC), padded(TGT), torch.randint(4, VOCAB, (3, 6))
    logits, hidden, maps = model(src, tgt, return_hidden=True, return_attention=True)
    features, same, as_well = model.forward_features(src, tgt, return_hidden=True, return_attention=True)
    assert torch.equal(model.embeddings.logits(features), logits) and len(as_well.cross) == len(maps.cross)
    assert all(torch.equal(a, b) for a, b in zip(same.encoder + same.decoder, hidden.encoder + hidden.decoder, strict=True))
    assert model.forward_features(src, tgt)[1:] == (None, None)
    with torch.no_grad():
        theirs = teacher.forward_features(src, tgt)[0]
    matrix, options_ = model.embeddings.output_matrix, {"alpha": 0.4, "temperature": 2.0}
    fused = ops.linear_kd_loss(features, matrix, theirs, teacher.embeddings.output_matrix.detach(), target, **options_)
    plain = ops.kd_loss(logits, teacher.embeddings.logits(theirs).detach(), target, **options_)
    torch.testing.assert_close(fused, plain, atol=1e-12, rtol=0)
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(fused, parameters), torch.autograd.grad(plain, parameters), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_steps_equal_the_full_forward(options: dict) -> None:
    model = make(**options)
    src, tgt = padded(SRC), torch.randint(4, VOCAB, (3, 9))
    with torch.inference_mode():
        full = model(src, tgt)[0]
        state = model.start(model.encode(src), max_length=9)
        steps = torch.stack([model.step(tgt[:, t], state) for t in range(9)], dim=1)
        state = model.start(model.encode(src), max_length=12)
        chunks = torch.cat([model.extend(tgt[:, a:b], state) for a, b in ((0, 1), (1, 4), (4, 9))], dim=1)
    torch.testing.assert_close(steps, full, atol=1e-10, rtol=0)
    torch.testing.assert_close(chunks, full, atol=1e-10, rtol=0)


def test_memory_knows_whether_it_is_padded() -> None:
    model, src = make(), padded(SRC)
    with torch.inference_mode():
        assert model.encode(src).padded and not model.encode(src[2:]).padded
        assert model.encode(src).select(torch.tensor([2])).padded
        state = model.start(model.encode(src[2:]), max_length=2)
        torch.testing.assert_close(model.step(torch.tensor([BOS]), state), model(src[2:], torch.tensor([[BOS]]))[0][:, 0], atol=1e-10, rtol=0)


def test_unfilled_cache_is_never_read() -> None:
    model = make(positions="rotary", kv_heads=2)
    src, tgt = padded(SRC), torch.randint(4, VOCAB, (3, 6))
    with torch.inference_mode():
        state = model.start(model.encode(src), max_length=20)
        for mixer in state.mixers:
            for name in mixer.layout:
                mixer[name].fill_(float("nan"))
        steps = torch.stack([model.step(tgt[:, t], state) for t in range(6)], dim=1)
        full = model(src, tgt)[0]
    torch.testing.assert_close(steps, full, atol=1e-10, rtol=0)


@pytest.mark.parametrize("options", VARIANTS[:2], ids=str)
def test_state_reorder_and_select_follow_the_hypotheses(options: dict) -> None:
    """Three sentences with two hypotheses each: rows swap and copy inside a sentence, then a sentence leaves."""
    model, copies = make(**options), 2
    src, generator = padded(SRC), torch.Generator().manual_seed(3)
    histories = [[BOS] for _ in range(6)]
    sentences = [0, 1, 2]
    with torch.inference_mode():
        state = model.start(model.encode(src), max_length=8, copies=copies)
        for t in range(7):
            logits = model.step(torch.tensor([history[-1] for history in histories]), state)
            for row, history in enumerate(histories):
                sentence = sentences[row // copies]
                want = model(src[sentence : sentence + 1], torch.tensor([history]))[0][0, -1]
                torch.testing.assert_close(logits[row], want, atol=1e-10, rtol=0)
            rows = [b * copies + int(torch.randint(copies, (), generator=generator)) for b in range(len(sentences)) for _ in range(copies)]
            state.reorder(torch.tensor(rows))
            histories = [[*histories[row], int(torch.randint(4, VOCAB, (), generator=generator))] for row in rows]
            if t == 3:
                state.select(torch.tensor([2, 0]))
                sentences = [2, 0]
                histories = histories[4:6] + histories[0:2]
                assert state.rows == 4


def test_padding_does_not_reach_the_sentence() -> None:
    model = make()
    wide = torch.cat((padded(SRC), torch.full((3, 6), PAD)), dim=1)
    longer_tgt = torch.cat((padded(TGT), torch.full((3, 4), PAD)), dim=1)
    with torch.no_grad():
        narrow_logits, wide_logits = model(padded(SRC), padded(TGT))[0], model(wide, longer_tgt)[0]
    for row, tgt in enumerate(TGT):
        torch.testing.assert_close(wide_logits[row, : len(tgt)], narrow_logits[row, : len(tgt)], atol=1e-12, rtol=0)


def test_row_of_padding_only_and_empty_batch() -> None:
    model = make().train()
    src = torch.cat((padded(SRC), torch.zeros(1, 7, dtype=torch.long)))
    tgt = padded([*TGT, [PAD]])
    logits, _, maps = model(src, tgt, return_attention=True)
    logits.square().sum().backward()
    assert logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert not maps.cross[0].probabilities()[3].any()
    empty = model(src[:0], tgt[:0])[0]
    assert empty.shape == (0, 6, VOCAB)
    with torch.inference_mode():
        state = model.start(model.encode(src[:0]), max_length=4, copies=3)
        assert model.step(torch.zeros(0, dtype=torch.long), state).shape == (0, VOCAB)


def test_tied_and_untied_embeddings_count() -> None:
    tied, untied = make(), make(tie_embeddings=False)
    assert count_parameters(untied) - count_parameters(tied) == 2 * VOCAB * 16
    assert [name for name in tied.state_dict() if name.startswith("embeddings")] == ["embeddings.source"]
    assert sorted(name for name in untied.state_dict() if name.startswith("embeddings")) == ["embeddings.output", "embeddings.source", "embeddings.target"]


def test_parameter_count_by_hand() -> None:
    d, f, v = 16, 24, VOCAB
    attention, ffn, norm = 4 * (d * d + d), 2 * d * f + d + f, 2 * d
    assert count_parameters(make()) == v * d + 2 * (attention + ffn + 2 * norm) + 2 * (2 * attention + ffn + 3 * norm) + 2 * norm


def test_initial_logits_are_calm() -> None:
    """At the start the loss is near ln(V), and the residual stream does not grow with depth."""
    torch.manual_seed(0)
    config = ModelConfig(d_model=64, ffn=128, heads=4, encoder_layers=6, decoder_layers=6)
    model = CVMTransformer(config, 1000).eval()
    src, tgt = torch.randint(4, 1000, (8, 12)), torch.randint(4, 1000, (8, 10))
    with torch.no_grad():
        logits, hidden, _ = model(src, tgt, return_hidden=True)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(4, 1000, (80,)))
    assert abs(loss.item() - np.log(1000)) < 1.0
    assert hidden.decoder[-1].std() < 2 * hidden.decoder[0].std()


@pytest.mark.parametrize("options", VARIANTS[:2], ids=str)
def test_bfloat16_autocast_and_bfloat16_weights(options: dict) -> None:
    model = make(**options).float()
    src, tgt = padded(SRC), padded(TGT)
    exact = model(src, tgt)[0]
    with torch.autocast("cpu", torch.bfloat16):
        logits, _, maps = model(src, tgt, return_attention=True)
        logits.float().logsumexp(-1).sum().backward()
    scale = exact.abs().max()
    assert logits.dtype == torch.bfloat16 and (logits.float() - exact).abs().max() < 0.1 * scale
    assert maps.encoder[0].probabilities().dtype == torch.float32
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    half = copy.deepcopy(model).bfloat16()
    with torch.inference_mode():
        assert (half(src, tgt)[0].float() - exact).abs().max() < 0.1 * scale
        state = half.start(half.encode(src), max_length=4)
        assert (half.step(tgt[:, 0], state).float() - exact[:, 0]).abs().max() < 0.1 * scale


def test_too_long_is_an_error_that_names_the_limit() -> None:
    model = make()
    long = torch.full((1, 33), 5)
    for src, tgt in ((long, long[:, :4]), (long[:, :4], long)):
        with pytest.raises(ConfigError, match=r"33 tokens.*model\.max_length = 32"):
            model(src, tgt)
    memory = model.encode(long[:, :4])
    with pytest.raises(ConfigError, match=r"model\.max_length"):
        model.start(memory, max_length=33)
    state = model.start(memory, max_length=1)
    with torch.inference_mode():
        model.step(torch.tensor([BOS]), state)
        with pytest.raises(ValueError, match="room for 1"):
            model.step(torch.tensor([5]), state)
        with pytest.raises(ValueError, match="2 rows"):
            model.step(torch.tensor([5, 6]), state)


def test_dropout_only_in_training() -> None:
    model = make(dropout=0.3, attention_dropout=0.3)
    src, tgt = padded(SRC), padded(TGT)
    assert torch.equal(model(src, tgt)[0], model(src, tgt)[0])
    model.train()
    assert not torch.equal(model(src, tgt)[0], model(src, tgt)[0])


def test_mixers_repeat_and_unknown_ones_are_named() -> None:
    assert mixer_names(["a", "b"], 5) == ["a", "b", "a", "b", "a"]
    with pytest.raises(ValueError, match="no mixer 'mamba9'.*attention"):
        build_mixer("mamba9", ModelConfig(), causal=True)


def test_compiles_as_one_graph() -> None:
    model = make(positions="rotary", kv_heads=2, norm="rmsnorm", activation="swiglu", bias=False, encoder_layers=1, decoder_layers=1).float()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for s, t in ((5, 4), (7, 6)):
        src, tgt = torch.randint(4, VOCAB, (3, s)), torch.randint(4, VOCAB, (3, t))
        src[0, -2:] = PAD
        logits = compiled(src, tgt)[0]
        torch.testing.assert_close(logits, model(src, tgt)[0], atol=1e-5, rtol=1e-5)
        logits.sum().backward()
