"""Decoding and encoding piece by piece: whatever the pieces and wherever the rows stand, what comes out is that of whole sequences."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import safetensors.torch
import torch
from mixer_models import VOCAB, Make
from torch import Tensor

from cvmk.errors import ConfigError, DataError
from cvmk.nn import CVMTransformer, DecoderState, EncoderState

PAD, BOS, EOS = 0, 2, 3
KINDS: list[dict[str, Any]] = [
    {},
    {"positions": "rotary", "kv_heads": 2, "norm": "rmsnorm", "activation": "swiglu", "bias": False},
    {"mixers": ("running",), "positions": "none"},
    {"mixers": ("running", "attention"), "positions": "rotary"},
    {"mixers": ("hyena",), "positions": "none", "d_model": 64},
    {"mixers": ("retnet",), "positions": "none"},
    {"mixers": ("mamba",), "positions": "none", "d_model": 64},
    {"mixers": ("mamba2", "attention"), "positions": "none", "d_model": 64},
    {"mixers": ("rwkv",), "positions": "none", "d_model": 64},  # as of ssru, of exp and tanh
    {"mixers": ("ssru",), "positions": "none", "d_model": 64},  # PyTorch's sigmoid has the same bits wherever a number stands in whole vectors
]
kinds = pytest.mark.parametrize("options", KINDS, ids=["attention", "rotary", "running", "hybrid", "hyena", "retnet", "mamba", "mamba2", "rwkv", "ssru"])


def sources(*lengths: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    src = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in enumerate(lengths):
        src[row, :length] = torch.randint(4, VOCAB, (length,), generator=generator)
    return src


def targets(rows: int, length: int) -> Tensor:
    tokens = torch.randint(4, VOCAB, (rows, length), generator=torch.Generator().manual_seed(8))
    tokens[:, 0] = BOS
    return tokens


def spoil(state: DecoderState | EncoderState) -> None:
    """NaN wherever nothing is written yet and what is written must be all that is read."""
    encoded = [state.encoded] if isinstance(state, EncoderState) else []
    for mixer in (*state.mixers, *encoded):
        for name, entry in mixer.layout.items():
            if entry.axis is not None:
                mixer[name].fill_(float("nan"))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)


# -- the decoder ------------------------------------------------------------------------------------------------------------------
@kinds
def test_pieces_of_any_size_equal_whole_sequences(make: Make, options: dict[str, Any]) -> None:
    model, src, tgt = make(**options), sources(5, 2, 7), targets(3, 9)
    with torch.inference_mode():
        full = model(src, tgt)[0]
        for cuts in ([*range(10)], [0, 1, 4, 9], [0, 9], [0, 0, 5, 5, 9]):
            state = model.start(model.encode(src), max_length=12)
            close(torch.cat([model.extend(tgt[:, a:b], state) for a, b in zip(cuts, cuts[1:], strict=False)], dim=1), full)
            assert state.position == 9 and state.positions.tolist() == [9, 9, 9]


@kinds
def test_rows_go_on_behind_their_own_last_token(make: Make, options: dict[str, Any]) -> None:
    """Right-padded pieces of different lengths, also none at all: each row is as it would be alone, and rows may agree again."""
    model, src, tgt = make(**options), sources(5, 2, 7), targets(3, 9)
    pieces = [[3, 1, 0], [0, 4, 2], [1, 1, 1], [5, 3, 6]]
    with torch.inference_mode():
        full = model(src, tgt)[0]
        state, at = model.start(model.encode(src), max_length=9), [0, 0, 0]
        spoil(state)
        for step, lengths in enumerate(pieces):
            tokens = torch.full((3, max(lengths) + (step == 0)), PAD)
            for row, length in enumerate(lengths):
                tokens[row, :length] = tgt[row, at[row] : at[row] + length]
            logits = model.extend(tokens, state, torch.tensor(lengths)) if len({*lengths}) > 1 else model.extend(tokens, state)
            for row, length in enumerate(lengths):
                close(logits[row, :length], full[row, at[row] : at[row] + length])
            at = [a + length for a, length in zip(at, lengths, strict=True)]
            assert state.positions.tolist() == at
        assert at == [9, 9, 9] and state.position == 9


def test_rows_at_different_positions_have_no_common_one(make: Make) -> None:
    model = make()
    with torch.inference_mode():
        state = model.start(model.encode(sources(3, 3)), max_length=4)
        model.extend(targets(2, 2), state, torch.tensor([1, 2]))
        with pytest.raises(ValueError, match="different numbers of tokens: use positions"):
            _ = state.position
        with pytest.raises(ValueError, match="room for 4 tokens and this would be token 5"):
            model.extend(targets(2, 3), state)
        with pytest.raises(ValueError, match="lengths must be 2 numbers from 0 to 2"):
            model.extend(targets(2, 2), state, torch.tensor([1, 3]))
        assert state.positions.tolist() == [1, 2]
        model.extend(targets(2, 3), state, torch.tensor([3, 1]))  # the padding reaches beyond the room, the tokens do not
        assert state.positions.tolist() == [4, 3]


@kinds
def test_padding_at_the_end_of_the_room_overwrites_nothing(make: Make, options: dict[str, Any]) -> None:
    model, src, tgt = make(**options, max_length=8), sources(4, 4), targets(2, 8)
    with torch.inference_mode():
        full = model(src, tgt)[0]
        state = model.start(model.encode(src), max_length=8)
        spoil(state)
        model.extend(tgt[:, :7], state, torch.tensor([7, 4]))
        last = torch.stack((torch.tensor([tgt[0, 7], PAD, PAD]), tgt[1, 4:7]))
        logits = model.extend(last, state, torch.tensor([1, 3]))
        close(logits[0, :1], full[0, 7:])
        close(logits[1], full[1, 4:7])
        logits = model.extend(torch.stack((torch.zeros(1, dtype=torch.long), tgt[1, 7:])), state, torch.tensor([0, 1]))
        close(logits[1], full[1, 7:])


@kinds
def test_states_reorder_select_copy_and_join(make: Make, options: dict[str, Any]) -> None:
    """Sentences that stand at different positions in one batch, with two hypotheses each, go on as they would alone."""
    model, src = make(**options), sources(5, 2, 7)
    tgt = targets(6, 8)
    with torch.inference_mode():
        alone = []
        for row, length in enumerate((4, 2, 1)):
            state = model.start(model.encode(src[row : row + 1, : int((src[row] != PAD).sum())]), max_length=9 + row, copies=2)
            model.extend(tgt[2 * row : 2 * row + 2, :length], state)
            alone.append(state)
        state = DecoderState.join([one.copy() for one in alone])
        assert state.rows == 6 and state.max_length == 11 and state.positions.tolist() == [4, 4, 2, 2, 1, 1]

        def check(batch: DecoderState, singles: list[DecoderState], token: int) -> None:
            rows = [model.step(torch.tensor([token, token + 1]), single) for single in singles]
            close(model.step(torch.tensor([token, token + 1] * len(singles)), batch), torch.cat(rows))

        check(state, alone, 5)
        order = torch.tensor([1, 0, 2, 2, 5, 4])
        state.reorder(order)
        for row, single in enumerate(alone):
            single.reorder(order[2 * row : 2 * row + 2] - 2 * row)
        check(state, alone, 7)
        twin, twins, before = state.copy(), [single.copy() for single in alone], state.save()
        check(twin, twins, 11)
        assert all(torch.equal(tensor, before[name]) for name, tensor in state.save().items())
        check(state, alone, 9)
        state.select(torch.tensor([2, 0]))
        check(state, [alone[2], alone[0]], 13)
        state.select(torch.tensor([1]))
        assert state.position == 8
        check(state, [alone[0]], 6)


def test_only_states_that_fit_can_be_joined(make: Make) -> None:
    model, other = make(), make(heads=2)
    with torch.inference_mode():
        memory = model.encode(sources(3))
        for state in (model.start(memory, 4, copies=2), other.start(other.encode(sources(3)), 4)):
            with pytest.raises(ValueError, match="only states of one model"):
                DecoderState.join([model.start(memory, 4), state])


# -- saved and restored -----------------------------------------------------------------------------------------------------------
def through_a_file(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return safetensors.torch.load(safetensors.torch.save(tensors))


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ragged", [False, True])
def test_a_saved_decoder_goes_on_with_the_same_bits(make: Make, options: dict[str, Any], dtype: torch.dtype, ragged: bool) -> None:
    model, tgt = make(**options, dtype=dtype), targets(6, 9)
    with torch.inference_mode():
        state = model.start(model.encode(sources(5, 2, 7)), max_length=12, copies=2)
        model.extend(tgt[:, :4], state, torch.tensor([4, 4, 1, 1, 3, 3]) if ragged else None)
        state.reorder(torch.tensor([0, 0, 3, 2, 4, 5]))
        saved = state.save()
        again = model.restore_decoder(through_a_file(saved))
        assert (again.max_length, again.copies, again.positions.tolist()) == (12, 2, state.positions.tolist())
        for t in range(4, 9):
            assert torch.equal(model.step(tgt[:, t], again), model.step(tgt[:, t], state))
            again.reorder(torch.tensor([1, 0, 2, 2, 5, 4]))
            state.reorder(torch.tensor([1, 0, 2, 2, 5, 4]))
        late = model.restore_decoder(saved)  # neither the state nor what was restored has changed it
        assert torch.equal(late.save()["positions"], saved["positions"])
        assert all(torch.equal(late.save()[name], tensor) for name, tensor in saved.items())


def test_what_is_saved_holds_nothing_of_others(make: Make) -> None:
    """Neither memory that was never written nor a longer row's positions stand behind a shorter row's end."""
    model = make()
    with torch.inference_mode():
        state = model.start(model.encode(sources(3, 3)), max_length=9)
        spoil(state)
        model.extend(targets(2, 5), state, torch.tensor([1, 5]))
        saved = state.save()
    for name in ("mixers.0.keys", "mixers.0.values", "mixers.1.keys"):
        assert saved[name].shape == (2, 4, 5, 4) and saved[name].isfinite().all()
        assert not saved[name][0, :, 1:].any() and saved[name][1].any(dim=-1).all() and saved[name][0, :, 0].any()


def test_a_decoder_over_a_source_that_grows_is_saved(make: Make) -> None:
    """Its memory is a view of the encoder's, with rows that are not written to their end."""
    model = make(encoder_direction="causal", dtype=torch.float32)
    with torch.inference_mode():
        source = model.start_source(2, 7)
        spoil(source)
        model.append_source(sources(2, 1), source)
        state = model.start(model.append_source(sources(2, 1), source), 5)
        model.extend(targets(2, 2), state)
        saved = state.save()
        assert all(tensor.isfinite().all() for tensor in saved.values())
        again = model.restore_decoder(through_a_file(saved))
        assert torch.equal(model.step(torch.tensor([5, 6]), again), model.step(torch.tensor([5, 6]), state))


def test_a_state_whose_longest_row_left_is_saved(make: Make) -> None:
    model = make()
    with torch.inference_mode():
        state = model.start(model.encode(sources(3)), max_length=9, copies=2)
        model.extend(targets(2, 5), state, torch.tensor([5, 2]))
        state.reorder(torch.tensor([1, 1]))
        again = model.restore_decoder(state.save())
        assert again.position == state.position == 2
        close(model.step(torch.tensor([5, 6]), again), model.step(torch.tensor([5, 6]), state))


def test_restored_states_own_their_memory(make: Make) -> None:
    """Tensors that share memory, as expand gives them, come back as rows of their own."""
    model, tgt = make(mixers=("running", "attention")), targets(3, 4)
    with torch.inference_mode():
        state = model.start(model.encode(sources(4)), max_length=6)
        model.extend(tgt[:1, :2], state)
        saved = {
            name: tensor if name in ("header", "copies", "max_length", "memory.padded") else tensor.expand(3, *tensor.shape[1:])
            for name, tensor in state.save().items()
        }
        three = model.restore_decoder(saved)
        for tensor in saved.values():
            tensor.zero_()
        alone = [model.restore_decoder(state.save()) for _ in range(3)]
        for t in range(2, 4):
            close(model.step(tgt[:, t], three), torch.cat([model.step(tgt[row : row + 1, t], one) for row, one in enumerate(alone)]))


def saved_decoder(model: CVMTransformer) -> dict[str, Tensor]:
    with torch.inference_mode():
        state = model.start(model.encode(sources(3, 5)), max_length=6)
        model.extend(targets(2, 3), state)
        return state.save()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": 2}, "heads = 4 and this one has 2"),
        ({"kv_heads": 1}, "kv_heads = 4 and this one has 1"),
        ({"positions": "rotary"}, "positions = 'sinusoidal' and this one has 'rotary'"),
        ({"mixers": ("running",)}, r"decoder_mixers = \['attention', 'attention'\] and this one has \['running', 'running'\]"),
        ({"decoder_layers": 1}, "decoder_layers = 2 and this one has 1|decoder_mixers"),
        ({"encoder_direction": "causal"}, "encoder_direction = 'bidirectional' and this one has 'causal'"),
        ({"dtype": torch.float32}, "as torch.float64.*where this model has torch.float32"),
        ({"max_length": 8, "dropout": 0.3}, None),
        ({"kv_heads": 4}, None),
    ],
    ids=str,
)
def test_a_state_of_another_architecture_is_refused_in_a_sentence(make: Make, options: dict[str, Any], words: str | None) -> None:
    saved, other = saved_decoder(make()), make(**options)
    if words is None:
        assert other.restore_decoder(saved).position == 3
        return
    with pytest.raises(DataError, match=words) as caught:
        other.restore_decoder(saved)
    assert "\n" not in str(caught.value)


def test_damaged_states_are_refused(make: Make) -> None:
    model = make()
    whole = saved_decoder(model)
    damages: list[tuple[dict[str, Any], str]] = [
        ({"mixers.1.keys": None}, r"lacks the tensor mixers\.1\.keys"),
        ({"more": torch.zeros(1)}, "unknown tensor more"),
        ({"header": torch.zeros(3, dtype=torch.uint8)}, "no saved state"),
        ({"header": None}, "no saved state"),
        ({"positions": torch.tensor([3, 7])}, "damaged"),
        ({"positions": torch.tensor([3, -1])}, "damaged"),
        ({"positions": torch.tensor([2, 2])}, r"mixers\.0\.keys as torch\.float64 \[2, 4, 3, 4\]"),
        ({"max_length": torch.tensor(33)}, "damaged"),
        ({"max_length": torch.tensor([6])}, r"max_length as torch\.int64 \[1\]"),
        ({"copies": torch.tensor(2)}, "2 hypotheses of 2 sentences in 2 rows"),
        ({"memory.lengths": torch.tensor([3, 6])}, r"sentences of \[3, 6\] positions where 5 are kept"),
        ({"memory.padded": torch.tensor(0)}, "damaged"),
        ({"memory.cross.0.keys": whole["memory.cross.0.keys"][:, :, 1:]}, r"memory\.cross\.0\.keys"),
        ({"memory.output": whole["memory.output"].long()}, r"memory\.output as torch\.int64"),
    ]
    for change, words in damages:
        damaged = {name: tensor for name, tensor in {**whole, **change}.items() if tensor is not None}
        with pytest.raises(DataError, match=words) as caught:
            model.restore_decoder(damaged)
        assert "\n" not in str(caught.value)
    assert model.restore_decoder(whole).position == 3


def test_a_state_decoded_under_autocast_comes_back(make: Make) -> None:
    model, tgt = make(dtype=torch.float32), targets(2, 4)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        state = model.start(model.encode(sources(3, 5)), max_length=6)
        model.extend(tgt[:, :2], state)
        again = model.restore_decoder(state.save())
        for t in (2, 3):
            assert torch.equal(model.step(tgt[:, t], again), model.step(tgt[:, t], state))


# -- bytes ------------------------------------------------------------------------------------------------------------------------
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_are_known_before_a_state_starts(make: Make, options: dict[str, Any], dtype: torch.dtype) -> None:
    model = make(**options, dtype=dtype, encoder_direction="causal")
    with torch.inference_mode():
        for rows, copies in ((1, 1), (3, 4)):
            state = model.start(model.encode(sources(*[6] * rows)), max_length=9, copies=copies)
            assert state.nbytes == rows * model.decoder_state_bytes(source_length=6, max_length=9, copies=copies)
            assert model.start_source(rows, 9).nbytes == rows * model.encoder_state_bytes(9)
            held = [tensor for mixer in state.mixers for name in mixer.layout for tensor in [mixer[name]]]
            assert sum(tensor.untyped_storage().nbytes() for tensor in held) == sum(mixer.nbytes for mixer in state.mixers)


def test_a_recurrent_state_does_not_grow(make: Make) -> None:
    model = make(mixers=("running",))
    plans = [model.decoder_state_bytes(5, length) for length in (1, 10, 30)]
    assert len({*plans}) == 1
    assert make().decoder_state_bytes(5, 11) - make().decoder_state_bytes(5, 10) == 2 * 2 * 16 * 8  # layers, keys and values, d, float64


# -- an encoder whose source grows ------------------------------------------------------------------------------------------------
@kinds
def test_a_causal_encoder_sees_nothing_behind(make: Make, options: dict[str, Any]) -> None:
    causal, both = make(**options, encoder_direction="causal"), make(**options)
    src = sources(6, 4)
    longer = torch.cat((src, sources(3, 3)), dim=1)[:1]
    with torch.inference_mode():
        close(causal.encode(longer).output[:, :6], causal.encode(src[:1]).output)
        assert (both.encode(longer).output[:, :6] - both.encode(src[:1]).output).abs().max() > 1e-3
        close(causal.encode(src).output[1, :4], causal.encode(src[1:, :4]).output[0])


@kinds
def test_a_source_that_grows_is_encoded_as_a_whole_one(make: Make, options: dict[str, Any]) -> None:
    """Words arrive row by row, several or none at a time; what was read before stays, and a decoder goes on over the longer source."""
    model = make(**options, encoder_direction="causal")
    src, tgt = sources(7, 3, 5), targets(3, 6)
    pieces, at = [[2, 1, 0], [0, 2, 3], [5, 0, 2]], [0, 0, 0]
    with torch.inference_mode():
        state, earlier = model.start_source(3, 7), []
        spoil(state)
        decoder: DecoderState | None = None
        for lengths in pieces:
            piece = torch.full((3, max(lengths)), PAD)
            for row, length in enumerate(lengths):
                piece[row, :length] = src[row, at[row] : at[row] + length]
            at = [a + length for a, length in zip(at, lengths, strict=True)]
            memory = model.append_source(piece, state)
            assert memory.lengths.tolist() == at == state.positions.tolist()
            earlier.append((memory, copy.deepcopy(memory)))
            so_far = torch.where(torch.arange(7) < torch.tensor(at)[:, None], src, PAD)
            whole = model.encode(so_far)
            for row, length in enumerate(at):
                close(memory.output[row, :length], whole.output[row, :length])
            close(model.step(tgt[:, 0], model.start(memory, 6)), model(so_far, tgt[:, :1])[0][:, 0])
            if decoder is None:
                decoder = model.start(memory, 6)
                model.extend(tgt[:, :2], decoder)
            decoder.memory = memory
            model.step(tgt[:, 2], decoder)
        for memory, before in earlier:
            for row, length in enumerate(before.lengths.tolist()):
                for pair, kept in zip(memory.cross, before.cross, strict=True):
                    assert all(torch.equal(a[row, :, :length], b[row, :, :length]) for a, b in zip(pair, kept, strict=True))
        with pytest.raises(ValueError, match="room for 7"):
            model.append_source(src[:, :1], state)


@kinds
@pytest.mark.parametrize("ragged", [False, True])
def test_a_saved_encoder_goes_on_with_the_same_bits(make: Make, options: dict[str, Any], ragged: bool) -> None:
    model = make(**options, dtype=torch.float32, encoder_direction="causal")
    first, second = sources(3, 1 if ragged else 3), sources(2, 2)
    with torch.inference_mode():
        state = model.start_source(2, 8)
        model.append_source(first, state)
        again, twin = model.restore_encoder(through_a_file(state.save())), state.copy()
        want = model.append_source(second, state)
        for found in (model.append_source(second, again), model.append_source(second, twin)):
            for row, length in enumerate(want.lengths.tolist()):
                assert torch.equal(found.output[row, :length], want.output[row, :length])
            assert torch.equal(model.step(torch.tensor([BOS, BOS]), model.start(found, 3)), model.step(torch.tensor([BOS, BOS]), model.start(want, 3)))
        state.select(torch.tensor([1, 1, 0]))
        third = sources(1, 1, 1)
        want = model.append_source(third[:1].expand(2, 1), again)
        found = model.append_source(third[:1].expand(3, 1), state)
        assert found.lengths.tolist() == want.lengths[[1, 1, 0]].tolist()
        for row, of in enumerate((1, 1, 0)):
            assert torch.equal(found.output[row, : int(found.lengths[row])], want.output[of, : int(want.lengths[of])])
        with pytest.raises(DataError, match="kind 'encoder'.*restored here is 'decoder'"):
            model.restore_decoder(again.save())


def test_a_bidirectional_encoder_cannot_grow(make: Make) -> None:
    model = make()
    for call in (lambda: model.start_source(1, 4), lambda: model.restore_encoder({}), lambda: model.encoder_state_bytes(4)):
        with pytest.raises(ConfigError, match="encoder is bidirectional"):
            call()
    with pytest.raises(ConfigError, match=r"model\.max_length = 32"):
        make(encoder_direction="causal").start_source(1, 33)
    causal = make(encoder_direction="causal")
    with torch.inference_mode(), pytest.raises(ValueError, match="src has 2 rows and the state has 1"):
        causal.append_source(sources(2, 2), causal.start_source(1, 4))


@kinds
def test_empty_rows_and_pieces(make: Make, options: dict[str, Any]) -> None:
    """No rows, no new tokens, and sources of padding only."""
    model = make(**options, encoder_direction="causal")
    with torch.inference_mode():
        state = model.start(model.encode(sources(3)[:0]), max_length=4, copies=2)
        assert model.extend(targets(1, 2)[:0], state).shape == (0, 2, VOCAB) and state.positions.tolist() == []
        assert model.extend(targets(1, 2)[:0], state, torch.zeros(0, dtype=torch.long)).shape == (0, 2, VOCAB)
        again = model.restore_decoder(state.save())
        assert again.rows == 0
        source = model.start_source(2, 4)
        assert model.append_source(torch.zeros(2, 3, dtype=torch.long), source).lengths.tolist() == [0, 0]
        memory = model.append_source(sources(2, 1), source)
        assert memory.lengths.tolist() == [2, 1]
        close(memory.output[1, :1], model.encode(sources(2, 1)).output[1, :1])
