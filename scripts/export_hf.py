"""Write a checkpoint as a folder that Hugging Face transformers loads.

    python -m scripts.export_hf checkpoint=outputs/demo output=outputs/demo-hf

The folder holds safetensors, config.json, the tokenizer, one modeling file (trust_remote_code=True) and a
model card. Before it gets its name it is loaded again and its logits are compared with the trained model's.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.tokenizer import SPACE_MARK, Tokenizer
from data.tokenizer_json import are_tied, user_defined, write_tokenizer_json
from models.config import ModelConfig
from models.standalone import FILE_NAME
from models.transnormer import TransNormer
from training.command import run_command
from training.errors import SettingError
from training.metrics import is_number, read_metrics
from training.model_folder import DTYPES, new_folder, write_model_folder
from training.weights import TrainedModel, find_model, load_model

TOLERANCE = 2e-5  # ‖Δ‖ / ‖reference‖ of fp32 logits
PROBE_TOKENS, PROBE_PREFILL, PROBE_PADDING = 80, 48, 33
PROBE_PIECES = 100
PROBE_TEXT = "def f(x):\n    return  x + 1  # ein Übungssatz, <s> 日本語 ﬁ ①\n  "


class ExportError(SettingError):
    """What was written is not the model that was trained."""


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """What to export, and where to."""

    checkpoint: str | None = None  # run folder, checkpoint, import or export
    output: str | None = None  # a folder that is not there yet
    dtype: str = "float32"  # of the stored weights: float32, bfloat16 or float16

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise SettingError(f"dtype={self.dtype!r} is unknown. Allowed: {', '.join(DTYPES)}.")


def main(config: ExportConfig) -> None:
    """Load, write, verify, and print what was compared."""
    path = find_model(config.checkpoint)
    if not config.output:
        raise SettingError("output is not set: give a folder that is not there yet, as output=outputs/x-hf.")
    trained = load_model(path, precision="fp32")
    with new_folder("output", config.output) as folder:
        write_model_folder(trained.model, trained.tokenizer, folder, config.dtype)
        write_tokenizer_json(trained.tokenizer, folder)
        (folder / "README.md").write_text(model_card(trained))
        trained.model.to(DTYPES[config.dtype]).float()  # what was stored, rounded as it was
        errors = verify(folder, trained.model)
        verify_tokenizer(folder, trained.tokenizer)
    compared = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    print(f"exported {path} to {config.output}; relative error of the logits: {compared}")


@torch.no_grad()
def verify(folder: Path, reference: TransNormer) -> dict[str, float]:
    """Load the folder with its own modeling file and compare logits in fp32 on the CPU.

    Returns:
        The relative error of prefill, step-by-step decode, and a left-padded batch.

    Raises:
        ExportError: one is above TOLERANCE.
    """
    exported = load_modeling_file(folder).TransnormerForCausalLM.from_pretrained(folder, dtype=torch.float32)
    exported.eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(reference.lm_head.out_features, (2, PROBE_TOKENS), generator=generator)
    expected = reference(tokens)
    errors = {"prefill": _relative_error(exported(tokens).logits, expected)}

    output = exported(tokens[:, :PROBE_PREFILL], use_cache=True)
    cache, steps = output[1], [output.logits]
    for position in range(PROBE_PREFILL, PROBE_TOKENS):
        steps.append(exported(tokens[:, position : position + 1], cache=cache).logits)
    errors["decode"] = _relative_error(torch.cat(steps, dim=1), expected)

    padded, mask = tokens.clone(), torch.ones_like(tokens)
    padded[1, :PROBE_PADDING], mask[1, :PROBE_PADDING] = 0, 0
    logits = exported(padded, attention_mask=mask).logits
    alone = reference(tokens[1:, PROBE_PADDING:])
    got = torch.cat([logits[0], logits[1, PROBE_PADDING:]])
    errors["left-padded batch"] = _relative_error(got, torch.cat([expected[0], alone[0]]))

    for name, error in errors.items():
        if not error <= TOLERANCE:
            raise ExportError(f"the export's logits of {name} differ by {error:.1e}, above {TOLERANCE}.")
    return errors


def verify_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """What transformers makes of tokenizer.json must give our ids, after BOS, and our text.

    Raises:
        ExportError: it does not.
    """
    from transformers import PreTrainedTokenizerFast

    loaded = PreTrainedTokenizerFast.from_pretrained(folder)
    pieces = [piece.replace(SPACE_MARK, " ") for piece in user_defined(tokenizer)[:PROBE_PIECES]]
    probe = PROBE_TEXT + "".join(f"a{piece}b" for piece in pieces)
    ids = tokenizer.encode(probe).tolist()
    found = loaded(probe, add_special_tokens=False).input_ids
    text = loaded.decode(ids, skip_special_tokens=True)
    same = found == ids or are_tied(tokenizer, ids, found)
    if not same or (text != tokenizer.decode(ids) and "\ufffd" not in tokenizer.decode(ids)):
        raise ExportError(
            f"transformers reads the exported {tokenizer.kind} tokenizer differently: {text!r}."
        )
    put_first = loaded("a").input_ids[: -len(loaded("a", add_special_tokens=False).input_ids)]
    specials = (put_first, loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id)
    expected = ([tokenizer.bos_id], tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    if specials != expected:
        raise ExportError(
            f"transformers reads the exported {tokenizer.kind} tokenizer's special ids differently: what is "
            f"put first, BOS, EOS and padding are {specials}, not {expected}."
        )


def load_modeling_file(folder: Path):
    """The exported modeling file as a module. We wrote it a moment ago: no other folder's is ever run."""
    name = f"exported_{FILE_NAME.removesuffix('.py')}"
    spec = importlib.util.spec_from_file_location(name, folder / FILE_NAME)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def model_card(trained: TrainedModel) -> str:
    """README.md: what the model is, how to load it, and the figures of its run."""
    config = trained.model.config
    figures = _figures(trained)
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    kind, notes = _attention_notes(config)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {config.name}

{kind}:
{config.num_layers} layers, hidden size {config.hidden_size}, {config.num_heads} heads,
vocabulary {config.vocab_size} ({trained.tokenizer.kind} tokenizer).

| | |
|---|---|
{rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

{notes}
"""


def _attention_notes(config: ModelConfig) -> tuple[str, str]:
    """What kind of model it is; and what its layers carry from token to token, and run on."""
    softmax = [str(layer + 1) for layer in range(config.num_layers) if config.uses_softmax(layer)]
    kernels = (
        "With the training repository's `kernels`\npackage on the path its Triton kernels run; without it, "
        "PyTorch does the same."
    )
    if not softmax:
        state = "The attention state has one size whatever the length of the text."
        return "A TransNormer language model", f"{state} {kernels}"
    if len(softmax) == config.num_layers:
        return "A language model of softmax attention", "Its cache of keys and values grows with the text."
    where = ", ".join(softmax)
    state = (
        "The state of a linear layer has one size whatever the length of the text; a softmax layer's\n"
        "cache of keys and values grows with it."
    )
    return (
        f"A model of linear (TransNormer) and softmax attention, softmax in layers {where}",
        f"{state} {kernels}",
    )


def _figures(trained: TrainedModel) -> dict[str, str]:
    """Parameters, and the last logged and validation figures up to the checkpoint's step."""
    figures = {"parameters": f"{trained.model.config.num_parameters():,}"}
    if trained.step is None:
        return figures
    figures |= {"optimizer steps": f"{trained.step:,}", "training tokens": f"{trained.tokens:,}"}
    shown = {
        "loss": "training loss (nats per token)",
        "valid_loss": "validation loss (nats per token)",
        "valid_perplexity": "validation perplexity",
        "valid_bits_per_byte": "validation bits per byte",
    }
    for line in read_metrics(trained.home.metrics):
        if line["step"] <= trained.step:
            figures |= {t: f"{line[key]:.4f}" for key, t in shown.items() if is_number(line.get(key))}
    return figures


if __name__ == "__main__":
    run_command(main, ExportConfig, __doc__)
