"""Saving and opening checkpoints: files of other ranks, and of many."""

import torch

from training.checkpoint import (
    MANIFEST_HASH,
    _finish,
    _write_fragments,
    open_checkpoint,
    remove_old,
    save_checkpoint,
)
from training.distributed import World
from training.engine import Fragment

KINDS = ("param", "exp_avg", "exp_avg_sq")


def test_a_file_that_another_rank_is_writing_is_not_listed(tmp_path):
    """safetensors writes under a temporary name in the folder that the first rank lists."""

    def write_files(folder):
        (folder / "config.yaml").write_text("{}")
        (folder / ".tmpAbC123").write_bytes(b"half a file")

    fragment = Fragment("weight", (4,), 0, {kind: torch.arange(4.0) for kind in KINDS})
    saved = save_checkpoint(
        tmp_path,
        step=1,
        fragments=[fragment],
        world=World(0, 1, torch.device("cpu")),
        write_files=write_files,
        state={},
        facts={},
    )
    assert set(open_checkpoint(saved).manifest["files"]) == {
        "config.yaml",
        "state.json",
        "rank00000-00000.safetensors",
    }


def test_a_checkpoint_of_many_ranks_is_read_back(tmp_path):
    """At stage 3 every rank's file names every parameter: hundreds of ranks have large headers together."""
    num_ranks, names = 36, [f"layers.{index}.{'x' * 200}" for index in range(600)]
    temporary, parts = tmp_path / "temporary", []
    temporary.mkdir()
    for rank in range(num_ranks):
        tensors = {kind: torch.full((1,), float(rank)) for kind in KINDS}
        fragments = [Fragment(name, (num_ranks,), rank, tensors) for name in names]
        parts.append(_write_fragments(temporary, fragments, rank))
    _finish(temporary, tmp_path / "step_00000001", parts, {"step": 1})
    opened = open_checkpoint(tmp_path / "step_00000001")
    assert sum(entry["bytes"] for entry in opened.manifest["files"].values()) > 16 * 2**20
    values = opened.read(names[-1], "param", 0, num_ranks)
    assert values.tolist() == [float(rank) for rank in range(num_ranks)]


def test_what_a_killed_removal_has_left_goes_too(tmp_path):
    for step in (1, 2, 3, 4):
        folder = tmp_path / f"step_{step:08d}"
        folder.mkdir()
        if step not in (1, 3):  # whose hash goes first
            (folder / MANIFEST_HASH).touch()
    remove_old(tmp_path, keep=2, saved_step=4)
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["2", "3", "4"]
    (tmp_path / "step_00000005").mkdir()
    (tmp_path / "step_00000005" / MANIFEST_HASH).touch()
    remove_old(tmp_path, keep=1, saved_step=4)
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["4", "5"]
