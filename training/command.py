"""The frame of every command: settings from its arguments, --help, errors in a line, and exit codes."""

from __future__ import annotations

import errno
import inspect
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn

import yaml

from data.files import NO_SPACE
from training.config import CONFIG_DIR, compose
from training.distributed import is_first
from training.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, SettingError


def run_command(
    main: Callable[[Any], int | None],
    schema: type,
    description: str,
    config_name: str | None = None,
    arguments: list[str] | None = None,
) -> None:
    """Entry of a command: settings from `arguments` (the command line's), `main(settings)`, exit code.

    Prints help for --help, and for a user's error its text alone on stderr with exit code 2.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # where a terminal has no such character
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as a command sets it while it imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    arguments = command_line() if arguments is None else arguments
    try:
        if "--help" in arguments or "-h" in arguments:
            with reader_may_leave():
                print(help_text(description, schema, config_name))
            sys.exit(0)
        code = main(compose(schema, arguments, config_name))
        with reader_may_leave():
            sys.stdout.flush()
    except SettingError as error:
        fail(error)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        fail(
            SettingError(
                f"{str(error.filename)[:80]}…: the path, or a name in it (255 bytes at most), is too long."
            )
        )
    except KeyboardInterrupt:
        print(file=sys.stderr)  # the ^C of a terminal, or what was being written, leaves the line open
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(code or 0)


def fail(error: Exception) -> NoReturn:
    """Print a user's error, on the first rank only, and exit with 2."""
    if is_first():
        print(f"error: {error}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)


def command_line() -> list[str]:
    """The arguments without the `--local_rank` that DeepSpeed's launcher adds."""
    arguments = []
    skip = False
    for argument in sys.argv[1:]:
        if skip or argument.replace("-", "_").startswith("__local_rank="):
            skip = False
        elif argument.replace("-", "_") == "__local_rank":
            skip = True
        else:
            arguments.append(argument)
    return arguments


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """End quietly when the reader of what is printed has left, as `head` does.

    Raises:
        SettingError: what is printed goes to a file, and its disk is full.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        leaves = isinstance(error, BrokenPipeError)
        if not leaves and error.errno not in NO_SPACE:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more on leaving
        if not leaves:
            raise SettingError(f"the output can't be written ({error.strerror}): free some space.") from None


def help_text(description: str, schema: type, config_name: str | None) -> str:
    """What --help prints: the description, the settings with their defaults, and the groups."""
    config = compose(schema, [], config_name) if config_name else schema()
    top_notes = _notes((CONFIG_DIR / f"{config_name}.yaml").read_text()) if config_name else {}
    settings = "\n".join(_explained(config, top_notes))
    text = f"{description.strip()}\n\nSettings (key=value, nested ones as group.key=value):\n\n{settings}\n"
    if config_name:
        groups = sorted(folder for folder in CONFIG_DIR.iterdir() if folder.is_dir())
        used = {f.name for f in fields(schema)}
        lines = [
            f"  {folder.name}={'|'.join(sorted(file.stem for file in folder.glob('*.yaml')))}"
            for folder in groups
            if folder.name in used and any(folder.glob("*.yaml"))
        ]
        if lines:
            text += "\nGroups:\n" + "\n".join(lines) + "\n"
    return text


def _explained(config: Any, notes: dict[str, str], indent: str = "") -> list[str]:
    """Settings as YAML lines, each with the note that stands beside it in its dataclass or YAML file."""
    schemas = [schema for schema in reversed(type(config).__mro__) if is_dataclass(schema)]
    notes = _notes("".join(map(inspect.getsource, schemas))) | notes
    lines: list[str] = []
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            lines += [f"{indent}{f.name}:", *_explained(value, {}, indent + "  ")]
            continue
        text = yaml.safe_dump({f.name: value}, sort_keys=False).rstrip().splitlines()
        if f.name in notes:
            text[0] = f"{text[0]:<32}  # {notes[f.name]}"
        lines += [indent + line for line in text]
    return lines


def _notes(source: str) -> dict[str, str]:
    """Name to trailing comment, of `name: … # comment` lines."""
    return dict(re.findall(r"^ *(\w+): [^#\n]*?\S +# (.+)$", source, re.MULTILINE))
