"""The model in Hugging Face transformers: `TransnormerConfig` and `TransnormerForCausalLM`.

The modules and their names are those of models/transnormer.py, so one state dict serves both. Tokens that an
attention mask hides are taken out before the first layer and put back after the last: they enter no state,
decay nothing and have no position. Where positions begin at 0 again, a row packs several sequences, which see
nothing of each other. transformers 4.57 calls the cache `past_key_values`, later ones `cache`.

Shapes: B batch, N new tokens, S all tokens so far, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from kernels.torch_cross_entropy import IGNORED
from models.attention import LRPE, GatedLinearAttention
from models.config import ModelConfig
from models.layers import LMHead, RMSNorm
from models.published import model_config_from_published, published_fields
from models.transnormer import PREFILL_TOKENS, Backbone, DecodeState, token_positions

# what transformers passes along that changes nothing here: it follows from the other arguments
IGNORED_ARGUMENTS = ("cache_position", "max_length_q", "max_length_k")

# the name that this version of transformers gives the cache
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class TransnormerConfig(PretrainedConfig):
    """The fields of the published checkpoints' config.json (models/published.py).

    Example:
        TransnormerConfig(vocab_size=64000, decoder_embed_dim=1024, decoder_layers=24,
                          decoder_attention_heads=8, glu_dim=2816)
    """

    model_type = "transnormer"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 - Trainer adds a list to it
    attribute_map = {  # noqa: RUF012
        "hidden_size": "decoder_embed_dim",
        "num_hidden_layers": "decoder_layers",
        "num_attention_heads": "decoder_attention_heads",
    }

    def __init__(
        self,
        vocab_size: int = 64000,
        decoder_embed_dim: int = 1024,
        decoder_layers: int = 24,
        decoder_attention_heads: int = 8,
        glu_dim: int = 2816,
        pad_token_id: int | None = 0,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        **fields: Any,
    ) -> None:
        sizes = {
            "vocab_size": vocab_size,
            "decoder_embed_dim": decoder_embed_dim,
            "decoder_layers": decoder_layers,
            "decoder_attention_heads": decoder_attention_heads,
            "glu_dim": glu_dim,
            "tie_word_embeddings": tie_word_embeddings,
        }
        architecture = published_fields(model_config_from_published(sizes | fields))
        for name, value in architecture.items():
            setattr(self, name, value)
        self.use_cache = use_cache
        others: dict[str, Any] = {name: fields[name] for name in fields if name not in architecture}
        others |= {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        super().__init__(**others | {"tie_word_embeddings": tie_word_embeddings})

    def architecture(self) -> ModelConfig:
        """The same as the repository's own settings."""
        return model_config_from_published(self.to_dict())


class TransnormerCache:
    """What generation carries: the state of every layer, of one size whatever the text's length.

    Attributes:
        num_seen: columns of input ids read so far, padding included.
    """

    is_linear = (False,)  # of transformers' protocol: inputs are sliced by get_seq_length
    is_compileable = False

    def __init__(self) -> None:
        self.state = DecodeState()
        self.num_seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the state of sequence beam_idx[i] for sequence i, as beam search asks."""
        position = self.state.position
        if isinstance(position, Tensor):
            position = position[beam_idx.to(position.device)]
        self.state = DecodeState(position, [_select(layer, beam_idx) for layer in self.state.layers])


def _select(layer: Tensor | list, index: Tensor) -> Tensor | list:
    if isinstance(layer, list):  # of a softmax layer: one (k, v) a sequence
        return [layer[i] for i in index.tolist()]
    return layer.index_select(0, index.to(layer.device))


class TransnormerForCausalLM(PreTrainedModel, GenerationMixin):
    """A TransNormer (or one of its baselines) as transformers expects a causal language model."""

    config_class = TransnormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    gradient_checkpointing = False
    _is_stateful = True  # a state can't be rolled back: no assisted decoding
    _no_split_modules = ["Block"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: TransnormerConfig) -> None:
        super().__init__(config)
        architecture = config.architecture()
        self.model = Backbone(architecture)
        self.lm_head = LMHead(architecture.hidden_size, self.model.embed_tokens.num_embeddings)
        has_lrpe = any(isinstance(module, LRPE) for module in self.modules())
        self._keep_in_fp32_modules_strict = ["theta"] if has_lrpe else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fill what a checkpoint does not hold: the slopes always, weights where they are missing."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, 0.0, self.config.init_std)
        elif isinstance(module, GatedLinearAttention):
            module.slopes = module.fp32_slopes(module.slopes.device)
        elif isinstance(module, LRPE):
            if not getattr(module.theta, "_is_hf_initialized", False):
                module.theta.copy_(module.initial_theta())
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, every_n_layers: int = 1
    ) -> None:
        """Recompute every block in backward; always without reentrancy, whichever function is given."""
        if every_n_layers != 1:
            raise ValueError(f"every_n_layers={every_n_layers}: only every layer can be recomputed, 1.")
        self.gradient_checkpointing = enable
        mode = "full" if enable else "none"
        self.model.config = replace(self.model.config, activation_checkpointing=mode)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes a TransnormerCache

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: TransnormerCache | None = None,
        cache: TransnormerCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """The tokens that the cache has not seen, of which only the last one's logits are wanted.

        Raises:
            ValueError: a prompt ends in padding, which has no logits to go on from.
        """
        _refuse_padding_at_the_end(attention_mask)
        cache = past_key_values if cache is None else cache
        seen = 0 if cache is None else cache.num_seen
        whole = attention_mask is None or attention_mask.shape[1] == input_ids.shape[1]
        if inputs_embeds is not None and seen < inputs_embeds.shape[1]:  # of the prompt, which has no ids
            tokens = {"inputs_embeds": inputs_embeds[:, seen:]}
        elif next_sequence_length is not None:
            tokens = {"input_ids": input_ids[:, -next_sequence_length:]}
        elif inputs_embeds is not None:
            prompt = 0 if input_ids.shape[1] > seen else inputs_embeds.shape[1]  # ids may be without it
            tokens = {"input_ids": input_ids[:, seen - prompt :]}
        else:
            tokens = {"input_ids": input_ids[:, seen:] if whole else input_ids}
        return tokens | {
            "attention_mask": attention_mask,
            "cache": cache,
            "use_cache": use_cache,
            "logits_to_keep": 1,
        }

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: TransnormerCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: TransnormerCache | None = None,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **arguments: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """
        Args:
            input_ids: (B, N) int64.
            attention_mask: (B, N) or (B, S), 0 for padding on either side; only its last N columns count.
            past_key_values: the cache that an earlier call returned, also accepted as `cache`.
            labels: (B, N), -100 where not scored; shifted here.
            logits_to_keep: logits of the last so many tokens only (0: all), or of these positions.
            num_items_in_batch: what the summed loss is divided by, instead of the labels scored here.
            return_dict: False for a tuple.
            position_ids: (B or 1, N), counted from 0 without padding; from 0 again where one of several
                sequences that a row packs begins, which takes no cache.
            cu_seq_lens_q, cu_seq_lens_k: (num_sequences + 1,), the same packing of the only row.
            inputs_embeds: (B, N, D) in place of input_ids, as `get_input_embeddings()` gives them.

        Raises:
            ValueError: an argument that this model can't honour.
        """
        _refuse(arguments)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("input_ids or inputs_embeds must be given: one of them.")
        if tokens.shape[1] == 0:
            raise ValueError(
                f"the input has shape {tuple(tokens.shape)}, no token: give at least one, as BOS."
            )
        cache = past_key_values if cache is None else cache
        real = self._real_tokens(tokens, attention_mask)
        position_ids = _positions(position_ids, (cu_seq_lens_q, cu_seq_lens_k), tokens)
        starts = None
        if position_ids is not None:
            starts = _packed_starts(position_ids, tokens, real, cache)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None and starts is None
        if starts is not None and use_cache:
            raise ValueError("use_cache=True: a row that packs several sequences has no state to go on with.")
        if cache is None and use_cache:
            cache = TransnormerCache()
        keep = logits_to_keep if isinstance(logits_to_keep, int) else 0
        x = self._features(tokens, real, starts, cache, keep)
        logits = self.lm_head(x if isinstance(logits_to_keep, int) else x[:, logits_to_keep])
        loss = None
        if labels is not None:
            if starts is not None:  # no token is predicted from another sequence's
                labels = labels.masked_fill(starts, IGNORED)
            loss = _mean_loss(logits, labels, real, num_items_in_batch)
        carried: dict[str, Any] = {CACHE_NAME: cache}
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **carried)
        return output if return_dict is not False else output.to_tuple()

    def _real_tokens(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """(B, N) bool, False for padding; None if there is none."""
        if attention_mask is None:
            return None
        if attention_mask.dim() != 2 or attention_mask.shape[1] < tokens.shape[1]:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; allowed: (batch, tokens so far)."
            )
        real = attention_mask[:, -tokens.shape[1] :].bool()
        return None if bool(real.all()) else real

    def _features(
        self,
        tokens: Tensor,
        real: Tensor | None,
        starts: Tensor | None,
        cache: TransnormerCache | None,
        keep: int,
    ) -> Tensor:
        """(B, N) → (B, N or the last `keep`, D); a long prompt is read in chunks, which saves memory."""
        length = tokens.shape[1]
        chunk = PREFILL_TOKENS if cache is not None and not torch.is_grad_enabled() else length
        kept: list[Tensor] = []
        for start in range(0, length, chunk):
            columns = slice(start, start + chunk)
            part_real = None if real is None else real[:, columns]
            part = self._read(tokens[:, columns], part_real, starts, cache)  # one part if `starts`
            kept = [torch.cat([*kept, part], dim=1)[:, -keep:]]  # all of it where keep is 0
        return kept[0]

    def _read(
        self, tokens: Tensor, real: Tensor | None, starts: Tensor | None, cache: TransnormerCache | None
    ) -> Tensor:
        """Features of one chunk (B, N, D), zero for padding; advances the cache."""
        state = None if cache is None else cache.state
        dtype = self.lm_head.weight.dtype
        keeps_keys = state is not None and any(map(self.model.config.uses_softmax, self._layers()))
        if real is None and (keeps_keys or starts is not None):
            real = torch.ones(
                tokens.shape[:2], dtype=torch.bool, device=tokens.device
            )  # a cache of keys is kept sequence by sequence
        if real is None:
            x, state = self.model(tokens, dtype, None, state)
        else:
            x = tokens.new_zeros(*real.shape, self.config.decoder_embed_dim, dtype=dtype)
            if starts is None:  # each row is a sequence
                cu_seqlens = F.pad(real.sum(1).cumsum(0), (1, 0)).int()
            else:
                cu_seqlens = F.pad(starts[real].nonzero()[:, 0], (0, 1), value=int(real.sum())).int()
            if bool(real.any()):
                packed, state = self.model(tokens[real][None], dtype, cu_seqlens, state)
                x = x.masked_scatter(real[..., None], packed)
        if cache is not None and state is not None:
            cache.state = state
            cache.num_seen += tokens.shape[1]
        return x

    def _layers(self) -> range:
        return range(self.config.decoder_layers)


def _refuse_padding_at_the_end(attention_mask: Tensor | None) -> None:
    """A row without any token is a part of a longer prompt, padded on the left."""
    if attention_mask is None or attention_mask.dim() != 2:
        return
    real = attention_mask.bool()
    if bool((real.any(1) & ~real[:, -1]).any()):
        raise ValueError(
            "attention_mask ends in padding, and generate() continues the last column: pad prompts on the "
            "left, as with tokenizer.padding_side='left'."
        )


def _refuse(arguments: dict[str, Any]) -> None:
    unknown = [
        name
        for name, value in arguments.items()
        if name not in IGNORED_ARGUMENTS and value is not None and value is not False
    ]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: this model has no such argument, or can't honour it.")


def _positions(
    position_ids: Tensor | None, bounds: tuple[Tensor | None, ...], tokens: Tensor
) -> Tensor | None:
    """The positions (B or 1, N) that were given, as such or by the bounds of packed sequences."""
    batch, length = tokens.shape[:2]
    for cu_seqlens in bounds:
        if cu_seqlens is None:
            continue
        ends = cu_seqlens.tolist()
        if batch != 1 or ends[0] != 0 or ends[-1] != length or ends != sorted(ends):
            raise ValueError(
                f"cu_seq_lens of {batch} rows of {length} tokens: allowed are ends of the sequences in one "
                f"row, from 0 up to {length}."
            )
        positions = token_positions(length, 0, cu_seqlens.to(tokens.device), tokens.device)
        if position_ids is not None and not torch.equal(positions, position_ids.to(positions)):
            raise ValueError("cu_seq_lens_q, cu_seq_lens_k and position_ids differ: give one of them.")
        position_ids = positions
    return position_ids


def _packed_starts(
    position_ids: Tensor, tokens: Tensor, real: Tensor | None, cache: TransnormerCache | None
) -> Tensor | None:
    """(B, N) bool, True where one of several sequences in a row begins; None where each row is one.

    Raises:
        ValueError: positions that the model does not give these tokens, nor a packing of them.
    """
    shape = tokens.shape[:2]
    if (
        position_ids.dim() != 2
        or position_ids.shape[0] not in (1, shape[0])
        or position_ids.shape[1] != shape[1]
    ):
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}; allowed: (batch or 1, {shape[1]})."
        )
    position_ids = position_ids.to(tokens.device).expand(shape)
    if real is None:
        real = torch.ones(shape, dtype=torch.bool, device=tokens.device)
    seen = 0 if cache is None else cache.state.position
    counted = real.cumsum(1)
    expected = counted - 1 + (seen[:, None] if isinstance(seen, Tensor) else seen)
    if not bool((real & (position_ids != expected)).any()):
        return None
    starts = real & (position_ids == 0)
    counted_at_start = (counted * starts).cummax(1).values  # 0 before the first
    is_packed = (counted_at_start > 0) & (position_ids == counted - counted_at_start)
    if cache is not None or not bool((is_packed | ~real).all()):
        raise ValueError(
            "position_ids are neither those of one sequence a row (0, 1, 2, … without padding, after the "
            "cache's) nor, without a cache, of several packed into it (from 0 again at each): leave them out."
        )
    return starts


def _mean_loss(logits: Tensor, labels: Tensor, real: Tensor | None, num_items: Any) -> Tensor:
    """Summed cross entropy of each next token, over `num_items` or over the scored ones, in fp32."""
    targets = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].to(logits.device)
    if real is not None:
        targets = targets.masked_fill(~real, IGNORED)
    total = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / ((targets != IGNORED).sum() if num_items is None else num_items)
