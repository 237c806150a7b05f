"""CVMTransformer: a pre-norm encoder-decoder whose blocks name their mixer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from cvmk.config.model import KvCache
from cvmk.config.schema import ModelConfig
from cvmk.errors import ConfigError
from cvmk.nn.cache import DecoderState, EncoderState, Plan
from cvmk.nn.embeddings import Embeddings
from cvmk.nn.linear import TiedLinear
from cvmk.nn.memory import Memory
from cvmk.nn.mixers import mixer_class, mixer_names
from cvmk.nn.mixers.attention import CrossAttention, SelfAttention
from cvmk.nn.outputs import AttentionMap, AttentionMaps, HiddenStates, Unprojected
from cvmk.nn.positions import POSITIONS, Span
from cvmk.nn.stacks import Decoder, Encoder
from cvmk.nn.state import GROWS, StateTensor, row_nbytes


class CVMTransformer(nn.Module):
    """Encoder-decoder after Vaswani et al. 2017 with the variants of ModelConfig.

    Token ids run from 0 to vocab_size - 1; pad_id fills rows on the right and must not occur inside them.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, pad_id: int = 0) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.pad_id = pad_id
        self.embeddings = Embeddings(config, vocab_size)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.dropout = nn.Dropout(config.dropout)
        self.positions = POSITIONS[config.positions](config)
        self.keep_caches(config.kv_cache)
        free = {"dropout", "attention_dropout", "kv_cache"}
        if not any(mixer_class(name).reads_max_length for name in (*config.encoder_mixers, *config.decoder_mixers)):
            free.add("max_length")
        self._architecture = {
            **config.model_dump(mode="json", exclude=free),
            "kv_heads": config.kv_heads or config.heads,
            "encoder_mixers": mixer_names([*config.encoder_mixers], config.encoder_layers),
            "decoder_mixers": mixer_names([*config.decoder_mixers], config.decoder_layers),
            "vocab_size": vocab_size,
        }

    def keep_caches(self, kv_cache: KvCache) -> None:
        """Decode with keys and values of this kind from now on, as `model.kv_cache` says: with "int8" each head's key and value of a position is rounded to 255
        steps of its largest magnitude (`ops.quantize.rounded_rows`) before it is remembered. Here they stay numbers of the model's dtype; the native engine
        holds bytes. Whole sequences, and encoders, are computed as before."""
        self.config = self.config.model_copy(update={"kv_cache": kv_cache})
        for block in self.decoder.blocks:
            for attention in (block.mixer, block.cross):
                if isinstance(attention, (SelfAttention, CrossAttention)):
                    attention.heads.byte_cache = kv_cache == "int8"

    # -- whole sequences ---------------------------------------------------------------------------------------------
    def forward(
        self, src: Tensor, tgt: Tensor, *, return_hidden: bool = False, return_attention: bool = False
    ) -> tuple[Tensor, HiddenStates | None, AttentionMaps | None]:
        """Logits [B, T, V] of the tokens that follow each position of the decoder input.

        src [B, S] and tgt [B, T] are integers, padded with pad_id on the right; tgt begins with BOS. A row of src may be
        padding only. Hidden states are the blocks' outputs before the final norm. Raises ConfigError where a side is
        longer than model.max_length.
        """
        features, hidden, maps = self.forward_features(src, tgt, return_hidden=return_hidden, return_attention=return_attention)
        return self.embeddings.logits(features), hidden, maps

    def forward_features(
        self, src: Tensor, tgt: Tensor, *, return_hidden: bool = False, return_attention: bool = False
    ) -> tuple[Tensor, HiddenStates | None, AttentionMaps | None]:
        """`forward` without the output layer: what it reads, [B, T, d], so that a loss can be computed from it and
        `embeddings.output_matrix` without the logits (`ops.linear_kd_loss`)."""
        return self._features(src, tgt, return_hidden, AttentionMaps() if return_attention else None)

    def forward_unprojected(
        self,
        src: Tensor,
        tgt: Tensor,
        *,
        return_hidden: bool = False,
        return_attention: bool = False,
        imitated: Mapping[tuple[str, int], AttentionMap] | None = None,
    ) -> tuple[Unprojected | Tensor, HiddenStates | None, AttentionMaps | None]:
        """`forward` whose logits nobody has made yet, but for an output layer that is more than a product by `embeddings.output_matrix`.

        imitated   a teacher's maps by kind ("encoder", "decoder", "cross") and place in the student's list of that kind: attentions that can
                   say their divergence from it while they attend (`AttentionMap.divergence`). Goes with return_attention.
        """
        features, hidden, maps = self._features(src, tgt, return_hidden, AttentionMaps(imitated=imitated or {}) if return_attention else None)
        embeddings = self.embeddings
        plain = isinstance(embeddings.projection, TiedLinear)
        return Unprojected(features, embeddings.output_matrix) if plain else embeddings.logits(features), hidden, maps

    def _features(
        self, src: Tensor, tgt: Tensor, return_hidden: bool, maps: AttentionMaps | None
    ) -> tuple[Tensor, HiddenStates | None, AttentionMaps | None]:
        hidden = HiddenStates() if return_hidden else None
        memory, lengths = self._encode(src, hidden, maps)
        x, span = self._embed(self.embeddings.embed_target, tgt, Span(0, tgt.shape[1], tgt.shape[1], (tgt != self.pad_id).sum(dim=1)))
        return self.decoder(x, span, memory, lengths, hidden, maps), hidden, maps

    def _encode(self, src: Tensor, hidden: HiddenStates | None, maps: AttentionMaps | None) -> tuple[Tensor, Tensor]:
        lengths = (src != self.pad_id).sum(dim=1)
        x, span = self._embed(self.embeddings.embed_source, src, Span(0, src.shape[1], src.shape[1], lengths))
        return self.encoder(x, span, None, hidden, maps), lengths

    def _embed(self, embed: Callable[..., Tensor], ids: Tensor, span: Span) -> tuple[Tensor, Span]:
        """The tokens ids [N, T] at the positions of `span` -> the first block's input [N, T, d], and the span that mixers are given."""
        limit = self.config.max_length
        if span.end > limit:
            raise ConfigError(f"a sequence of {span.end} tokens is longer than model.max_length = {limit}: shorten it or train with a larger one")
        positions, span = self.positions.place(span)
        return embed(ids, positions, self.dropout), span

    # -- step by step ------------------------------------------------------------------------------------------------
    def encode(self, src: Tensor) -> Memory:
        """Encode src [B, S] (integers, padded with pad_id on the right) and compute what every decoding step reads of it."""
        output, lengths = self._encode(src, None, None)
        cross = []
        for block in self.decoder.blocks:
            keys, values = block.cross.remembered(output)
            cross.append((keys.contiguous(), values.contiguous()))
        return Memory(output, lengths, cross, padded=bool((lengths < src.shape[1]).any()))

    def start(self, memory: Memory, max_length: int, copies: int = 1) -> DecoderState:
        """An empty state for `copies` hypotheses of each sentence with room for max_length tokens, BOS included.

        Raises ConfigError where max_length is beyond model.max_length.
        """
        return DecoderState.start(self._plan(self.decoder), memory, max_length, copies)

    def step(self, tokens: Tensor, state: DecoderState, maps: AttentionMaps | None = None) -> Tensor:
        """Feed one token a hypothesis, [N] (BOS first) -> logits [N, V] of the next one. Call it without gradients.

        `maps` gets the cross-attention of each block: the queries [B, H, copies, D] of a sentence's hypotheses stand together.
        """
        return self.embeddings.logits(self._extend(tokens[:, None], state, None, maps)[:, 0])

    def extend(self, tokens: Tensor, state: DecoderState, lengths: Tensor | None = None, maps: AttentionMaps | None = None) -> Tensor:
        """Feed T tokens a hypothesis at once, [N, T] -> logits [N, T, V]; the same as T steps. Call it without gradients.

        With lengths [N], integers, only the first lengths[n] of row n are tokens; the others are padding, for which the logits mean nothing,
        and the row goes on behind its last token. `maps` as of `step`, with the queries [B, H, copies * T, D].
        """
        return self.embeddings.logits(self._extend(tokens, state, lengths, maps))

    def _extend(self, tokens: Tensor, state: DecoderState, lengths: Tensor | None, maps: AttentionMaps | None) -> Tensor:
        if tokens.shape[0] != state.rows:
            raise ValueError(f"tokens have {tokens.shape[0]} rows and the state has {state.rows}: give one row a hypothesis")
        x, span = self._embed(self.embeddings.embed_target, tokens, state.lengths.span(tokens.shape[1], lengths, state.max_length))
        features = self.decoder.extend(x, span, state.memory, state.mixers, maps)
        state.lengths.advance(span)
        return features

    # -- a source that grows -----------------------------------------------------------------------------------------
    def start_source(self, rows: int, max_length: int) -> EncoderState:
        """An empty state for sources that grow to at most max_length tokens, EOS included. The encoder must be causal.

        Raises ConfigError where it is not, and where max_length is beyond model.max_length.
        """
        self._check_causal()
        return EncoderState.start(self._plan(self.encoder), rows, max_length)

    def append_source(self, src: Tensor, state: EncoderState) -> Memory:
        """Append src [N, T] (integers, padded with pad_id on the right) to the sources -> all that is encoded of them so far.

        What was encoded before stays as it was. Call it without gradients.
        """
        if src.shape[0] != state.rows:
            raise ValueError(f"src has {src.shape[0]} rows and the state has {state.rows}: give one row a source")
        x, span = self._embed(self.embeddings.embed_source, src, state.lengths.span(src.shape[1], (src != self.pad_id).sum(dim=1), state.max_length))
        output = self.encoder(x, span, state.mixers)
        state.encoded.append("output", output, span)
        for layer, block in enumerate(self.decoder.blocks):
            for name, new in zip(("keys", "values"), block.cross.remembered(output), strict=True):
                state.encoded.append(f"cross.{layer}.{name}", new, span)
        state.lengths.advance(span)
        return state.memory()

    def _check_causal(self) -> None:
        if not self.encoder.causal:
            remedy = 'encode it anew, or train a model with model.encoder_direction = "causal"'
            raise ConfigError(f"the model's encoder is bidirectional, so a source cannot grow: {remedy}")

    # -- states ------------------------------------------------------------------------------------------------------
    def restore_decoder(self, tensors: Mapping[str, Tensor]) -> DecoderState:
        """The state whose `save` gave these tensors, on this model's device. Raises DataError in one sentence where they are of
        a model of another architecture or dtype, incomplete or damaged. (That the weights are the same is not looked at.)"""
        return DecoderState.restore(self._plan(self.decoder), tensors)

    def restore_encoder(self, tensors: Mapping[str, Tensor]) -> EncoderState:
        """As `restore_decoder`, for a source that grows."""
        self._check_causal()
        return EncoderState.restore(self._plan(self.encoder), tensors)

    def decoder_state_bytes(self, source_length: int, max_length: int, copies: int = 1) -> int:
        """Bytes of the state of one sentence of so many source tokens, what is encoded of it included: `DecoderState.nbytes` before there is one."""
        plan = self._plan(self.decoder)
        return row_nbytes(plan.encoded, source_length) + 8 + copies * plan.nbytes(max_length)  # 8: its length

    def encoder_state_bytes(self, max_length: int) -> int:
        """Bytes of the state of one source that grows: `EncoderState.nbytes` before there is one. Raises ConfigError unless the encoder is causal."""
        self._check_causal()
        plan = self._plan(self.encoder)
        return row_nbytes(plan.encoded, max_length) + plan.nbytes(max_length)

    def _plan(self, stack: Encoder | Decoder) -> Plan:
        weight, config = next(self.decoder.norm.parameters()), self.config
        encoded = {"output": StateTensor((GROWS, config.d_model), weight.dtype)}
        for layer, block in enumerate(self.decoder.blocks):
            encoded |= {f"cross.{layer}.{name}": entry for name, entry in block.cross.state_layout(weight.dtype).items()}
        return Plan(stack.layouts(weight.dtype), encoded, config.max_length, weight.device, self._architecture)
