"""Take published or exported weights in.

    python -m scripts.import_hf source=DIR run_dir=outputs/published

reads config.json, the weights (safetensors, or pytorch_model.bin, of which only tensors are made) and the
tokenizer, runs nothing that lies beside them, checks that everything fits, and writes a folder that
checkpoint= and init_from= take.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from data.tokenizer import INFO_FILE
from training.command import run_command
from training.errors import SettingError
from training.model_folder import ModelFolder, is_model_folder, new_folder, write_model_folder
from training.weights import TrainedModel, load_model


@dataclass(kw_only=True, slots=True)
class ImportConfig:
    """What to take in, and where to."""

    source: str | None = None  # folder with config.json, weights and a tokenizer
    run_dir: str | None = None  # a folder that is not there yet


VOCABULARY_MULTIPLE = 128  # what an embedding's rows are rounded up to, at most


def check_padding(trained: TrainedModel, source: Path) -> None:
    """Refuse a foreign tokenizer that is too small to be the one that the model was trained with.

    Raises:
        SettingError: names both sizes.
    """
    rows, ids = trained.model.lm_head.out_features, trained.tokenizer.vocab_size
    if (
        not (source / INFO_FILE).exists()
        and rows > math.ceil(ids / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    ):
        raise SettingError(
            f"{source}: the tokenizer has {ids} ids, config.json a vocab_size of {rows}. "
            "They belong to different models."
        )


def main(config: ImportConfig) -> None:
    """Read, check, write, and say what it is."""
    if not config.source or not config.run_dir:
        raise SettingError("source and run_dir must be set: source=DIR run_dir=outputs/NAME.")
    source = Path(config.source)
    if not is_model_folder(source):
        raise SettingError(f"source={source}: no folder with a config.json.")
    trained = load_model(source, precision="fp32")
    assert isinstance(trained.source, ModelFolder)
    dtype = trained.source.stored_dtype()  # its config.json may say less
    check_padding(trained, source)
    with new_folder("run_dir", config.run_dir) as folder:
        write_model_folder(trained.model, trained.tokenizer, folder, dtype)
    model = trained.model.config
    head = "tied" if model.tie_embeddings else "separate"
    print(
        f"imported {model.num_parameters():,} parameters ({model.num_layers} layers, hidden size "
        f"{model.hidden_size}, vocabulary {model.vocab_size}, {head} head, {dtype}): "
        f"use it with checkpoint={config.run_dir} or init_from={config.run_dir}"
    )


if __name__ == "__main__":
    run_command(main, ImportConfig, __doc__)
