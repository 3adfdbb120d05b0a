"""Write report.md and the plots of a run from what its folder holds.

    python -m scripts.report run_dir=outputs/demo

Training does the same when it ends; run this after evaluations, or on a run that is still going.
"""

from dataclasses import dataclass
from pathlib import Path

from training.command import run_command
from training.errors import SettingError
from training.report import write_run_report
from training.run_folder import RunFolder


@dataclass(kw_only=True, slots=True)
class ReportConfig:
    """Which run to report on."""

    run_dir: str | None = None  # the folder of a run

    def __post_init__(self) -> None:
        if self.run_dir is not None and not Path(self.run_dir).is_dir():
            raise SettingError(f"run_dir={self.run_dir}: no such folder. Give the folder of a run.")


def main(config: ReportConfig) -> None:
    """Write the report, and say where it is."""
    if config.run_dir is None:
        raise SettingError("run_dir is not set: give the folder of a run, as run_dir=outputs/demo.")
    folder = RunFolder(config.run_dir)
    if not folder.holds_run():
        raise SettingError(
            f"run_dir={config.run_dir} holds no run: there is no config.yaml or metrics.jsonl."
        )
    write_run_report(folder)
    print(folder.report)


if __name__ == "__main__":
    run_command(main, ReportConfig, __doc__)
