"""Hostile files through every command that loads one: nothing runs, nothing outside is opened, all is quick.

Each payload is put into a copy of a run, an export or a folder of prepared data, whose manifest is written
again so that its hashes agree: the attacker has made the whole folder.
"""

import hashlib
import json
import os
import pickle
import random
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from reliability_ranks import launch, train
from training_helpers import settings, write_text

from data.errors import DataError
from training.checkpoint import open_checkpoint
from training.config import flatten, load_saved_config, model_config_from
from training.errors import SettingError
from training.state import saved_state

pytestmark = pytest.mark.slow

SECONDS, MIB = 2.0, 200.0


class Bomb:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


class Place:
    """A victim's folder: `outside` must not be opened, `canary` not be written."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.outside = folder, folder / "outside"
        self.canary = folder / "canary"
        self.checkpoint = folder / "run/checkpoints/step_00000002"
        self.export, self.data = folder / "export", folder / "data"

    def pickle(self) -> bytes:
        return pickle.dumps(Bomb(self.canary))

    def edit(self, name: str, old: str, new: str) -> None:
        path = self.checkpoint / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    def manifest(self, change: Callable[[dict], None]) -> None:
        path = self.checkpoint / "manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))
        self.seal(manifest_only=True)

    def seal(self, manifest_only: bool = False) -> None:
        """Make every hash of the checkpoint agree with what is there."""
        path = self.checkpoint / "manifest.json"
        if not manifest_only:
            manifest = json.loads(path.read_text())
            for name, entry in manifest["files"].items():
                content = (self.checkpoint / name).read_bytes()
                entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            path.write_text(json.dumps(manifest))
        hash_line = hashlib.sha256(path.read_bytes()).hexdigest() + "\n"
        (self.checkpoint / "manifest.sha256").write_text(hash_line)


def pickled_weights(place: Place) -> None:
    (place.checkpoint / "rank00000-00000.safetensors").write_bytes(place.pickle())


def pickled_state(place: Place) -> None:
    (place.checkpoint / "state.json").write_bytes(place.pickle())


def pickled_tokenizer(place: Place) -> None:
    for name in ("tokenizer_info.json", "tokenizer.json"):
        (place.checkpoint / "tokenizer" / name).write_bytes(place.pickle())


def yaml_tag(place: Place) -> None:
    place.edit("config.yaml", "seed: 0", f"seed: !!python/object/apply:os.system ['touch {place.canary}']")


def target_and_interpolation(place: Place) -> None:
    place.edit("config.yaml", "model:\n", "model:\n  _target_: os.system\n  command: ${oc.env:SECRET_KEY}\n")


def alias_bomb(place: Place) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    (place.checkpoint / "config.yaml").write_text("\n".join(levels))


def deep_yaml(place: Place) -> None:
    (place.checkpoint / "config.yaml").write_text("[" * 15_000 + "]" * 15_000)


def huge_yaml(place: Place) -> None:
    (place.checkpoint / "config.yaml").write_text("a: [" + "1," * 20_000_000 + "]")


def many_layers(place: Place) -> None:
    place.edit("config.yaml", "num_layers: 2", "num_layers: 1000000000")


def wide_model(place: Place) -> None:
    place.edit("config.yaml", "vocab_size: 260", f"vocab_size: {2**60}")


def numbers_that_are_none(place: Place) -> None:
    place.edit("config.yaml", "hidden_size: 32", "hidden_size: .nan")
    place.edit("state.json", '"step": 2', '"step": 1e999')


def path_out_of_the_manifest(place: Place) -> None:
    def change(manifest: dict) -> None:
        manifest["files"]["../../../outside/secret"] = {"bytes": 6, "sha256": "0" * 64}

    place.manifest(change)


def absolute_path_in_the_manifest(place: Place) -> None:
    def change(manifest: dict) -> None:
        manifest["files"][str(place.outside / "secret")] = {"bytes": 6, "sha256": "0" * 64}

    place.manifest(change)


def linked_weights(place: Place) -> None:
    weights = place.checkpoint / "rank00000-00000.safetensors"
    shutil.move(weights, place.outside / "weights")
    weights.symlink_to(place.outside / "weights")


def linked_config(place: Place) -> None:
    config = place.checkpoint / "config.yaml"
    shutil.move(config, place.outside / "config.yaml")
    config.symlink_to(place.outside / "config.yaml")


def linked_tokenizer(place: Place) -> None:
    tokenizer = place.checkpoint / "tokenizer"
    shutil.move(tokenizer, place.outside / "tokenizer")
    tokenizer.symlink_to(place.outside / "tokenizer")


def header_of_2_to_63(place: Place) -> None:
    weights = place.checkpoint / "rank00000-00000.safetensors"
    weights.write_bytes(struct.pack("<Q", 2**63) + weights.read_bytes()[8:])


def huge_shapes(place: Place) -> None:
    place.manifest(lambda manifest: manifest["shapes"].update({"lm_head.weight": [2**40, 2**40]}))


def huge_manifest(place: Place) -> None:
    with open(place.checkpoint / "manifest.json", "wb") as file:
        file.write(b"[" * 1000)
        file.truncate(2**36)


def nested_manifest(place: Place) -> None:
    (place.checkpoint / "manifest.json").write_text("[" * 2_000_000)
    place.seal(manifest_only=True)


def manifest_of_lists(place: Place) -> None:
    (place.checkpoint / "manifest.json").write_text("[" + "[]," * 1_300_000 + "[]]")
    place.seal(manifest_only=True)


def pipe_for_a_hash(place: Place) -> None:
    (place.checkpoint / "manifest.sha256").unlink()
    os.mkfifo(place.checkpoint / "manifest.sha256")


SEALED = [
    pickled_weights,
    pickled_state,
    yaml_tag,
    target_and_interpolation,
    alias_bomb,
    deep_yaml,
    huge_yaml,
]
SEALED += [many_layers, wide_model, numbers_that_are_none, linked_weights, linked_config, header_of_2_to_63]
IN_CHECKPOINTS = [*SEALED, pickled_tokenizer, path_out_of_the_manifest, absolute_path_in_the_manifest]
IN_CHECKPOINTS += [
    linked_tokenizer,
    huge_shapes,
    huge_manifest,
    nested_manifest,
    manifest_of_lists,
    pipe_for_a_hash,
]


def pickled_model(place: Place) -> None:
    (place.export / "model.safetensors").unlink()
    (place.export / "pytorch_model.bin").write_bytes(place.pickle())


def index_with_a_path(place: Place) -> None:
    weight_map = {"lm_head.weight": "../outside/secret"}
    index = place.export / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def code_in_auto_map(place: Place) -> None:
    config = json.loads((place.export / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (place.export / "config.json").write_text(json.dumps(config))
    (place.export / "evil.py").write_text(f"import os; os.system('touch {place.canary}')")


def linked_model(place: Place) -> None:
    shutil.move(place.export / "model.safetensors", place.outside / "model")
    (place.export / "model.safetensors").symlink_to(place.outside / "model")


def many_layers_in_an_export(place: Place) -> None:
    config = json.loads((place.export / "config.json").read_text())
    key = next(key for key in ("decoder_layers", "num_layers", "num_hidden_layers") if key in config)
    config[key] = 10**9
    (place.export / "config.json").write_text(json.dumps(config))


IN_EXPORTS = [pickled_model, index_with_a_path, code_in_auto_map, linked_model, many_layers_in_an_export]


def linked_shard(place: Place) -> None:
    shutil.move(place.data / "train-00000.tokens", place.outside / "tokens")
    (place.data / "train-00000.tokens").symlink_to(place.outside / "tokens")


def shard_of_2_to_63(place: Place) -> None:
    manifest = json.loads((place.data / "manifest.json").read_text())
    manifest["splits"]["train"]["shard_tokens"] = [2**63]
    (place.data / "manifest.json").write_text(json.dumps(manifest))


def path_in_the_data(place: Place) -> None:
    manifest = json.loads((place.data / "manifest.json").read_text())
    manifest["files"]["../outside/secret"] = {"size": 6, "sha256": "0" * 64}
    (place.data / "manifest.json").write_text(json.dumps(manifest))


IN_DATA = [linked_shard, shard_of_2_to_63, path_in_the_data]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A trained run, its export and its prepared data, to be copied."""
    folder = tmp_path_factory.mktemp("clean")
    text = write_text(folder / "text")
    assert train(text, folder / "run", "max_steps=2", "keep_checkpoints=1").wait() == [0]
    arguments = [f"checkpoint={folder / 'run'}", f"output={folder / 'export'}"]
    assert launch(folder / "stderr", arguments, command="scripts.export_hf").wait() == [0]
    prepared = next(path for path in (folder / "cache").iterdir() if path.is_dir())
    shutil.copytree(prepared, folder / "data")
    return folder


def hostile_copy(clean: Path, folder: Path, payload: Callable) -> Place:
    shutil.copytree(clean, folder)
    place = Place(folder)
    place.outside.mkdir()
    (place.outside / "secret").write_text("secret")
    payload(place)
    if payload in SEALED:
        place.seal()
    return place


def arguments_for(command: str, place: Place) -> tuple[str, list[str]]:
    run, text = place.folder / "run", place.folder / "text"
    data = ["data=text", f"data.path={text}", f"data.cache_dir={place.folder / 'cache'}"]
    fresh = place.folder / "fresh"
    return {
        "resume": ("train.py", settings(text, run, "max_steps=3")),
        "init_from": ("train.py", settings(text, fresh, "max_steps=3", f"init_from={run}")),
        "init_from export": ("train.py", settings(text, fresh, "max_steps=3", f"init_from={place.export}")),
        "eval": ("eval.py", [f"checkpoint={run}", "seq_lens=[32]", *data]),
        "eval export": ("eval.py", [f"checkpoint={place.export}", "seq_lens=[32]", *data]),
        "generate": ("scripts.generate", [f"checkpoint={run}", "max_tokens=2"]),
        "export": ("scripts.export_hf", [f"checkpoint={run}", f"output={fresh}"]),
        "import": ("scripts.import_hf", [f"source={place.export}", f"run_dir={fresh}"]),
        "train on it": (
            "train.py",
            [*settings(text, fresh, "max_steps=3", "data=prepared"), f"data.path={place.data}"],
        ),
    }[command]


def assert_refused(clean: Path, folder: Path, payload: Callable, command: str) -> dict:
    """Exit 2 with a short message, and a clean report; returns the report."""
    place = hostile_copy(clean, folder / "victim", payload)
    script, arguments = arguments_for(command, place)
    faults = {0: [("watch", str(folder / "report"), str(place.outside))]}
    ranks = launch(folder, arguments, faults=faults, command=script, SECRET_KEY="hunter2")
    codes = ranks.wait(60)
    where, stderr = f"{payload.__name__} through {command}", ranks.stderr()
    assert codes == [2], f"{where}: {codes} {stderr[-2000:]}"
    assert "Traceback" not in stderr, where
    assert "hunter2" not in stderr, where
    assert len(stderr) < 5000, where
    assert not place.canary.exists(), where
    report = json.loads((folder / "report").read_text())
    assert report["events"] == [], where
    assert report["mib"] < MIB, (where, report)
    return report


CHECKPOINT_COMMANDS = ("resume", "init_from", "eval", "generate", "export")
# A resumed run builds the model that its command names, so what the saved one says of sizes is only compared.
PAIRS = [(payload, command) for payload in IN_CHECKPOINTS for command in CHECKPOINT_COMMANDS]
PAIRS += [
    (payload, command) for payload in IN_EXPORTS for command in ("import", "eval export", "init_from export")
]
PAIRS += [(payload, "train on it") for payload in IN_DATA]


def test_hostile_files_are_refused(clean, tmp_path):
    """Every payload through one of its commands."""
    for index, payload in enumerate(dict.fromkeys(payload for payload, _ in PAIRS)):
        commands = [command for each, command in PAIRS if each is payload]
        assert_refused(clean, tmp_path / payload.__name__, payload, commands[index % len(commands)])


@pytest.mark.torture
def test_every_hostile_file_through_every_command(clean, tmp_path):
    worst_seconds = worst_mib = 0.0
    for payload, command in PAIRS:
        report = assert_refused(clean, tmp_path / f"{payload.__name__}-{command}", payload, command)
        assert report["seconds"] < SECONDS, (payload.__name__, command, report)
        worst_seconds, worst_mib = max(worst_seconds, report["seconds"]), max(worst_mib, report["mib"])
    payloads = len({payload for payload, _ in PAIRS})
    print(f"\nhostile files: 0 of {payloads} payloads in {len(PAIRS)} commands ran code or opened a file")
    print(f"outside; at most {worst_seconds:.2f} s of processor time and {worst_mib:.0f} MiB to be refused")


def mutated(content: bytes, numbers: random.Random) -> bytes:
    """A few bytes changed, cut, repeated, or tokens of JSON replaced by nasty ones."""
    data = bytearray(content)
    nasty = [
        b"null",
        b"-1",
        b"1e999",
        b"NaN",
        b'"x"',
        b"[]",
        b"{}",
        str(2**63).encode(),
        b"1" * 5000,
        b'"../x"',
    ]
    for _ in range(numbers.randint(1, 4)):
        place = numbers.randrange(len(data))
        match numbers.randrange(5):
            case 0:
                data[place] = numbers.randrange(256)
            case 1:
                del data[place : place + numbers.randrange(1, 40)]
            case 2:
                data[place:place] = data[place : place + numbers.randrange(1, 200)]
            case _:
                start = data.find(b": ", place) + 2
                stop = min(
                    (i for i in (data.find(b",", start), data.find(b"}", start)) if i > 0), default=start
                )
                data[start:stop] = numbers.choice(nasty)
        data = data or bytearray(b" ")
    return bytes(data)


def fuzz_manifest(clean: Path, folder: Path, seconds: float) -> int:
    """Open a checkpoint with mutated files whose hashes agree, for so long; returns how often."""
    shutil.copytree(clean / "run/checkpoints/step_00000002", folder / "step_00000002")
    checkpoint, numbers = folder / "step_00000002", random.Random(0)
    names = ["manifest.json"] * 4 + ["rank00000-00000.safetensors", "state.json", "config.yaml"]
    original = {name: (checkpoint / name).read_bytes() for name in names}
    deadline, count = time.monotonic() + seconds, 0
    while time.monotonic() < deadline:
        name = numbers.choice(names)
        content = original[name]
        if name.endswith("safetensors"):  # only its header, and its length
            content = mutated(content[:3000], numbers) + content[3000:]
        else:
            content = mutated(content, numbers)
        (checkpoint / name).write_bytes(content)
        place = Place(folder)
        place.checkpoint = checkpoint
        place.seal(manifest_only=name == "manifest.json")
        try:
            opened = open_checkpoint(checkpoint)
            load_all(opened)
        except (DataError, SettingError):
            pass
        for each, whole in original.items():
            (checkpoint / each).write_bytes(whole)
        count += 1
    return count


def load_all(opened) -> None:
    """What a resume and an evaluation read."""
    saved_state(opened)
    saved = load_saved_config(opened.folder / "config.yaml")
    model_config_from(saved, opened.folder)
    flatten(saved)
    opened.weights()


def test_mutated_checkpoints_are_refused_or_right(clean, tmp_path):
    assert fuzz_manifest(clean, tmp_path, 5) > 50


@pytest.mark.torture
def test_ten_minutes_of_mutated_checkpoints(clean, tmp_path):
    count = fuzz_manifest(clean, tmp_path, 600)
    print(f"\nfuzzing manifest, headers, state and config for 10 minutes: 0 crashes in {count} mutations")


def test_no_secret_is_written(clean, tmp_path):
    """Keys of the environment are in no file of a run, Weights & Biases' among them."""
    secrets = {
        "WANDB_API_KEY": "a" * 37 + "KEY",
        "HF_TOKEN": "hf_SECRET",
        "AWS_SECRET_ACCESS_KEY": "awsSECRET",
    }
    more = ("max_steps=2", "wandb.enabled=true")
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    ranks = train(
        clean / "text", tmp_path / "run", *more, faults={0: [("real_report",)]}, **secrets, **offline
    )
    assert ranks.wait(120) == [0], ranks.stderr()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("wandb" in str(path) for path in files)
    assert any(path.name == "report.md" for path in files)
    for path in files:
        content = path.read_bytes()
        assert not [name for name, secret in secrets.items() if secret.encode() in content], path
