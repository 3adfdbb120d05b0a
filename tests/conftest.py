"""Without a CUDA device Triton runs in its interpreter, which must be set before it is imported.

After the full reliability tests (`make torture`) a table says which promises were kept, and the figures.
"""

import os

import pytest
import torch

from training.distributed import process_group

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def no_process_group_is_left():
    """One of an earlier test's, or its launcher's variables, would fail whichever tests follow it."""
    yield
    assert not torch.distributed.is_initialized()
    assert "RANK" not in os.environ


@pytest.fixture
def world():
    """A group of one."""
    with process_group(timeout_minutes=5) as world:
        yield world


@pytest.fixture
def poisoned_memory():
    """Memory that nothing writes holds NaN, so that an output left out can't pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(8).isnan().all()
    assert torch.ones(8).new_empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """The documents of tiny runs, and beside them the cache of what is prepared from them."""
    from training_helpers import write_text  # imports Triton

    return write_text(tmp_path_factory.mktemp("corpus") / "text")


def pytest_collection_modifyitems(items):
    # files that start training processes first, so that no worker is left with a long one at the end
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_terminal_summary(terminalreporter):
    reports = [
        report
        for outcome in ("passed", "failed", "error")
        for report in terminalreporter.stats.get(outcome, [])
        if "torture" in getattr(report, "keywords", ()) and (report.when == "call" or report.failed)
    ]
    promises = {}
    for report in reports:
        file, name = report.nodeid.split("[")[0].split("::")
        promises.setdefault((file, name), []).append(report)
    if promises:
        terminalreporter.write_line("\n| promise | held | figures | minutes |\n| --- | --- | --- | ---: |")
    for (file, name), cases in sorted(promises.items()):
        topic = file.removeprefix("tests/test_").removeprefix("reliability_").removesuffix(".py")
        promise = f"{topic}: {name[5:].replace('_', ' ')}"
        held = f"{sum(case.passed for case in cases)} of {len(cases)}"
        figures = "; ".join(text for case in cases for key, text in case.user_properties if key == "figure")
        minutes = sum(case.duration for case in cases) / 60
        terminalreporter.write_line(f"| {promise} | {held} | {figures} | {minutes:.1f} |")
