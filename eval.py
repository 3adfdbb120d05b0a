"""Perplexity of trained models on a text, at one or more sequence lengths.

    python eval.py checkpoint=outputs/x                                     the run's own validation split
    python eval.py checkpoint=outputs/x seq_lens=[1024,8192] data=text data.path=FILE    all of a text
    python eval.py checkpoint='outputs/x/checkpoints/*' output=scores.json  a run's history
    torchrun --nproc_per_node 4 eval.py checkpoint=outputs/x                the work shared by four ranks

What is scored: a document (a .txt file, a line of .jsonl, a row of .parquet) is [BOS] its tokens [EOS].
Every token of it and EOS is scored exactly once, BOS never, and nothing is seen across documents.
  window=disjoint   windows of seq_len inputs that don't overlap, each from a fresh state. Only the first of a
                    document has BOS in it; its last is shorter; a shorter document is one window.
  window=strided    windows of seq_len inputs that overlap; after the first, each scores the last `stride`
                    targets (half of seq_len unless set), so that each has more than seq_len - stride inputs.
  window=streaming  everything before a token in its document is seen: the state is carried from chunk to
                    chunk, in constant memory with linear attention. seq_len is the chunk, which
                    changes numbers by rounding only. A document is scored by one rank: more ranks need more
                    documents.
loss is the mean in nats over the scored tokens, perplexity its exponential. Bytes and words are those of the
scored text: bits per byte = summed loss / ln 2 / bytes, word perplexity = exp(summed loss / words), words
being what whitespace separates. The 95 % interval of the loss is a bootstrap over documents.
Perplexities per token compare only between models of one tokenizer; bits per byte compare between any.

max_tokens scores the first so many tokens only (0: all). batch_tokens are those of a forward pass, at least
one window; a smaller number needs less memory. precision is that of training unless set to bf16 or fp32.

data=text and data=hub are scored whole (but for documents of white space only), python_stdlib and prepared by
their validation split; data.path= alone means data=text. Results go to eval/step_…-<data name>.json of the
run (of the folder itself, for an export) and to output=FILE: an object, or for several checkpoints a list.
What has been scored before is not scored again.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in the imports, which take seconds: no traceback

from training.command import command_line, run_command
from training.evaluate_checkpoints import EvalConfig, evaluate_checkpoints

IMPLIED_GROUPS = {"data": "text", "tokenizer": "file"}


def with_implied_groups(arguments: list[str]) -> list[str]:
    """Add data=text where a setting of data is given without a group, and tokenizer=file likewise."""
    implied = [
        f"{group}={choice}"
        for group, choice in IMPLIED_GROUPS.items()
        if any(argument.startswith(f"{group}.") for argument in arguments)
        and not any(argument.startswith(f"{group}=") for argument in arguments)
    ]
    return implied + arguments


if __name__ == "__main__":
    settings = with_implied_groups(command_line())
    run_command(evaluate_checkpoints, EvalConfig, __doc__, "eval", settings)
