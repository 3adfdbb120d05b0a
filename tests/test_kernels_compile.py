"""The kernels compile for every GPU of the launch table, without one, and fit into its shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED_KB = {80: 163, 89: 99, 90: 227, 100: 227}  # what one block may take

# Runs in a process of its own, since this one may hold Triton's interpreter.
SCRIPT = """
import json
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from kernels import hopper_lightning, launch, triton_lightning as kernels

FP32 = {"slopes", "initial_state", "final_state", "segment_states", "parts", "grad_final", "grad_initial",
        "segment_grads"}


def argument_type(name, dtype):
    if name.endswith("strides"):
        return ("i32", "i32", "i32")
    if name in kernels.RUNTIME_SIZES:
        return "i32"
    if name in ("cu_seqlens", "starts", "ends"):
        return "*i32"
    return "*fp32" if name in FP32 else "*" + dtype


def shared_kb(kernel, arch, dtype, warps, **constants):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else argument_type(n, dtype) for n in names}
    constants = {(names.index(n),): value for n, value in constants.items()}
    source = ASTSource(kernel, signature, constants)
    options = {"num_warps": warps.num_warps, "num_stages": warps.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).metadata.shared / 1024


def sizes(table_launch, dim, arch, dtype):
    common = {"Dk": dim, "Dv": dim, "C": table_launch.chunk, "BK": dim, "SPLIT": table_launch.split_weights}
    blocks = common | {"BV": min(table_launch.value_block, dim)}
    walk = table_launch.walk
    states, warps = blocks, table_launch.walk
    if table_launch.states:
        states, warps = blocks | {"BV": launch.STATE_BLOCK}, table_launch.states
    yield "segment_state", shared_kb(kernels.segment_state_kernel, arch, dtype, warps, **states, REVERSE=True)
    flags = {"REVERSE": True, "TRANSPOSED": True}
    yield "walk", shared_kb(kernels.walk_kernel, arch, dtype, walk, **blocks, **flags)
    if table_launch.dk_dv is not None:
        yield "dk_dv", shared_kb(kernels.dk_dv_kernel, arch, dtype, table_launch.dk_dv, **common, BV=dim)


def descriptor_type(columns):
    block = [1, 1, hopper_lightning.CHUNK, columns]
    return f"tensordesc<bf16{block},{gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)!r}>"


def hopper_shared_kb(kernel, **constants):
    names = kernel.arg_names
    dim = hopper_lightning.HEAD_DIM
    signature = {n: "constexpr" if n in constants else argument_type(n, "bf16") for n in names}
    signature |= {n: descriptor_type(dim // 2 if n == "d_o" else dim) for n in names if n.startswith("d_")}
    signature["num_tasks"] = "i32"
    source = GluonASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    return compiled.metadata.shared / 1024


tables = {80: launch._AMPERE, 89: launch._ADA, 90: launch._HOPPER, 100: launch._BLACKWELL}
compiled = {}  # 8.0 and 8.9 have the same instructions: equal launches are compiled once
compiled_archs = [int(arch) for arch in sys.argv[1:]]
for arch in compiled_archs:
    for dim, table_launch in tables[arch].items():
        key = arch // 10, dim, table_launch
        if key not in compiled:
            compiled[key] = list(sizes(table_launch, dim, arch, "bf16"))
        for kernel, size in compiled[key]:
            print(json.dumps([arch, f"{kernel} bf16 {dim}", size]))
if 90 in compiled_archs:
    for kernel, size in sizes(launch._FP32[128], 128, 90, "fp32"):
        print(json.dumps([90, f"{kernel} fp32 128", size]))
    for kernel, choices in (("walk", {"TRANSPOSED": True, "STAGES": 3}), ("dk_dv", {"STAGES": 2})):
        size = hopper_shared_kb(getattr(hopper_lightning, kernel + "_kernel"), **choices)
        print(json.dumps([90, f"Gluon {kernel}", size]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("archs", "num_launches"), [((80, 89), 12), ((90,), 12), ((100,), 7)])
def test_every_launch_compiles_and_fits(archs, num_launches, tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, archs)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    sizes = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(sizes) == num_launches
    for arch, kernel, size in sizes:
        assert size <= SHARED_KB[arch], (arch, kernel, size)
