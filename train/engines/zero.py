"""DeepSpeed's own engine (Rajbhandari et al. 2019, arXiv 1910.02054): ZeRO 0 to 3, offload, bf16, many processes.

Processes are those of torch.distributed; without any, this one is alone. What is ours is small: the loss is one call of
a module that wraps what is trained, so that ZeRO gathers and frees as it goes; every micro-batch is scaled by the
weight of the whole step before its backward pass, which makes DeepSpeed's mean over processes and micro-batches the
true mean over weights; and state is read and written as whole tensors through DeepSpeed's accessors, never by its own
pickled checkpoints.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn, optim

from train import checkpoint, precision
from train.batches import Batch
from train.engines import Loss, Weigh
from train.engines.spreading import NEVER, check_spread, deepspeed_package, join, quiet
from train.engines.together import Together
from train.engines.whole import Whole
from train.optimizers import OptimizerConfig
from train.results import LossOutput

PERSISTENT_NUMBERS = 10_000
"""Parameters up to this size stay whole in stage 3: gathering one costs more than it saves."""
Value = TypeVar("Value")


class ZeroEngine(Together):
    """See `Engine`.

    Args:
        module: what is trained; its frozen parameters are spread too in stage 3.
        loss: runs under the given arithmetic.
        weigh: the weight of a batch, without the model.
        optimizer: builds the optimizer.
        arithmetic: "fp32", or "bf16": parameters in bf16 over fp32 master copies.
        clip_norm: largest gradient norm (0 = no clipping).
        accumulation: micro-batches of a step, over all processes.
        stage: ZeRO stage, 0 to 3.
        offload: "none", "optimizer" or "all" (parameters too, stage 3).
        used_apart: parts of the module whose parameters are read outside their own `forward`.

    Raises:
        TrainingError: deepspeed is not installed, micro-batches cannot be dealt out evenly, or an optimizer whose
            state cannot be spread.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        loss: Loss,
        weigh: Weigh,
        optimizer: OptimizerConfig,
        arithmetic: str,
        clip_norm: float,
        accumulation: int,
        stage: int,
        offload: str,
        used_apart: Iterable[nn.Module] = (),
    ) -> None:
        deepspeed = deepspeed_package()
        join(module)
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        check_spread(optimizer, accumulation=accumulation, size=self.size, stage=stage)
        self._module, self._weigh, self._arithmetic, self._stage = module, weigh, arithmetic, stage
        self._micros = accumulation // self.size
        self._named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._device = self._named[0][1].device
        self._start_alike()
        initial = {name: p.detach().cpu().clone() for name, p in self._named} if arithmetic == "bf16" else {}
        self._whole = Whole(module, loss, used_apart)
        settings = _settings(arithmetic, clip_norm, self._micros, stage, offload)
        with quiet():
            self._engine, self.optimizer, _, _ = deepspeed.initialize(
                model=self._whole, optimizer=optimizer.build(self._named), config=settings
            )
        if stage == 3:
            self._whole.gather_directly(deepspeed.zero.register_external_parameter)
        if initial:
            self._load_weights(initial)  # the master copies are the weights themselves, not their bf16 rounding

    # A step

    def accumulate(self, batches: Iterable[Batch]) -> list[LossOutput]:
        """See `Engine.accumulate`; all batches of this process are held until their weights are known."""
        held = list(batches)
        mine = sum(self._weigh(batch) for batch in held)
        weight = float(self.total(torch.tensor([mine], dtype=torch.float64)))
        # DeepSpeed divides by micro-batches and processes; a step without weight is refused by the loop.
        share = self.size * self._micros / weight if weight else 0.0
        outputs = []
        with quiet():
            for number, batch in enumerate(held):
                if number:
                    self._engine.step()  # between micro-batches this only counts
                outputs.append(self._backward(batch, share))
        return outputs

    def _backward(self, batch: Batch, share: float) -> LossOutput:
        with precision.arithmetic(self._arithmetic, device=self._device):
            loss = self._engine(batch)
        output = self._whole.output
        del self._whole.output
        self._engine.backward(loss * share)
        output.loss_sum = output.loss_sum.detach()
        return output

    def move(self, weight: float) -> float:
        """See `Engine.move`; the weight is in the gradients already."""
        plain = self._stage == 0 and self._arithmetic == "fp32"
        grads = [p.grad for _, p in self._named if p.grad is not None] if plain else []
        norm = torch.nn.utils.get_total_norm(grads) if grads else None
        with quiet():
            self._engine.step()
        return float(self._engine.get_global_grad_norm() if norm is None else norm)

    def within(self, call: Callable[[], Value]) -> Value:
        """See `Engine.within`."""
        with quiet(), precision.arithmetic(self._arithmetic, device=self._device):
            value: Value = self._whole(None, call)
        return value

    # State

    def weights(self) -> dict[str, Tensor]:
        """See `Engine.weights`."""
        from deepspeed.utils import safe_get_full_fp32_param

        if self._stage == 0 and self._arithmetic == "fp32":
            return {name: p.detach() for name, p in self._named}
        return self._gathered(safe_get_full_fp32_param)

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """See `Engine.optimizer_state`."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if self._stage == 0 and self._arithmetic == "fp32":
            return checkpoint.optimizer_state(self._module, self.optimizer)
        flat = [state for state in self._inner().state.values() if state]
        if not flat:
            return {}
        self._link()
        keys = [key for key in flat[0] if key != "step"]
        whole = {key: self._gathered(partial(safe_get_full_optimizer_state, optim_state_key=key)) for key in keys}
        step = flat[0]["step"].detach().cpu().clone()
        return {name: {"step": step, **{key: whole[key][name] for key in keys}} for name in (whole[keys[0]])}

    def _gathered(self, read: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        """What `read` gives for every trained parameter, kept on the CPU of the first process alone."""
        found = {}
        with quiet():
            for name, parameter in self._named:
                value = read(parameter)
                if self.rank == 0:
                    found[name] = value.detach().cpu().clone()
        return found

    def load(self, weights: dict[str, Tensor], state: dict[str, dict[str, Tensor]]) -> None:
        """See `Engine.load`."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        self._load_weights(weights)
        if not state:
            return
        if self._stage == 0 and self._arithmetic == "fp32":
            checkpoint.load_optimizer_state(self._module, self.optimizer, state)
            return
        first = next(iter(state.values()))
        keys = [key for key in first if key != "step"]
        fused = any(group.get("fused") for group in self._inner().param_groups)
        for flat in self._flat_parameters():
            zeros = {key: torch.zeros_like(flat.data) for key in keys}
            # A fused kernel reads the count where the numbers are, the others read it on the CPU.
            count = first["step"].clone().to(flat.device if fused else "cpu")
            self._inner().state[flat] = {"step": count, **zeros}
        self._link()
        for name, parameter in self._named:
            for key in keys:
                if self._stage == 3:
                    safe_set_local_optimizer_state(parameter, self._part(parameter, state[name][key]), key)
                else:
                    safe_set_full_optimizer_state(parameter, state[name][key].to(self._device), key)

    def _load_weights(self, weights: dict[str, Tensor]) -> None:
        """Set master copies and what is computed with."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        gather = self._gather([p for _, p in self._named], changed=True)
        with torch.no_grad(), quiet(), gather:
            for name, parameter in self._named:
                parameter.copy_(weights[name])
        if self._stage == 0 and self._arithmetic == "fp32":
            return
        for name, parameter in self._named:
            if self._stage == 3:
                safe_set_local_fp32_param(parameter, self._part(parameter, weights[name]))
            else:
                safe_set_full_fp32_param(parameter, weights[name].to(self._device).float())

    def _part(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """This process's part of a tensor in stage 3, fp32 `[n]`: parts are equal, the last one filled up. (DeepSpeed's
        own setter of whole tensors overruns where the numbers do not go round.)"""
        spread: Any = parameter
        count = spread.ds_tensor.ds_numel
        filled = torch.zeros(count * self.size, dtype=torch.float32)
        filled[: whole.numel()] = whole.flatten()
        return filled.narrow(0, count * self.rank, count).to(self._device)

    def _link(self) -> None:
        """Let parameters know their optimizer state. DeepSpeed does so once, after the first of several groups moved,
        when the others have none yet."""
        if self._stage < 3:
            outer: Any = self.optimizer
            outer._hp_optimizer_states_linked = False
            outer._lazy_init_hp_params_optimizer_state()

    def _gather(self, parameters: list[nn.Parameter], *, changed: bool = False) -> AbstractContextManager[None]:
        """Parameters whole inside the context, and what the first process made of them spread again after it."""
        if self._stage < 3 or not parameters:
            return nullcontext()
        context: AbstractContextManager[None] = deepspeed_package().zero.GatheredParameters(
            parameters, modifier_rank=0 if changed else None
        )
        return context

    def _inner(self) -> optim.Optimizer:
        """The optimizer that DeepSpeed drives."""
        inner: optim.Optimizer = self.optimizer.optimizer
        return inner

    def _flat_parameters(self) -> list[Tensor]:
        """The parameters that the inner optimizer moves: this process's parts, one after another."""
        outer: Any = self.optimizer
        if self._stage == 3:
            return list(outer.fp32_partitioned_groups_flat)
        return [p for group in self._inner().param_groups for p in group["params"]]

    def finish(self) -> None:
        """See `Engine.finish`."""
        weights = self.weights()
        frozen = [p for p in self._module.parameters() if not p.requires_grad]
        with quiet(), self._gather(frozen):
            kept = [p.data.detach().float().clone() if p.is_floating_point() else p.data.clone() for p in frozen]
        with quiet():
            self._engine.destroy()
        for parameter, data in zip(frozen, kept, strict=True):
            parameter.data = data
        for name, parameter in self._named:
            if self.rank == 0:
                parameter.data = weights[name].to(self._device)


def _settings(arithmetic: str, clip_norm: float, micros: int, stage: int, offload: str) -> dict[str, Any]:
    """DeepSpeed's own configuration."""
    zero: dict[str, Any] = {"stage": stage}
    if offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = PERSISTENT_NUMBERS
    return {
        "train_micro_batch_size_per_gpu": 1,  # a batch's size is the loss's business: DeepSpeed only multiplies with it
        "gradient_accumulation_steps": micros,
        "gradient_clipping": clip_norm,
        "bf16": {"enabled": arithmetic == "bf16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": NEVER,
    }
