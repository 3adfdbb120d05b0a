"""A run's folder: its files, and the lock that lets one process group train in it."""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
import socket
import sys
from pathlib import Path

from data.files import CANNOT_LOCK, explain_write_errors
from data.text_files import RUN_LOCK
from training.checkpoint import STEP_FOLDER
from training.errors import SettingError
from training.model_folder import is_model_folder


class RunFolder:
    """outputs/<run>/ and the names in it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.log = self.path / "train.log"
        self.samples = self.path / "samples.jsonl"
        self.plots = self.path / "plots"
        self.report = self.path / "report.md"
        self.checkpoints = self.path / "checkpoints"
        self.evaluations = self.path / "eval"
        self.heartbeats = self.path / "heartbeats"
        self.lock_file = self.path / RUN_LOCK
        self._lock: int | None = None
        self._locked: os.stat_result | None = None

    def check_links(self) -> None:
        """Refuse a folder that leads out of itself: what is in it may come from elsewhere.

        Raises:
            SettingError: names the link, or a file in a checkpoint's place.
        """
        ours = [value for value in vars(self).values() if isinstance(value, Path) and value != self.path]
        steps = (path for path in self.checkpoints.glob("step_*") if STEP_FOLDER.fullmatch(path.name))
        for entry in itertools.chain(ours, [self.path / "wandb"], steps):
            if entry.is_symlink():
                raise SettingError(
                    f"{entry} is a link: links in a run's folder are not followed. "
                    "Replace it by what it leads to."
                )
            if entry.parent == self.checkpoints and not entry.is_dir():
                raise SettingError(f"{entry} is not a folder, as a checkpoint is: move it away.")

    def holds_run(self) -> bool:
        """Whether a run has been started here."""
        return self.config.exists() or self.metrics.exists() or self.has_checkpoint()

    def report_is_old(self) -> bool:
        """Whether the report is missing, or older than the last line of metrics."""
        if not self.report.exists():
            return True
        return self.metrics.exists() and self.report.stat().st_mtime < self.metrics.stat().st_mtime

    def has_checkpoint(self) -> bool:
        """Whether a checkpoint is there, valid or not."""
        return any(self.checkpoints.glob("step_*"))

    def enter(self, resume: str, overwrite: bool) -> None:
        """Lock the folder, which is made if it isn't there; what is in it stays.

        Raises:
            SettingError: another process trains in it, or it holds a sweep or a model; resume=must without a
                checkpoint there, or resume=never with a run there, unless `overwrite` allows it.
        """
        for folder in (self.path, *self.path.absolute().parents):
            if folder.name == "checkpoints" and (folder.parent / RUN_LOCK).exists():
                raise SettingError(
                    f"run_dir={self.path} lies among the checkpoints of {folder.parent}: choose another."
                )
        self.lock()
        if (self.path / "sweep.json").exists():
            raise SettingError(f"run_dir={self.path} holds a sweep: choose another folder for the run.")
        if is_model_folder(self.path) and not self.has_checkpoint():
            raise SettingError(
                f"run_dir={self.path} holds an imported or exported model, which a run there would hide. "
                f"Choose another run_dir; init_from={self.path} starts from these weights."
            )
        if resume == "must" and not self.has_checkpoint():
            raise SettingError(
                f"resume=must, but {self.path} holds no checkpoint. Use resume=auto to start one."
            )
        if resume == "never" and self.holds_run() and not overwrite:
            raise SettingError(
                f"resume=never, but {self.path} holds a run. "
                "Choose another run_dir, or add overwrite=true to delete that run."
            )
        with explain_write_errors(self.path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.heartbeats, ignore_errors=True)  # of a start that was killed

    def clear(self) -> None:
        """Delete the run that is in it, its checkpoints at one stroke: a kill leaves none to resume."""
        deleted = self.path / ".deleted"
        shutil.rmtree(deleted, ignore_errors=True)
        if self.checkpoints.exists():
            self.checkpoints.rename(deleted)
        self.checkpoints.mkdir()
        for entry in (self.config, self.metrics, self.log, self.samples, self.report):
            entry.unlink(missing_ok=True)
        for entry in (self.plots, self.evaluations, deleted):
            shutil.rmtree(entry, ignore_errors=True)

    def lock(self) -> None:
        """Hold run.lock until this process ends; the kernel frees a dead holder's lock at once.

        Raises:
            SettingError: another process holds it, and the text says which; or the folder holds a link.
        """
        self.check_links()
        with explain_write_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            raise SettingError(
                f"run_dir={self.path} is being trained by {holder or 'another process'}. "
                "Wait for it, stop it, or choose another run_dir."
            ) from None
        except OSError as error:
            if error.errno not in CANNOT_LOCK:
                raise
            print(
                f"run_dir={self.path}: its file system can't lock files ({error.strerror}). "
                "Make sure yourself that nothing else trains there.",
                file=sys.stderr,
            )
        with explain_write_errors(self.path):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._lock, self._locked = descriptor, os.stat(self.path)

    def check_lock(self) -> None:
        """See that this is still the folder that was locked, and renew a lock file that was deleted.

        Raises:
            SettingError: the folder was moved or deleted, or another process has locked it since.
        """
        assert self._lock is not None
        assert self._locked is not None
        with explain_write_errors(self.path):
            if _is_at(self.lock_file, os.fstat(self._lock)):
                os.utime(self._lock)  # so that what deletes old files leaves it
                return
            if not _is_at(self.path, self._locked):
                raise SettingError(
                    f"run_dir={self.path} was moved or deleted while this run trained in it: stopping. If it "
                    "was moved, move it back, or go on from its last checkpoint with run_dir= its new place."
                )
        self.unlock()
        self.lock()

    def unlock(self) -> None:
        """Let others train here."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _is_at(path: Path, known: os.stat_result) -> bool:
    """Whether the file or folder of that status is at a path."""
    try:
        return os.path.samestat(os.stat(path), known)
    except FileNotFoundError:
        return False
