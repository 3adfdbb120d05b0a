"""A model's folder in the published layout: a checkpoint from elsewhere, an import, or an export.

config.json                     the fields of models/published.py, and transformers' own
model.safetensors               or model-00001-of-00002.safetensors … with model.safetensors.index.json; in an
                                older folder pytorch_model.bin, or its parts with pytorch_model.bin.index.json
tokenizer.model, tokenizer.json … as data/tokenizer.py reads them; an export has both
modeling_transnormer.py         for transformers; never read by us

Everything read is checked first: no link is followed, nothing is executed, and of a pickle nothing but
tensors is made (torch.load's weights_only).
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.files import (
    check_plain_name,
    explain_write_errors,
    open_regular,
    read_json_object,
    sha256_of,
    sync_folder,
    write_atomically,
    write_json,
)
from data.tokenizer import Tokenizer
from models.config import ModelConfig
from models.published import FIELDS, model_config_from_published, published_fields
from models.standalone import FILE_NAME, standalone_source
from models.transnormer import TransNormer
from training.checkpoint import CheckpointError, write_safetensors

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
JSON_LIMIT_BYTES = 64 * 2**20
SHARD_BYTES = 5 * 10**9
SUPPRESSED_IDS = 1024  # listed in generation_config.json, at most
METADATA = {"format": "pt"}  # of the weights, for transformers
# fields of transformers that don't change what the model computes
METADATA_FIELDS = (
    "_name_or_path",
    "add_bos_token",
    "architectures",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "model_type",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
MIXER = "model.layers.0.token_mixer."
# code that published folders and our exports bring along; we have our own of it
KNOWN_CODE = re.compile(r"(configuration|modeling)_transnormer\.\w+")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED_DTYPES = {*DTYPES.values(), torch.float64}  # of tensors; others are codes of a quantised model


@dataclass(slots=True)
class ModelFolder:
    """A folder whose config.json and tensor names have been read and checked.

    Attributes:
        files: tensor name to the file that holds it.
        dtype: of the weights, as config.json says ("float32" if it does not); `stored_dtype` looks at them.
    """

    path: Path
    config: ModelConfig
    files: dict[str, Path]
    dtype: str

    @property
    def hash(self) -> str:
        """Equal for equal settings and weight files."""
        names = sorted({CONFIG, *(file.name for file in self.files.values())})
        text = "\n".join(f"{name} {sha256_of(self.path / name)}" for name in names)
        return hashlib.sha256(text.encode()).hexdigest()

    def stored_dtype(self) -> str:
        """The one dtype of all weights but LRPE's frequencies; float32 if they have several, or float64."""
        stored = {
            tensor.dtype for name, tensor in _read_tensors(self.files) if not name.endswith("lrpe.theta")
        }
        return next((name for name, dtype in DTYPES.items() if stored == {dtype}), "float32")

    def weights(self) -> dict[str, Tensor]:
        """Parameters by the model's own names, in their stored dtype; a tied head is left out."""
        weights = dict(_read_tensors(self.files))
        for name, tensor in weights.items():
            if tensor.dtype not in STORED_DTYPES:
                dtype = str(tensor.dtype).removeprefix("torch.")
                raise CheckpointError(
                    f"{self.files[name]}: {name} is stored as {dtype}; allowed are float32, "
                    "bfloat16, float16, float64. Convert a quantised model back first."
                )
        if self.config.gate == "low_rank":
            weights = _name_low_rank_gate(weights, self.config, self.path)
        head = weights.get("lm_head.weight")
        if self.config.tie_embeddings and head is not None:
            embedding = weights.get("model.embed_tokens.weight")
            if embedding is not None and not torch.equal(head, embedding):
                raise CheckpointError(
                    f"{self.path / CONFIG}: tie_word_embeddings is true, but lm_head.weight differs from "
                    "model.embed_tokens.weight. Set it to false."
                )
            del weights["lm_head.weight"]
        return weights


def is_model_folder(path: Path) -> bool:
    """Whether a folder has a model's config.json."""
    return (path / CONFIG).is_file()


def open_model_folder(path: Path) -> ModelFolder:
    """Read and check config.json and the list of tensors.

    Raises:
        CheckpointError, DataError: names the file and what is wrong with it, in one line.
    """
    fields = read_json_object(path / CONFIG, JSON_LIMIT_BYTES)
    _check_fields(fields, path / CONFIG)
    files = _tensor_files(path)
    layers = fields.get("decoder_layers")
    if isinstance(layers, int) and layers > len(files):  # before anything is made for each layer
        raise CheckpointError(
            f"{path / CONFIG}: {layers} layers are more than there are tensors, {len(files)}."
        )
    try:
        config = model_config_from_published(fields, name=path.resolve().name)
        if "gate" not in fields:
            config = replace(config, **_gate_of(path, files, config))
    except ValueError as error:
        raise CheckpointError(f"{path / CONFIG}: {error}") from None
    if "tie_word_embeddings" not in fields:
        config = replace(config, tie_embeddings=_heads_are_equal(files))
    dtype = fields.get("dtype") or fields.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise CheckpointError(f"{path / CONFIG}: dtype={dtype!r} is unknown. Allowed: {', '.join(DTYPES)}.")
    return ModelFolder(path, config, files, dtype)


def _check_fields(fields: dict[str, Any], where: Path) -> None:
    """Refuse another architecture, fields that nobody here understands, and code."""
    if fields.get("model_type", "transnormer") != "transnormer":
        raise CheckpointError(
            f"{where}: model_type={str(fields['model_type'])[:40]!r}, only 'transnormer' is known."
        )
    unknown = sorted(set(fields) - set(FIELDS) - set(METADATA_FIELDS))
    if unknown:
        raise CheckpointError(f"{where}: unknown fields {', '.join(unknown)[:200]}.")
    auto_map = fields.get("auto_map") or {}
    references = list(auto_map.values()) if isinstance(auto_map, dict) else [auto_map]
    foreign = [str(name)[:80] for name in references if not KNOWN_CODE.fullmatch(str(name))]
    if foreign:
        raise CheckpointError(
            f"{where}: auto_map asks to run {', '.join(foreign)}: no code of a folder is run. Remove it."
        )


def _tensor_files(path: Path) -> dict[str, Path]:
    """Each tensor's name and file, from the index or the only file."""
    weight_map = None
    first = next((name for name in (INDEX, WEIGHTS, PICKLED_INDEX, PICKLED) if (path / name).exists()), None)
    if first is None:
        raise CheckpointError(f"{path} holds none of {WEIGHTS}, {INDEX}, {PICKLED}, {PICKLED_INDEX}.")
    names = [first]
    if first in (INDEX, PICKLED_INDEX):
        weight_map = read_json_object(path / first, JSON_LIMIT_BYTES).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{path / first}: has no weight_map.")
        names = sorted({check_plain_name(name, str(path / first)) for name in weight_map.values()})
    files: dict[str, Path] = {}
    for name in names:
        with _open_tensors(path / name) as tensors:
            files |= dict.fromkeys(tensors.keys(), path / name)
    if weight_map is not None:
        wrong = sorted(key for key in weight_map if files.get(key) != path / weight_map[key])
        wrong += sorted(set(files) - set(weight_map))
        if wrong:
            raise CheckpointError(f"{path / first} does not fit its files: {', '.join(wrong[:5])[:200]}.")
    return files


class _Unpickled(dict[str, Tensor]):
    """The tensors of a pickle, read as those of a safetensors file are."""

    get_tensor = dict.__getitem__

    def __enter__(self) -> _Unpickled:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


def _open_tensors(file: Path):
    """Open a safetensors file, or a pickle that is called .bin; no link."""
    os.close(open_regular(file))
    if file.suffix == ".bin":
        return _unpickle(file)
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{file} is not a safetensors file ({error}).") from None


def _unpickle(file: Path) -> _Unpickled:
    """Map the tensors that `torch.save` wrote; whatever else is in the file is refused, and not run."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise CheckpointError(f"{file} holds other objects than tensors: they are not made.") from None
    except (RuntimeError, EOFError, ValueError, TypeError, KeyError):
        raise CheckpointError(f"{file} is damaged, or not what torch.save has written since 1.6.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a dictionary of tensors, not {type(content).__name__}.")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise CheckpointError(f"{file}: {str(name)[:80]} is not a tensor.")
    return _Unpickled(content)


def _read_tensors(files: dict[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """Yield each name of `files` with its tensor, file by file."""
    for file in sorted(set(files.values())):
        with _open_tensors(file) as tensors:
            for name, holder in files.items():
                if holder == file:
                    yield name, tensors.get_tensor(name)


def _heads_are_equal(files: dict[str, Path]) -> bool:
    """Tied, as an older config.json leaves unsaid: no head is stored, or it equals the embedding."""
    both = ("lm_head.weight", "model.embed_tokens.weight")
    if not all(name in files for name in both):
        return True
    (_, first), (_, second) = _read_tensors({name: files[name] for name in both})
    return torch.equal(first, second)


def _gate_of(path: Path, files: dict[str, Path], config: ModelConfig) -> dict[str, Any]:
    """What kind of gate the tensors of layer 0 show, where config.json does not say it."""
    if MIXER + "qkvu_proj.weight" in files:
        return {}
    of_mixer = {name: file for name, file in files.items() if name.startswith(MIXER)}
    shapes = {name: tuple(tensor.shape) for name, tensor in _read_tensors(of_mixer)}
    narrow = [min(shape) for shape in shapes.values() if len(shape) == 2 and min(shape) < config.hidden_size]
    if len(narrow) == 2 and narrow[0] == narrow[1]:
        return {"gate": "low_rank", "gate_size": narrow[0]}
    listed = ", ".join(f"{name.removeprefix(MIXER)} {shape}" for name, shape in sorted(shapes.items()))
    raise CheckpointError(f"{path}: no gate that is known among layer 0's tensors: {listed or 'none'}.")


def _name_low_rank_gate(weights: dict[str, Tensor], config: ModelConfig, path: Path) -> dict[str, Tensor]:
    """Give TNL3's projections our names if they have others, by shape: (3D, D), (gate, D) and (D, gate)."""
    hidden, gate = config.hidden_size, config.gate_size
    names: dict[tuple[int, ...], str] = {
        (3 * hidden, hidden): "qkv_proj.weight",
        (gate, hidden): "gate_proj.0.weight",
        (hidden, gate): "gate_proj.1.weight",
    }
    if all(MIXER + name in weights for name in names.values()):
        return weights
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        mixer, found, _ = name.partition(".token_mixer.")
        ours = names.get(tuple(tensor.shape)) if found else None
        key = f"{mixer}.token_mixer.{ours}" if ours else name
        if key in renamed:
            raise CheckpointError(f"{path}: {name} and another tensor both look like {key}.")
        renamed[key] = tensor
    return renamed


@contextmanager
def new_folder(setting: str, path: str) -> Iterator[Path]:
    """Yield a temporary sibling that becomes `path` at the end, or is removed if anything goes wrong.

    Raises:
        CheckpointError: names `setting`; the folder is there already.
    """
    final = Path(path)
    if final.is_symlink() or (final.exists() and (not final.is_dir() or any(final.iterdir()))):
        raise CheckpointError(f"{setting}={path} exists: nothing is overwritten. Choose another folder.")
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with explain_write_errors(final):
            yield temporary
            if final.exists():
                final.rmdir()
            os.replace(temporary, final)
            sync_folder(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_model_folder(
    model: TransNormer, tokenizer: Tokenizer, folder: Path, dtype: str = "float32"
) -> None:
    """Write weights, config.json, generation_config.json, tokenizer and modeling file into a new folder.

    Args:
        dtype: of the stored weights; LRPE's frequencies are fp32 in any case.
    """
    folder.mkdir(parents=True)
    weights = {}
    for name, parameter in model.named_parameters():
        kept = torch.float32 if name.endswith("lrpe.theta") else DTYPES[dtype]
        weights[name] = parameter.detach().to("cpu", kept)
    _write_weights(weights, folder)
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_id") for role in ("pad", "bos", "eos")}
    class_prefix = FILE_NAME.removesuffix(".py")
    transformers_fields = {
        "model_type": "transnormer",
        "architectures": ["TransnormerForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{class_prefix}.TransnormerConfig",
            "AutoModelForCausalLM": f"{class_prefix}.TransnormerForCausalLM",
        },
        "dtype": dtype,
        "use_cache": True,
    }
    write_json(folder / CONFIG, published_fields(model.config) | transformers_fields | ids)
    unused = list(range(tokenizer.vocab_size, model.config.num_ids))  # of a padded vocabulary, never trained
    suppressed = {"suppress_tokens": unused} if 0 < len(unused) <= SUPPRESSED_IDS else {}
    write_json(folder / "generation_config.json", ids | {"do_sample": False} | suppressed)
    tokenizer.save(folder)
    write_atomically(folder / FILE_NAME, standalone_source().encode())


def _write_weights(weights: dict[str, Tensor], folder: Path) -> None:
    """One file, or shards of at most SHARD_BYTES (or one tensor) with an index."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in weights.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    if len(shards) == 1:
        write_safetensors(folder / WEIGHTS, shards[0], METADATA)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard, METADATA)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / INDEX, index)
