"""Training under DeepSpeed ZeRO 0–3, one optimizer step per call.

Precision, at every stage: fp32 master weights, moments, gradient accumulation and reduction; weights and
activations in bf16, or in fp32 with `engine.precision=fp32`. DeepSpeed's stages 1–3 keep bf16 weights beside
fp32 masters. Its stage 0 can't accumulate bf16 gradients in fp32, so there the weights themselves are fp32,
every layer rounds them where it uses them, and a hook rounds a micro-step's gradients: the same numbers, and
nothing is sharded.

State is seen as fragments: for each parameter, the part of its flattened fp32 master and moments that this
rank owns. Checkpoints are written and read through them, whatever the stage and the number of ranks.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from data.loader import Batch
from models.attention import LRPE
from models.fp8 import use_fp8
from models.transnormer import Block, TransNormer
from training.adamw_8bit import AdamW8bit
from training.distributed import World
from training.errors import SettingError
from training.muon import MatrixPart, MuonAdamW, create_state, matrix_parts
from training.optimizer import build_optimizer
from training.sequence_chunks import Chunk, backward_in_chunks, cut
from training.train_config import TrainConfig

# What a checkpoint holds of a parameter: of one that AdamW updates, and of one that Muon does.
KINDS = ("param", "exp_avg", "exp_avg_sq")
MUON_KINDS = ("param", "momentum")

# read(name, kind, start, numel) -> flat fp32 tensor: elements of a flattened parameter or moment
Reader = Callable[[str, str, int, int], Tensor]


@dataclass(slots=True)
class Fragment:
    """The part of one parameter's state that this rank owns.

    Attributes:
        shape: of the whole parameter.
        start: first element of the part in the flattened parameter.
        tensors: kind (of KINDS or MUON_KINDS) to a flat fp32 view into the live state.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    tensors: dict[str, Tensor]


@dataclass(slots=True)
class StepResult:
    """What one optimizer step did, the same on every rank.

    Attributes:
        loss: mean over the step's scored tokens on all ranks, nats.
        grad_norm: global L2 norm before clipping; inf or nan if the step was skipped.
        skipped: the gradient was not finite, so weights and moments are as before.
        layers: what was asked to be measured of each layer, by name.
    """

    loss: float
    grad_norm: float
    skipped: bool
    layers: dict[str, list[float]]


class Engine:
    """A model being trained.

    Args:
        model: on the CPU or this rank's device, fp32.
        accumulation_steps: micro-steps per optimizer step, passed to DeepSpeed, which counts them.
        micro_batch_size: sequences per micro-step on this rank.
    """

    def __init__(
        self,
        model: TransNormer,
        config: TrainConfig,
        world: World,
        *,
        accumulation_steps: int,
        micro_batch_size: int,
    ) -> None:
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module="deepspeed|torch")
        self.config, self.world, self.stage = config, world, config.engine.zero_stage
        self.accumulation_steps = accumulation_steps
        assert config.engine.precision != "auto", "settle it first: EngineConfig.with_precision"
        bf16 = config.engine.precision == "bf16"
        model.compute_dtype = torch.bfloat16 if bf16 else torch.float32
        if config.engine.fp8:
            world.on_all(partial(_use_fp8, model, world.device))  # ranks may have different GPUs
        initial = {}
        for name, p in model.named_parameters():
            initial[name] = p.detach().to("cpu", copy=True)
            if bf16 and self.stage > 0:
                p.data = p.data.bfloat16()  # before the device must hold them all
        model.to(world.device)
        if bf16 and self.stage == 0:
            for p in model.parameters():
                p.register_hook(lambda grad: grad.bfloat16().float())
        optimizer = build_optimizer(model, config.optim, model.compute_dtype)
        self.group_index = {
            p: index for index, group in enumerate(optimizer.param_groups) for p in group["params"]
        }
        # On CPUs DeepSpeed would compile an extension that we never call, under a lock that a killed process
        # leaves behind and every later one waits for without end.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if self.stage == 3:
            # gather and free a block's weights at once: fewer, larger messages, and no hook inside a block
            deepspeed.utils.set_z3_leaf_modules(model, [Block])
        with contextlib.redirect_stdout(io.StringIO()):  # memory reports that DeepSpeed prints regardless
            self.deepspeed, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=deepspeed_config(config, micro_batch_size, accumulation_steps),
                dist_init_required=False,
            )
        self.scatters_gradients = bf16 and self.stage == 1
        self.deepspeed.enable_backward_allreduce = not self.scatters_gradients
        self.model: TransNormer = self.deepspeed.module
        self.optimizer = optimizer
        self.num_steps = 0  # optimizer steps that were not skipped
        if isinstance(optimizer, MuonAdamW):
            optimizer.parts = self._matrix_parts()
        self._load_parameters(lambda name, _, start, numel: initial[name].flatten()[start : start + numel])
        if self.compiles():
            # forms of a block: with gradients, a state, packed sequences, LRPE; or not
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
            for module in (*self.model.model.layers, self.model.model.final_norm):
                # not __call__: hooks stay outside
                module.forward = compile_for_any_documents(module.forward)  # type: ignore[method-assign]

    def compiles(self) -> bool:
        """Whether blocks run through torch.compile."""
        if self.config.engine.compile == "auto":
            return self.world.device.type == "cuda"
        return self.config.engine.compile == "true"

    def train_step(
        self,
        batches: list[Batch],
        num_targets: int,
        lr: float,
        measure_layers: bool = False,
        progress: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """Accumulate gradients over this rank's micro-batches and update the weights.

        Args:
            batches: this step's micro-batches, with tokens, targets and cu_seqlens.
            num_targets: scored tokens of the whole step over all ranks: the one divisor of the loss.
            lr: learning rate of this step.
            measure_layers: also give each layer's gradient norm and the scale of its output.
            progress: called after each micro-step.
        """
        layers = {"layer_activation_rms": self._activation_rms(batches[0])} if measure_layers else {}
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if isinstance(self.optimizer, AdamW8bit):
            self.optimizer.pack()  # a save or load has left fp32 moments
        self.model.train()
        total = torch.zeros((), device=self.world.device)
        num_targets = max(1, num_targets)  # a step of separators alone has none, and no gradient
        # DeepSpeed averages gradients over ranks; the loss is a sum over them.
        scale = self.world.size / num_targets
        for index, batch in enumerate(batches):
            total += self._backward(batch, scale, is_last=index == len(batches) - 1)
            progress()
        if self.scatters_gradients:
            self._scatter_gradients()
        if measure_layers:
            layers["layer_grad_norms"] = self._layer_grad_norms()
        grad_norm, skipped = self._update()
        mean_loss = self.world.sum([total.item()])[0] / num_targets
        if not skipped:
            self.num_steps += 1
            self._refresh_frequencies()
        return StepResult(mean_loss, grad_norm, skipped, layers)

    def _backward(self, batch: Batch, scale: float, is_last: bool) -> Tensor:
        """Accumulate the gradients of `scale` times the summed loss of a micro-batch. Returns the loss."""
        with _explain_full_caches():
            chunks = self._chunks(batch)
            if chunks:
                return backward_in_chunks(
                    self.deepspeed, self.model.config, chunks, scale, self.world.device, is_last
                )
            self.deepspeed.set_gradient_accumulation_boundary(is_last)
            loss = self._loss(batch)
            self.deepspeed.backward(loss * scale, scale_wrt_gas=False)
        return loss.detach()

    def _chunks(self, batch: Batch) -> list[Chunk]:
        """The pieces that `sequence_chunk` cuts a larger batch into; none where it is taken whole."""
        chunk_tokens = self.config.engine.sequence_chunk
        fits = not chunk_tokens or batch.tokens.numel() <= chunk_tokens
        return [] if fits else cut(batch, chunk_tokens)

    def _loss(self, batch: Batch | Chunk) -> Tensor:
        device = self.world.device
        cu_seqlens = batch.cu_seqlens
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.to(device, non_blocking=True)
        tokens, targets = (x.to(device, non_blocking=True) for x in (batch.tokens, batch.targets))
        return self.deepspeed(tokens, targets, cu_seqlens=cu_seqlens)

    def _activation_rms(self, batch: Batch) -> list[float]:
        """Root mean square of each layer's output (the residual stream), over the ranks' micro-batches.

        Of a batch that is cut, the first chunk stands for it.
        """
        found: list[Tensor] = []
        hooks = [
            block.register_forward_hook(lambda _, __, out: found.append(out[0].float().square().mean()))
            for block in self.model.model.layers
        ]
        self.model.eval()
        with torch.no_grad():
            self._loss(next(iter(self._chunks(batch)), batch))
        for hook in hooks:
            hook.remove()
        means = self.world.sum(torch.stack(found).tolist())
        return [math.sqrt(mean / self.world.size) for mean in means]

    def _scatter_gradients(self) -> None:
        """Average over ranks the part of the accumulated gradients that each updates, in place.

        DeepSpeed's stage 1 in bf16 would send twice as much, every rank all of them, and through copies.
        """
        zero = self.deepspeed.optimizer
        if self.world.size > 1:
            for whole, part in zip(zero.fp32_groups_gradients_flat, self._gradient_parts(), strict=True):
                torch.distributed.reduce_scatter_tensor(part, whole)
                part /= self.world.size

    def _layer_grad_norms(self) -> list[float]:
        """L2 norm of each layer's gradient over all ranks, between the last backward and the update."""
        from deepspeed.utils import safe_get_full_grad

        norms = []
        for block in self.model.model.layers:
            squares = [safe_get_full_grad(p).double().square().sum() for p in block.parameters()]
            norms.append(math.sqrt(sum(squares).item()))
        return norms

    def _update(self) -> tuple[float, bool]:
        """Clip, and take the optimizer step unless a gradient is not finite. Returns (norm, skipped)."""
        zero = self.deepspeed.optimizer
        if self.config.engine.offloads:  # gradients are elsewhere
            self.deepspeed.step()
            if zero.overflow and self.stage == 2:
                zero.averaged_gradients.clear()  # DeepSpeed would add the next steps' to them
            return float(self.deepspeed.get_global_grad_norm()), bool(zero.overflow)
        norm = self._clip_gradients()
        if self.stage == 0 and not math.isfinite(norm):
            self.deepspeed.zero_grad()
            return norm, True
        self.deepspeed.step()
        return norm, self.stage > 0 and bool(zero.overflow)

    def _clip_gradients(self) -> float:
        """Scale gradients so that their L2 norm over all ranks is at most `optim.grad_clip`; the norm before.

        Squares are summed in fp64. In fp32, as in DeepSpeed, the norm would depend on how gradients are cut
        up, and every weight after it too: with this one, ZeRO stages take the same steps.
        """
        if self.stage == 0:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        else:
            gradients = self._gradient_parts()
        squares = torch.stack(torch._foreach_norm(gradients, 2, torch.float64)).square().sum()
        if self.stage > 0:
            torch.distributed.all_reduce(squares)
        norm = math.sqrt(squares.item())
        self._set_deepspeed_norm(norm)
        if 0 < self.config.optim.grad_clip < norm < math.inf:
            torch._foreach_mul_(gradients, self.config.optim.grad_clip / norm)
        return norm

    def _set_deepspeed_norm(self, norm: float) -> None:
        """Hand DeepSpeed the norm: computing its own takes hundreds of small kernels that the GPU waits for.

        Its stage 1 in bf16 would also measure gradients that are not all summed.
        """
        zero = self.deepspeed.optimizer
        if self.scatters_gradients:
            known = torch.tensor(norm, device=self.world.device)
            zero.get_grads_for_norm = lambda for_clipping=False: ([known], {})
        elif not self.deepspeed.zero_compute_grad_norm():
            zero.has_overflow = lambda partition_gradients: not math.isfinite(norm)

    def _gradient_parts(self) -> list[Tensor]:
        """This rank's parts of the accumulated fp32 gradients: every element is on one rank only."""
        zero = self.deepspeed.optimizer
        if hasattr(zero, "averaged_gradients"):
            return [part for parts in zero.averaged_gradients.values() for part in parts]
        return zero.fp32_groups_gradient_flat_partition  # stage 1 in bf16

    def fragments(self) -> Iterator[Fragment]:
        """This rank's part of every parameter's state; at stage 0 every rank owns everything."""
        self._create_moments()
        for name, p in self.model.named_parameters():
            flat, offset, start, numel = self._locate(p)
            if numel == 0:
                continue
            moments = {kind: tensor for kind, tensor in self.optimizer.state[flat].items() if kind != "step"}
            tensors = {
                kind: tensor.detach().flatten().narrow(0, offset, numel)
                for kind, tensor in {"param": flat, **moments}.items()
            }
            yield Fragment(name, tuple(getattr(p, "ds_shape", p.shape)), start, tensors)

    def fragments_to_save(self) -> Iterator[Fragment]:
        """The fragments that this rank writes: together the ranks write each exactly once."""
        for index, fragment in enumerate(self.fragments()):
            if self.stage > 0 or index % self.world.size == self.world.rank:
                yield fragment

    def load(self, read: Reader, num_steps: int) -> None:
        """Set weights and moments bit for bit from `read`, and the optimizer's count of steps."""
        self._load_parameters(read)
        for fragment in self.fragments():
            for kind, target in fragment.tensors.items():
                if kind != "param":
                    target.copy_(read(fragment.name, kind, fragment.start, target.numel()))
        self.num_steps = num_steps
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(num_steps)

    @torch.no_grad()
    def _load_parameters(self, read: Reader) -> None:
        """Set masters to `read`'s values and the weights used in compute to the same, rounded."""
        p: Any  # DeepSpeed adds attributes to parameters
        for name, p in self.model.named_parameters():
            flat, offset, start, numel = self._locate(p)
            if self.stage > 0 and numel > 0:
                flat.detach().narrow(0, offset, numel).copy_(read(name, "param", start, numel))
            if self.stage < 3:
                p.copy_(read(name, "param", 0, p.numel()).view_as(p))
            elif numel > 0:
                p.ds_tensor.narrow(0, 0, numel).copy_(read(name, "param", start, numel))
        self._refresh_frequencies()

    def _locate(self, p: Any) -> tuple[Tensor, int, int, int]:
        """Where this rank keeps `p`: flat fp32 tensor, offset in it, start in p, elements (0: elsewhere)."""
        zero = self.deepspeed.optimizer
        if self.stage == 0:
            return p, 0, 0, p.numel()
        if self.stage == 3:
            group, offset, _ = zero.grad_position[zero.get_param_id(p)]
            start = self.world.rank * p.ds_tensor.numel()
            numel = min(p.ds_tensor.numel(), p.ds_numel - start)
            return zero.fp32_partitioned_groups_flat[group], offset, start, max(numel, 0)
        flat = self.optimizer.param_groups[self.group_index[p]]["params"][0]
        mapping = p._hp_mapping
        if mapping is None:
            return flat, 0, 0, 0
        address = mapping.get_hp_fragment_address()
        return flat, address.start, mapping.lp_fragment_address.start, address.numel

    def _matrix_parts(self) -> dict[Tensor, list[MatrixPart]]:
        """Where Muon's matrices lie in this rank's flat tensors."""
        parts: list[tuple[Tensor, MatrixPart]] = []
        p: Any
        for name, p in self.model.named_parameters():
            shape = getattr(p, "ds_shape", p.shape)
            if self.optimizer.param_groups[self.group_index[p]]["muon"]:
                flat, *place = self._locate(p)
                parts += [(flat, part) for part in matrix_parts(name, tuple(shape), *place)]
        of_ranks = self.world.gather([part.is_whole for _, part in parts])
        whole_somewhere = [any(flags) for flags in zip(*of_ranks, strict=True)]
        found: dict[Tensor, list[MatrixPart]] = {}
        for (flat, part), is_whole in zip(parts, whole_somewhere, strict=True):
            found.setdefault(flat, []).append(replace(part, is_spread=not is_whole))
        return found

    def _create_moments(self) -> None:
        """The optimizer makes its state at its first step; a save or load before that needs it too."""
        groups = self.optimizer.param_groups
        if self.stage == 3:
            zero = self.deepspeed.optimizer
            of_group = zero.sub_group_to_group_id
            flats = [(flat, groups[of_group[i]]) for i, flat in enumerate(zero.fp32_partitioned_groups_flat)]
        else:
            flats = [(flat, group) for group in groups for flat in group["params"]]
        for flat, group in flats:
            if isinstance(self.optimizer, AdamW8bit):
                self.optimizer.unpack(flat)
            else:
                create_state(self.optimizer, group, flat)

    def _refresh_frequencies(self) -> None:
        """Give LRPE its fp32 master where the parameter itself is kept in bf16."""
        if self.stage == 0 or self.config.engine.precision == "fp32":
            return
        from deepspeed.utils import safe_get_full_fp32_param

        for module in self.model.modules():
            if isinstance(module, LRPE):
                module.theta_fp32 = safe_get_full_fp32_param(module.theta).view(module.shape)

    def close(self) -> None:
        """Free DeepSpeed's hooks and buffers, and its hold on this process group: a later one may differ."""
        import deepspeed

        self.deepspeed.destroy()
        deepspeed.utils.groups._WORLD_GROUP = None


def _use_fp8(model: TransNormer, device: torch.device) -> None:
    try:
        use_fp8(model, device)
    except ValueError as error:
        raise SettingError(str(error)) from None


def compile_for_any_documents(forward: Callable) -> Callable:
    """Compile a module's forward once for all numbers of packed documents, the length of cu_seqlens.

    That length is marked at each call: stage 3 hands its modules copies of their arguments, without marks.
    """
    compiled = torch.compile(forward, dynamic=False)

    def call(*args):
        for x in args:
            if isinstance(x, Tensor) and x.dtype == torch.int32:
                torch._dynamo.maybe_mark_dynamic(x, 0)
        return compiled(*args)

    return call


@contextlib.contextmanager
def _explain_full_caches() -> Iterator[None]:
    """Compilers keep what they made on a disk, by default in /tmp; inductor hides that it is full."""
    try:
        yield
    except RuntimeError as error:
        if "No space left on device" not in str(error):
            raise
        raise RuntimeError(
            "no space left where compiled code is kept: free some, or set TORCHINDUCTOR_CACHE_DIR and "
            "TRITON_CACHE_DIR to folders on another disk."
        ) from None


def deepspeed_config(config: TrainConfig, micro_batch_size: int, accumulation_steps: int) -> dict:
    """DeepSpeed's dictionary, written from our settings: no second file, and no "auto" in it."""
    engine = config.engine
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.zero_stage == 2 and engine.precision == "bf16" and not engine.offloads:
        zero["compute_grad_norm"] = False  # Engine._set_deepspeed_norm
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if engine.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    settings = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "zero_optimization": zero,
        "gradient_clipping": config.optim.grad_clip if engine.offloads else 0.0,  # the engine clips
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if engine.zero_stage > 0:
        settings["bf16"] = {"enabled": engine.precision == "bf16"}
    return settings
