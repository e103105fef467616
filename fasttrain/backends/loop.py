"""The oracle: one model at a time with torch.nn, torch.optim and autograd, and nothing clever."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional as F

from fasttrain.backends import oracle_optimizers
from fasttrain.backends.base import Report, Run, Setting
from fasttrain.models import build, input_shape
from fasttrain.optim import lr_factor
from fasttrain.records import Saved
from fasttrain.spec import FULL_BATCH, Variant


@dataclass(slots=True, eq=False)
class _Trained:
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR | None
    x: torch.Tensor  # [N, ...], as the module takes it
    y: torch.Tensor  # [N]


@dataclass(slots=True, eq=False)
class LoopState:
    """Runs with a module and an optimizer each."""

    runs: list[Run]
    trained: list[_Trained]
    clock: int = field(default=0)


def _optimizer(variant: Variant, model: torch.nn.Module) -> torch.optim.Optimizer:
    params, lr, decay = model.parameters(), variant.lr, variant.weight_decay
    momentum, nesterov = variant.momentum, variant.nesterov
    if variant.optimizer == "sgd":
        return torch.optim.SGD(params, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=decay)
    if variant.optimizer == "muon":
        return oracle_optimizers.Muon(params, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=decay)
    others: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "rmsprop": torch.optim.RMSprop,
        "shampoo": oracle_optimizers.Shampoo,
    }
    return others[variant.optimizer](params, lr=lr, weight_decay=decay)


def _scheduler(
    variant: Variant, steps: int, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LambdaLR | None:
    if variant.schedule == "constant" and not variant.warmup:
        return None
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: lr_factor(variant.schedule, variant.warmup, steps, done)
    )


def _go_on(
    begun: Saved,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR | None,
) -> None:
    """Puts back what ``LoopBackend.saved`` took out."""
    state = model.state_dict()
    model.load_state_dict({name: torch.as_tensor(begun[f"model {name}"]) for name in state})
    for number, parameter in enumerate(model.parameters()):
        for key, value in begun.items():
            if key.startswith(f"optimizer {number} "):
                name = key.split(" ", 2)[2]
                whole = value.dtype.kind == "i"  # a number of Python's: tensors of optimizers are floats
                moved = torch.as_tensor(value).to("cpu" if name == "step" else parameter.device)
                optimizer.state[parameter][name] = int(value) if whole else moved
    if scheduler is not None:
        scheduler.last_epoch = int(begun["step"])
        for group, rate, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = rate * factor(scheduler.last_epoch)


class LoopBackend:
    """``Backend`` in plain torch."""

    name = "loop"
    most_together: int | None = None
    in_threads = False
    checks_a_turn = 1
    lanes = 1

    def __init__(self, setting: Setting) -> None:
        self._setting = setting

    def _start(self, run: Run) -> _Trained:
        setting = self._setting
        variant = run.problem.variant
        model = build(variant, setting.in_shape).to(setting.device, setting.dtype)
        weights = {name: torch.as_tensor(value) for name, value in run.initial_weights(setting).items()}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        # Buffers, and the other names of a parameter that two layers share, are not among the weights.
        assert not unexpected
        assert not set(missing) & dict(model.named_parameters()).keys()
        x = torch.as_tensor(run.task.inputs())
        optimizer = _optimizer(variant, model)
        scheduler = _scheduler(variant, run.monitor.rules.steps, optimizer)
        if (begun := run.taken()) is not None:
            _go_on(begun, model, optimizer, scheduler)
        return _Trained(
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            x=x.to(setting.device, setting.dtype).view(-1, *input_shape(variant, setting.in_shape)),
            y=torch.as_tensor(run.task.y, device=setting.device),
        )

    def init(self, runs: Sequence[Run]) -> LoopState:
        """See ``Backend``."""
        return LoopState(list(runs), [self._start(run) for run in runs])

    def run(self, state: LoopState, until_step: int) -> Report:
        """See ``Backend``."""
        model_steps, checking = 0, 0.0
        while state.clock < until_step:
            steps = min(run.check_due(until_step - state.clock) for run in state.runs)
            for run, trained in zip(state.runs, state.trained, strict=True):
                self._train(run, trained, steps)
            state.clock += steps
            model_steps += steps * len(state.runs)
            ended = []
            for position, (run, trained) in enumerate(zip(state.runs, state.trained, strict=True)):
                if not run.at_check:
                    continue
                begin = time.perf_counter()
                loss, wrong = self._evaluate(trained)
                checking += time.perf_counter() - begin
                if (result := run.observe(loss, wrong)) is not None:
                    ended.append((position, result))
            if ended:
                return Report(ended, model_steps, checking)
        return Report([], model_steps, checking)

    def _train(self, run: Run, trained: _Trained, steps: int) -> None:
        variant = run.problem.variant
        full = variant.batch_size == FULL_BATCH
        batches = None if full else torch.as_tensor(run.batches(steps), device=trained.y.device)
        loss = torch.tensor(torch.nan)
        for step in range(steps):
            x, y = (trained.x, trained.y)
            if batches is not None:
                x, y = x[batches[step]], y[batches[step]]
            trained.optimizer.zero_grad()
            loss = F.cross_entropy(trained.model(x), y, label_smoothing=variant.label_smoothing)
            loss.backward()
            if variant.clip:
                torch.nn.utils.clip_grad_norm_(trained.model.parameters(), variant.clip)
            trained.optimizer.step()
            if trained.scheduler is not None:
                trained.scheduler.step()
        run.step += steps
        run.batch_loss = float(loss.detach())

    @torch.no_grad()
    def _evaluate(self, trained: _Trained) -> tuple[float, int]:
        # Batch normalisation takes its running averages here, not those of the whole set.
        logits = trained.model.eval()(trained.x)
        trained.model.train()
        own = logits.gather(1, trained.y[:, None])
        others = logits.scatter(1, trained.y[:, None], -torch.inf)
        right = (own > others).all(1)
        return float(F.cross_entropy(logits.double(), trained.y)), int((~right).sum())

    def select(self, state: LoopState, keep: Sequence[int]) -> LoopState:
        """See ``Backend``."""
        return LoopState([state.runs[i] for i in keep], [state.trained[i] for i in keep], state.clock)

    def insert(self, state: LoopState, runs: Sequence[Run]) -> LoopState:
        """See ``Backend``."""
        trained = [*state.trained, *(self._start(run) for run in runs)]
        return LoopState([*state.runs, *runs], trained, state.clock)

    def parameters(self, state: LoopState, position: int) -> dict[str, np.ndarray]:
        """See ``Backend``."""
        model = state.trained[position].model
        kept = [*model.named_parameters(), *model.named_buffers()]  # running averages, where there are any
        return {name: p.detach().double().cpu().numpy() for name, p in kept}

    def saved(self, state: LoopState) -> list[dict[str, np.ndarray]]:
        """See ``Backend``."""
        out = []
        for run, trained in zip(state.runs, state.trained, strict=True):
            kept: dict[str, object] = {f"model {name}": p for name, p in trained.model.state_dict().items()}
            for number, parameter in enumerate(trained.model.parameters()):
                for name, value in trained.optimizer.state.get(parameter, {}).items():
                    if value is not None:
                        kept[f"optimizer {number} {name}"] = value
            arrays = {name: torch.as_tensor(value).detach().cpu().numpy().copy() for name, value in kept.items()}
            out.append(run.saved() | arrays)
        return out
