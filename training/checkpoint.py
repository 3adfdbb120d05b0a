"""Checkpoints: safetensors and JSON keyed by parameter name, whole or absent, checked before they are used.

checkpoints/step_00001000/
    rank00000-00000.safetensors …   flat fp32 fragments of masters and moments, "<kind>/<name>@<start>"
    state.json                      step, tokens, counts: what the loop continues from
    config.yaml                     the run's settings
    tokenizer/                      the tokenizer, so that a checkpoint stands alone
    manifest.json                   size and SHA-256 of every file, shapes, fragments, versions, hashes
    manifest.sha256                 over the manifest, written last

A save writes into a temporary sibling, flushes everything to disk, and renames. A fragment is any run of
elements of a flattened parameter, so a checkpoint loads at any number of ranks and any ZeRO stage. Nothing
of it is unpickled or executed.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.errors import DataError
from data.files import (
    PLAIN_NAME,
    explain_write_errors,
    read_json_object,
    sha256_of,
    sync_folder,
    write_atomically,
    write_json,
)
from training.distributed import World
from training.engine import KINDS, Fragment
from training.errors import SettingError

FORMAT = "transnormer-checkpoint-1"
MANIFEST, MANIFEST_HASH = "manifest.json", "manifest.sha256"
STEP_FOLDER = re.compile(r"step_(\d{8,})")
FILE_BYTES = 2 * 2**30  # a rank starts another file beyond this
MANIFEST_LIMIT_BYTES = 256 * 2**20


class CheckpointError(SettingError):
    """A checkpoint that is missing, damaged, or of something else."""


@dataclass(slots=True)
class Checkpoint:
    """A checkpoint whose manifest has been read and whose files have the stated sizes.

    Attributes:
        folder: where it lies.
        manifest: the parsed manifest.json.
        fragments: (kind, name) to [(start, numel, file, key)], sorted, covering the parameter.
        shapes: parameter name to shape.
    """

    folder: Path
    manifest: dict[str, Any]
    fragments: dict[tuple[str, str], list[tuple[int, int, str, str]]]
    shapes: dict[str, tuple[int, ...]]
    _open_files: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def hash(self) -> str:
        """SHA-256 of the manifest: equal hashes mean equal checkpoints."""
        return sha256_of(self.folder / MANIFEST)

    def state(self) -> dict[str, Any]:
        """What the loop saved: counts and positions."""
        return read_json_object(self.folder / "state.json", MANIFEST_LIMIT_BYTES)

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened parameter or moment, fp32, on the CPU."""
        pieces = []
        for piece_start, piece_numel, file, key in self.fragments[kind, name]:
            first, last = max(start, piece_start), min(start + numel, piece_start + piece_numel)
            if first < last:
                pieces.append(self._file(file).get_slice(key)[first - piece_start : last - piece_start])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def weights(self) -> dict[str, Tensor]:
        """All parameters, fp32, in their shapes."""
        return {
            name: self.read(name, "param", 0, math.prod(shape)).view(shape)
            for name, shape in self.shapes.items()
        }

    def _file(self, name: str) -> Any:
        if name not in self._open_files:
            self._open_files[name] = safe_open(self.folder / name, framework="pt")
        return self._open_files[name]


def save_checkpoint(
    root: Path,
    *,
    step: int,
    fragments: Iterable[Fragment],
    world: World,
    write_files: Callable[[Path], None],
    state: dict[str, Any],
    facts: dict[str, Any],
) -> Path:
    """Save from all ranks together; returns the checkpoint's folder.

    Args:
        root: the run's checkpoints folder.
        fragments: this rank's part of the state.
        write_files: called on the first rank to put config.yaml and tokenizer/ into the folder.
        state: JSON of what the loop continues from.
        facts: further entries of the manifest (versions, hashes, world size, stage).

    Raises:
        DataError: no space, or the folder can't be written; on every rank, with nothing left behind.
    """
    final = root / f"step_{step:08d}"
    temporary = root / f".{final.name}.tmp"
    problem: Exception | None = None
    written: dict[str, Any] = {}
    if world.is_first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True, exist_ok=True)
    world.barrier()
    try:
        with explain_write_errors(temporary):
            written = _write_fragments(temporary, fragments, world.rank)
            if world.is_first:
                write_files(temporary)
                write_json(temporary / "state.json", state)
    except Exception as error:  # every rank must hear of it, or the others wait for ever
        problem = error
    problems = [text for text in world.gather(None if problem is None else str(problem)) if text]
    parts = world.gather(written)
    if not problems and world.is_first:
        try:
            with explain_write_errors(temporary):
                _finish(temporary, final, parts, {"step": step, **facts})
        except Exception as error:
            problem, problems = error, [str(error)]
    problems = world.from_first(problems)
    if problems:
        if world.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise problem or DataError(problems[0])
    return final


def _write_fragments(folder: Path, fragments: Iterable[Fragment], rank: int) -> dict[str, Any]:
    """Write this rank's fragments in files of a bounded size; returns the part of the manifest about them."""
    entries: list[list[Any]] = []  # kind, name, start, numel, file, key
    shapes: dict[str, list[int]] = {}
    tensors: dict[str, Tensor] = {}
    num_files = size = 0

    def flush() -> None:
        nonlocal num_files, size, tensors
        if tensors:
            _write_safetensors(folder / f"rank{rank:05d}-{num_files:05d}.safetensors", tensors)
            num_files, size, tensors = num_files + 1, 0, {}

    for fragment in fragments:
        shapes[fragment.name] = list(fragment.shape)
        for kind, tensor in fragment.tensors.items():
            if size + tensor.nbytes > FILE_BYTES:
                flush()
            key = f"{kind}/{fragment.name}@{fragment.start}"
            tensors[key] = tensor.to("cpu", copy=True)
            size += tensor.nbytes
            file = f"rank{rank:05d}-{num_files:05d}.safetensors"
            entries.append([kind, fragment.name, fragment.start, tensor.numel(), file, key])
    flush()
    return {"fragments": entries, "shapes": shapes}


def _write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # it hides the operating system's error: ask the disk again
        with open(path, "ab") as file:
            os.posix_fallocate(file.fileno(), 0, sum(t.nbytes for t in tensors.values()))
        raise OSError(f"{path}: {error}") from error
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _finish(temporary: Path, final: Path, parts: list[dict], facts: dict[str, Any]) -> None:
    """Write the manifest over everything in the folder, then its hash, then give it its name."""
    shapes: dict[str, list[int]] = {}
    for part in parts:
        shapes |= part["shapes"]
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    manifest = {
        "format": FORMAT,
        **facts,
        "files": {
            path.relative_to(temporary).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in files
        },
        "shapes": shapes,
        "fragments": [entry for part in parts for entry in part["fragments"]],
    }
    write_json(temporary / MANIFEST, manifest)
    write_atomically(temporary / MANIFEST_HASH, (sha256_of(temporary / MANIFEST) + "\n").encode())
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    sync_folder(final.parent)


def open_checkpoint(folder: Path, verify: bool = True) -> Checkpoint:
    """Read and check a checkpoint before any of its values is used.

    Args:
        verify: also compare every file's SHA-256, not only its size.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    try:
        manifest = _read_manifest(folder)
        for name, entry in manifest["files"].items():
            _check_file(folder, name, entry, verify)
        return _index(folder, manifest)
    except CheckpointError:
        raise
    except (DataError, OSError) as error:
        raise CheckpointError(str(error)) from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / MANIFEST} is malformed ({type(error).__name__}: {error})."
        ) from None


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST_HASH).exists():
        raise CheckpointError(f"{folder} is no complete checkpoint: {MANIFEST_HASH} is missing.")
    expected = (folder / MANIFEST_HASH).read_text()[:100].strip()
    if sha256_of(folder / MANIFEST) != expected:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: its SHA-256 is not that of {MANIFEST_HASH}.")
    manifest = read_json_object(folder / MANIFEST, MANIFEST_LIMIT_BYTES)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder / MANIFEST}: format {manifest.get('format')!r}, expected {FORMAT!r}.")
    return manifest


def _check_file(folder: Path, name: str, entry: dict[str, Any], verify: bool) -> None:
    """A regular file inside the checkpoint, reached through no link, with the stated size and hash."""
    parts = name.split("/")
    if len(parts) > 2 or not all(PLAIN_NAME.fullmatch(part) and ".." not in part for part in parts):
        raise CheckpointError(
            f"{folder / MANIFEST} names the file {name[:80]!r}: only plain names are allowed."
        )
    path = folder / name
    if len(parts) == 2 and (folder / parts[0]).is_symlink():
        raise CheckpointError(f"{folder / parts[0]} is a link: links are not followed.")
    if not path.exists() and not path.is_symlink():
        raise CheckpointError(f"{path} is missing.")
    if path.lstat().st_size != entry["bytes"]:
        raise CheckpointError(f"{path} is damaged: {path.lstat().st_size} bytes instead of {entry['bytes']}.")
    if verify and sha256_of(path) != entry["sha256"]:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not that of {MANIFEST}.")


def _index(folder: Path, manifest: dict[str, Any]) -> Checkpoint:
    """Check that the fragments of each tensor cover it exactly and lie in the files as stated."""
    shapes = {name: tuple(int(size) for size in shape) for name, shape in manifest["shapes"].items()}
    checkpoint = Checkpoint(folder, manifest, {}, shapes)
    for kind, name, start, numel, file, key in manifest["fragments"]:
        if file not in manifest["files"]:
            raise CheckpointError(
                f"{folder / MANIFEST}: fragment {key[:80]!r} lies in unlisted file {file[:80]!r}."
            )
        checkpoint.fragments.setdefault((kind, name), []).append((int(start), int(numel), file, key))
    for name, shape in shapes.items():
        for kind in KINDS:
            pieces = checkpoint.fragments.setdefault((kind, name), [])
            pieces.sort()
            position = 0
            for start, numel, file, key in pieces:
                if start != position:
                    break
                try:
                    stored = checkpoint._file(file).get_slice(key)
                except SafetensorError as error:
                    raise CheckpointError(f"{folder / file} can't be read: {error}.") from None
                if stored.get_dtype() != "F32" or stored.get_shape() != [numel]:
                    raise CheckpointError(f"{folder / file}: {key} is not {numel} fp32 numbers.")
                position += numel
            if position != math.prod(shape):
                raise CheckpointError(f"{folder}: {kind} of {name} is incomplete.")
    return checkpoint


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first, complete or not; temporary ones are left out."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if STEP_FOLDER.fullmatch(path.name) and not path.is_symlink()]
    return sorted(found, key=lambda path: int(STEP_FOLDER.fullmatch(path.name)[1]), reverse=True)


def newest_checkpoint(root: Path, log: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest checkpoint that passes every check; says which damaged ones it passed over."""
    for folder in list_checkpoints(root):
        try:
            return open_checkpoint(folder)
        except CheckpointError as error:
            log(f"passing over a damaged checkpoint: {error}")
    return None


def remove_old(root: Path, keep: int) -> None:
    """Keep the newest `keep` checkpoints and remove the others, and temporaries of killed saves."""
    for path in root.glob(".step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    for folder in list_checkpoints(root)[keep:]:
        (folder / MANIFEST_HASH).unlink(missing_ok=True)  # invalid from here on, however far removal gets
        shutil.rmtree(folder, ignore_errors=True)
