"""Checkpoints: safetensors and JSON keyed by parameter name, whole or absent, checked before they are used.

checkpoints/step_00001000/
    rank00000-00000.safetensors …   flat fp32 fragments of masters and moments, "<kind>/<name>@<start>"
    state.json                      step, tokens, counts: what the loop continues from
    config.yaml                     the run's settings
    tokenizer/                      the tokenizer, so that a checkpoint stands alone
    manifest.json                   size and SHA-256 of every file, shapes, versions, hashes
    manifest.sha256                 over the manifest, written last

A save writes into a temporary sibling, flushes everything to disk, and renames. A fragment is any run of
elements of a flattened parameter, so a checkpoint loads at any number of ranks and any ZeRO stage. Nothing
of it is unpickled or executed; names, sizes and headers are checked before anything large is read.
"""

from __future__ import annotations

import hashlib
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
    explain_write_errors,
    open_regular,
    open_to_others,
    read_json_object,
    read_limited,
    sha256_of,
    sync_folder,
    write_atomically,
    write_json,
)
from training.distributed import World
from training.engine import KINDS, MUON_KINDS, Fragment
from training.errors import SettingError

FORMAT = "transnormer-checkpoint-1"
MANIFEST, MANIFEST_HASH = "manifest.json", "manifest.sha256"
STEP_FOLDER = re.compile(r"step_\d{8,18}", re.ASCII)
WEIGHTS_FILE = re.compile(r"rank\d{5}-\d{5}\.safetensors")
SMALL_FILE = re.compile(r"state\.json|config\.yaml|tokenizer/\w[\w.-]{0,99}", re.ASCII)
FRAGMENT_KEY = re.compile(r"(\w+)/([\w.]+)@(\d{1,18})", re.ASCII)
BYTES_PER_PARAMETER = 4 * len(KINDS)
FILE_BYTES = 2 * 2**30  # a rank starts another file beyond this
MANIFEST_LIMIT_BYTES = 4 * 2**20  # 25,000 files; larger ones take long and much memory to parse
STATE_LIMIT_BYTES = 2**20
SMALL_FILE_BYTES = 64 * 2**20
HEADER_LIMIT_BYTES = 2**20  # of one file; that of tnl-175b at ZeRO stage 3 has 180 KB


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
        return read_json_object(self.folder / "state.json", STATE_LIMIT_BYTES)

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened parameter or moment, fp32, on the CPU."""
        pieces = []
        if (kind, name) not in self.fragments:
            raise CheckpointError(f"{self.folder} holds no {kind} of {name}: another optimizer saved it.")
        for piece_start, piece_numel, file, key in self.fragments[kind, name]:
            first, last = max(start, piece_start), min(start + numel, piece_start + piece_numel)
            if first < last:
                pieces.append(self.open_file(file).get_slice(key)[first - piece_start : last - piece_start])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def weights(self) -> dict[str, Tensor]:
        """All parameters, fp32, in their shapes."""
        return {
            name: self.read(name, "param", 0, math.prod(shape)).view(shape)
            for name, shape in self.shapes.items()
        }

    def open_file(self, name: str) -> Any:
        """A file of weights, mapped."""
        if name not in self._open_files:
            self._open_files[name] = safe_open(self.folder / name, framework="pt")
        return self._open_files[name]


class NonFiniteError(RuntimeError):
    """Weights or moments that are inf or nan: such a state is never saved."""


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
        NonFiniteError: a weight or moment is inf or nan; likewise.
    """
    final = root / f"step_{step:08d}"
    temporary = root / f".{final.name}.tmp"

    def begin() -> None:
        if world.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def write() -> dict[str, Any]:
        part = _write_fragments(temporary, fragments, world.rank)
        if world.is_first:
            write_files(temporary)
            write_json(temporary / "state.json", state)
            files = [path for path in temporary.rglob("*") if path.is_file()]
            names = [path.relative_to(temporary).as_posix() for path in files]
            small = filter(SMALL_FILE.fullmatch, names)  # not what other ranks are just writing
            part["files"] |= {name: _entry(temporary / name) for name in small}
        return part

    def finish() -> None:
        if world.is_first:
            _finish(temporary, final, parts, {"step": step, **facts})

    _on_all(world, temporary, begin)
    parts = _on_all(world, temporary, write)
    _on_all(world, temporary, finish)
    return final


def _on_all(world: World, temporary: Path, work: Callable[[], Any]) -> list[Any]:
    """Every rank's result of `work`; if it fails on any, all raise and the temporary folder is removed."""
    result, problem = None, None
    try:
        with explain_write_errors(temporary.parent):
            result = work()
    except Exception as error:  # every rank must hear of it, or the others wait for ever
        problem = error
    known = problem if isinstance(problem, (SettingError, NonFiniteError)) else None
    shared = known or (problem and RuntimeError(f"{type(problem).__name__}: {problem}"))
    outcomes = world.gather((result, shared))
    problems = [shared for _, shared in outcomes if shared is not None]
    if problems:
        if world.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise problem or problems[0]
    return [result for result, _ in outcomes]


def _write_fragments(folder: Path, fragments: Iterable[Fragment], rank: int) -> dict[str, Any]:
    """Write this rank's fragments in files of a bounded size; returns the part of the manifest about them."""
    files: dict[str, dict[str, Any]] = {}
    shapes: dict[str, list[int]] = {}
    tensors: dict[str, Tensor] = {}
    size = 0

    def flush() -> None:
        nonlocal size
        if tensors:
            path = folder / f"rank{rank:05d}-{len(files):05d}.safetensors"
            write_safetensors(path, tensors)
            files[path.name] = _entry(path)
            tensors.clear()
            size = 0

    for fragment in fragments:
        shapes[fragment.name] = list(fragment.shape)
        for kind, tensor in fragment.tensors.items():
            if size + tensor.nbytes > FILE_BYTES:
                flush()
            copy = tensor.to("cpu", copy=True)
            if not torch.isfinite(copy).all():
                raise NonFiniteError(f"{kind} of {fragment.name} is not finite")
            tensors[f"{kind}/{fragment.name}@{fragment.start}"] = copy
            size += copy.nbytes
    flush()
    return {"files": files, "shapes": shapes}


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors to the disk; one that is full raises an OSError, as with any other file."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # it hides the operating system's error: ask the disk again
        with open(path, "ab") as file:
            os.posix_fallocate(file.fileno(), 0, sum(t.nbytes for t in tensors.values()))
        raise OSError(f"{path}: {error}") from error
    open_to_others(path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _is_weights(name: str) -> bool:
    return WEIGHTS_FILE.fullmatch(name) is not None


def _entry(path: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _finish(temporary: Path, final: Path, parts: list[dict], facts: dict[str, Any]) -> None:
    """Write the manifest over everything in the folder, then its hash, then give it its name."""
    manifest: dict[str, Any] = {"format": FORMAT, **facts, "files": {}, "shapes": {}}
    for part in parts:
        manifest["files"] |= part["files"]
        manifest["shapes"] |= part["shapes"]
    write_json(temporary / MANIFEST, manifest)
    write_atomically(temporary / MANIFEST_HASH, _hash_line((temporary / MANIFEST).read_bytes()))
    shutil.rmtree(final, ignore_errors=True)  # only ever a damaged one that was passed over
    os.replace(temporary, final)
    sync_folder(final.parent)


def _hash_line(content: bytes) -> bytes:
    """What manifest.sha256 holds."""
    return (hashlib.sha256(content).hexdigest() + "\n").encode()


def open_checkpoint(folder: Path, verify: bool = True, share: tuple[int, int] = (0, 1)) -> Checkpoint:
    """Read and check a checkpoint before any of its values is used.

    Args:
        verify: also compare the files' SHA-256, not only their size.
        share: (rank, size), of ranks that open it together: each compares its share of the files.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    try:
        manifest = _read_manifest(folder)
        if (folder / "tokenizer").is_symlink():
            raise CheckpointError(f"{folder / 'tokenizer'} is a link: links are not followed.")
        for name, entry in manifest["files"].items():
            _check_file(folder, name, entry["bytes"])
        checkpoint = _index(folder, manifest)
        for name, entry in list(manifest["files"].items())[share[0] :: share[1]]:
            if verify and sha256_of(folder / name) != entry["sha256"]:
                raise CheckpointError(f"{folder / name} is damaged: its SHA-256 is not that of {MANIFEST}.")
        return checkpoint
    except CheckpointError:
        raise
    except (DataError, OSError) as error:
        raise CheckpointError(str(error)) from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"{folder / MANIFEST} is malformed ({type(error).__name__}: {str(error)[:80]})."
        ) from None


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST_HASH).exists():
        raise CheckpointError(f"{folder} is not a complete checkpoint: {MANIFEST_HASH} is missing.")
    expected = read_limited(folder / MANIFEST_HASH, SMALL_FILE_BYTES)
    content = read_limited(folder / MANIFEST, MANIFEST_LIMIT_BYTES)
    if _hash_line(content) != expected:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: its SHA-256 is not that of {MANIFEST_HASH}.")
    manifest = read_json_object(folder / MANIFEST, MANIFEST_LIMIT_BYTES)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / MANIFEST}: format {str(manifest.get('format'))[:40]!r}, expected {FORMAT!r}."
        )
    step = manifest["step"]
    if type(step) is not int or (STEP_FOLDER.fullmatch(folder.name) and step_of(folder) != step):
        raise CheckpointError(f"{folder / MANIFEST} is that of step {str(step)[:20]}.")
    return manifest


def _check_file(folder: Path, name: str, expected_bytes: int) -> None:
    """A regular file inside the checkpoint, of a kind that belongs there, through no link, of that size."""
    if not _is_weights(name) and not SMALL_FILE.fullmatch(name):
        raise CheckpointError(
            f"{folder / MANIFEST} lists {name[:80]!r}, which does not belong in a checkpoint."
        )
    path = folder / name
    descriptor = open_regular(path)
    size = os.fstat(descriptor).st_size
    os.close(descriptor)
    if size != expected_bytes:
        raise CheckpointError(f"{path} is damaged: {size} bytes instead of {str(expected_bytes)[:20]}.")
    if not _is_weights(name) and size > SMALL_FILE_BYTES:
        raise CheckpointError(
            f"{path} is larger than {SMALL_FILE_BYTES} bytes: it can't be a file of this kind."
        )


def _index(folder: Path, manifest: dict[str, Any]) -> Checkpoint:
    """Find the fragments in the files' headers, and check that those of each tensor cover it exactly."""
    shapes = {name: _shape(shape) for name, shape in manifest["shapes"].items()}
    checkpoint = Checkpoint(folder, manifest, {}, shapes)
    for file in filter(_is_weights, manifest["files"]):
        with open(folder / file, "rb") as content:
            header_bytes = int.from_bytes(content.read(8), "little")
        if header_bytes > HEADER_LIMIT_BYTES:
            raise CheckpointError(f"{folder / file}: its header is too large.")
        try:
            stored = checkpoint.open_file(file)
            for key in stored.keys():  # noqa: SIM118 (no dictionary)
                piece = stored.get_slice(key)
                match = FRAGMENT_KEY.fullmatch(key)
                if match is None or piece.get_dtype() != "F32" or len(piece.get_shape()) != 1:
                    raise CheckpointError(f"{folder / file}: {key[:80]} is not a 1-D fp32 tensor.")
                kind, name, start = match.groups()
                fragment = (int(start), piece.get_shape()[0], file, key)
                checkpoint.fragments.setdefault((kind, name), []).append(fragment)
        except SafetensorError as error:
            raise CheckpointError(f"{folder / file} can't be read: {str(error)[:80]}.") from None
    kinds: dict[str, set[str]] = {}
    for kind, name in checkpoint.fragments:
        kinds.setdefault(name, set()).add(kind)
    known = (set(KINDS), set(MUON_KINDS))
    if kinds.keys() != shapes.keys() or not all(found in known for found in kinds.values()):
        raise CheckpointError(f"{folder}: its files hold other tensors than {MANIFEST} says.")
    for (kind, name), pieces in checkpoint.fragments.items():
        pieces.sort()
        position = 0
        for start, numel, file, _ in pieces:
            if start != position:
                raise CheckpointError(
                    f"{folder / file}: {kind} of {name} has a gap or an overlap at {position}."
                )
            position += numel
        if position != math.prod(shapes[name]):
            raise CheckpointError(f"{folder}: {kind} of {name} is incomplete.")
    return checkpoint


def _shape(sizes: list[int]) -> tuple[int, ...]:
    if len(sizes) > 4 or not all(type(size) is int and 0 <= size < 2**48 for size in sizes):
        raise ValueError(f"shape {str(sizes)[:40]}")
    return tuple(sizes)


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first, complete or not; temporary ones are left out."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if STEP_FOLDER.fullmatch(path.name) and not path.is_symlink()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(folder.name.removeprefix("step_"))


def newest_checkpoint(root: Path, log: Callable[[str], None] = print) -> Checkpoint | None:
    """`newest_of` a run's checkpoints folder."""
    return newest_of(list_checkpoints(root), log)


def newest_of(
    folders: list[Path],
    log: Callable[[str], None],
    opened: Callable[[Path], Checkpoint] = open_checkpoint,
) -> Checkpoint | None:
    """The first that passes every check; says which damaged ones it passed over. None if there are none.

    Args:
        opened: opens and checks one, or raises.

    Raises:
        CheckpointError: there are some, but none passes; with what is wrong with the first.
    """
    problems: list[str] = []
    for folder in folders:
        try:
            checkpoint = opened(folder)
        except SettingError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            log(f"passing over a damaged checkpoint: {problem}")
        return checkpoint
    if problems:
        raise CheckpointError(
            f"{folders[0].parent}: none of {len(folders)} checkpoints is complete and undamaged "
            f"({problems[0]})."
        )
    return None


def remove_old(root: Path, keep: int, saved_step: int) -> None:
    """Keep the newest `keep` checkpoints and remove the others, and temporaries of killed saves.

    A folder of a later step than the one just saved was passed over as damaged when the run was resumed:
    it doesn't count, and stays until its step is reached again.
    """
    for path in root.glob(".step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    folders = [folder for folder in list_checkpoints(root) if step_of(folder) <= saved_step]
    kept = [folder for folder in folders if (folder / MANIFEST_HASH).exists()][:keep]
    for folder in folders[folders.index(kept[-1]) + 1 :]:  # some perhaps half removed when a run was killed
        (folder / MANIFEST_HASH).unlink(missing_ok=True)  # invalid from here on, however far removal gets
        shutil.rmtree(folder, ignore_errors=True)
