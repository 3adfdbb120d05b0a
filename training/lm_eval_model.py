"""A trained model as lm-evaluation-harness calls one (lm_eval.api.model, version 0.4).

Every text begins with BOS, also one whose first tokens are cut off. A rolling log-likelihood is that of
eval.py: disjoint windows, and EOS is scored. Only scripts/lm_eval_tasks.py imports this file, since lm_eval
is not a requirement of this repository.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lm_eval.api.model import TemplateLM

from data.tokenizer import Tokenizer
from models.generation import SamplingConfig, generate
from models.transnormer import TransNormer
from training.distributed import World
from training.evaluation import EvalDocument, evaluate


class TransnormerLM(TemplateLM):
    """
    Args:
        seq_len: longest context in tokens; earlier ones are cut off, and rolling windows have this length.
        batch_tokens: tokens of a forward pass, at least one request.
    """

    def __init__(self, model: TransNormer, tokenizer: Tokenizer, seq_len: int, batch_tokens: int) -> None:
        super().__init__()
        self.model, self.text_tokenizer = model, tokenizer
        self.seq_len, self.batch_tokens = seq_len, batch_tokens
        self.torch_device = next(model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        return self.text_tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.text_tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, after BOS unless `add_special_tokens` is False."""
        ids = self.text_tokenizer.encode(string).tolist()
        return ids if add_special_tokens is False else [self.prefix_token_id, *ids]

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: list, **_: Any) -> list[tuple[float, bool]]:
        """(texts, context ids, continuation ids) → (nats of the continuation, whether it is greedy)."""
        results: list[tuple[float, bool]] = []
        batch: list[tuple[list[int], int]] = []  # ids, and how many of the last ones are scored
        size = 0
        for _texts, context, continuation in requests:
            ids = self._cut(context + continuation, self.seq_len + 1)
            if batch and size + len(ids) > self.batch_tokens:
                results += self._score(batch)
                batch, size = [], 0
            batch.append((ids, min(len(continuation), len(ids) - 1)))
            size += len(ids)
        return results + (self._score(batch) if batch else [])

    def _cut(self, ids: list[int], length: int) -> list[int]:
        """The last tokens, after BOS: `length` in all, at most."""
        return ids if len(ids) <= length else [self.prefix_token_id, *ids[len(ids) - length + 1 :]]

    def _score(self, batch: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Score packed requests; logits are formed where a continuation is scored."""
        inputs = torch.tensor([token for ids, _ in batch for token in ids[:-1]], device=self.torch_device)
        bounds = np.cumsum([0] + [len(ids) - 1 for ids, _ in batch], dtype=np.int32)
        cu_seqlens = torch.from_numpy(bounds).to(self.torch_device)
        model = self.model
        features, _ = model.model(inputs[None], model.lm_head.weight.dtype, cu_seqlens, None)
        results = []
        for stop, (ids, count) in zip(bounds[1:].tolist(), batch, strict=True):
            log_probabilities = model.lm_head(features[0, stop - count : stop]).float().log_softmax(-1)
            targets = torch.tensor(ids[len(ids) - count :], device=self.torch_device)
            total = log_probabilities.gather(1, targets[:, None]).sum()
            results.append((float(total), bool((log_probabilities.argmax(-1) == targets).all())))
        return results

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Nats of whole texts, summed, as eval.py scores a document."""
        totals = []
        for request in requests:
            (text,) = request.args
            ids = np.array([*self.tok_encode(text), self.eot_token_id])
            document = EvalDocument(ids, len(text.encode()), len(text.split()))
            result = evaluate(
                self.model,
                [document],
                min(self.seq_len, len(ids) - 1),
                World(0, 1, self.torch_device),
                batch_tokens=self.batch_tokens,
            )
            totals.append(-result.loss * result.tokens)
        return totals

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Continue each context until one of its stop texts, EOS, or max_gen_toks tokens."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        stops = settings.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        sampling = SamplingConfig(
            temperature=settings.get("temperature", 1.0) if settings.get("do_sample") else 0.0,
            top_k=settings.get("top_k", 0),
            top_p=settings.get("top_p", 1.0),
        )
        prompt = self._cut(self.tok_encode(context), self.seq_len)
        decoder, text = self.text_tokenizer.decoder(), ""
        limit = settings.get("max_gen_toks", 256)
        num_ids = self.text_tokenizer.vocab_size
        for token in generate(
            self.model, prompt, limit, sampling, self.torch_device, self.eot_token_id, num_ids=num_ids
        ):
            text += decoder.push(token)
            if any(stop in text for stop in stops):
                break
        text += decoder.flush()
        return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
