"""The work that all contenders do, the contenders, and the check that they do it."""

import concurrent.futures
import dataclasses
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.func import functional_call, grad, vmap

from fasttrain.backends import choose, make_backend, together
from fasttrain.backends.base import Run, Setting
from fasttrain.machine import cores
from fasttrain.models import MLP
from fasttrain.records import Probe, Problem
from fasttrain.spec import ScanSpec

SAMPLES = 512
BLOCK = 20  # steps whose minibatches are drawn before the clock starts, and used again


@dataclass(frozen=True)
class Case:
    """Models of one shape: B samples a minibatch, I inputs, H width, L depth, 10 classes; momentum 0.9."""

    batch: int
    features: int
    width: int
    depth: int = 1
    optimizer: str = "sgd"
    models: int = 64
    device: str = "cpu"

    def of(self, models: int) -> "Case":
        """The same with so many models."""
        return dataclasses.replace(self, models=models)

    @property
    def name(self) -> str:
        """As in the tables."""
        widths = "x".join([str(self.width)] * self.depth)
        return f"B={self.batch} d={self.features} w={widths} {self.optimizer} E={self.models}"

    @property
    def flops(self) -> int:
        """Floating-point operations of the products of one model-step: forward, dW, and dX but of the first layer."""
        products = [a * b for a, b in self._layers]
        return 2 * self.batch * (3 * sum(products) - products[0])

    @property
    def bytes(self) -> int:
        """What a model-step must at least move in float32: its samples in; parameters and moments in and out."""
        params = sum((a + 1) * b for a, b in self._layers)
        return 4 * (self.batch * self.features + (4 if self.optimizer == "sgd" else 6) * params)

    @property
    def _layers(self) -> list[tuple[int, int]]:
        return list(itertools.pairwise([self.features, *[self.width] * self.depth, 10]))

    def setting(self, dtype: torch.dtype, steps: int, precision: str | None = None) -> Setting:
        """The scan that this would be; a run is looked at once, at its end."""
        spec = ScanSpec(
            widths=self.width,
            depths=self.depth,
            data=f"gaussian:{self.features}",
            batch_size=self.batch,
            optimizer=self.optimizer,
            lr=0.01,
            steps=steps,
            check_every=steps,
            seed=1,
            device=self.device,
            precision=precision or str(dtype).removeprefix("torch."),
        )
        return Setting(spec, self.features, torch.device(self.device), dtype)

    def runs(self, setting: Setting, models: int) -> list[Run]:
        """Runs that differ in their seed."""
        (variant,) = setting.spec.variants(10)
        problem = Problem(0, variant, 1, 1, SAMPLES)
        return [Run.of(setting, problem, Probe(0, SAMPLES, seed)) for seed in range(models)]


class Stacked:
    """What a peer gets: data [E, N, I], labels [E, N], batches [S, E, B] and weights by name [E, ...], as arrays."""

    def __init__(self, case: Case, models: int) -> None:
        setting = case.setting(torch.float32, 10**6)
        runs = case.runs(setting, models)
        self.x = np.stack([run.task.pool[run.task.rows] for run in runs]).astype(np.float32)
        self.y = np.stack([run.task.y for run in runs])
        self.batches = np.stack([run.batches(BLOCK) for run in runs], axis=1)
        drawn = [run.initial_weights(setting) for run in runs]
        self.weights = {name: np.stack([d[name] for d in drawn]).astype(np.float32) for name in drawn[0]}


Steps = Callable[[int], object]


def ours(name: str) -> Callable[[Case], Steps]:
    """A backend as the trainer drives it: a state a model and a worker a core for ``native``, else one state of all."""

    def make(case: Case) -> Steps:
        setting = case.setting(torch.float32, 10**9)
        (variant,) = setting.spec.variants(10)
        backend = make_backend(choose(name, setting, variant), setting, variant)
        runs = case.runs(setting, case.models)
        each = backend.most_together or case.models
        states = [backend.init(runs[i : i + each]) for i in range(0, case.models, each)]
        pool = concurrent.futures.ThreadPoolExecutor(cores() if backend.most_together else 1)

        def run(steps: int) -> None:
            torch.set_num_threads(1)  # as a scan does
            list(pool.map(lambda state: backend.run(state, state.clock + steps), states))
            torch.set_num_threads(cores())

        return run

    return make


def eager_loop(case: Case) -> Steps:
    """Plain torch, one model after the other."""
    setting = case.setting(torch.float32, 10**9)
    backend = make_backend("loop", setting, setting.spec.variants(10)[0])
    state = backend.init(case.runs(setting, case.models))
    return lambda steps: backend.run(state, state.clock + steps)


class TorchVmap:
    """torch.func.vmap over stacked parameters, optionally compiled."""

    def __init__(self, case: Case, models: int, compiled: bool = False) -> None:
        data = Stacked(case, models)
        setting = case.setting(torch.float32, 10**6)
        model = MLP(setting.spec.variants(10)[0], case.features)
        device = torch.device(case.device)
        self.params = {name: torch.as_tensor(value, device=device) for name, value in data.weights.items()}
        self.moments = [{name: torch.zeros_like(p) for name, p in self.params.items()} for _ in range(2)]
        self.x, self.y = torch.as_tensor(data.x, device=device), torch.as_tensor(data.y, device=device)
        self.batches = torch.as_tensor(data.batches, device=device)
        self.done = 0
        row = torch.arange(models, device=device)[:, None]

        def loss(p, x, y):
            return torch.nn.functional.cross_entropy(functional_call(model, p, (x,)), y)

        def step(params, first, second, x, y, batch, t):
            grads = vmap(grad(loss))(params, x[row, batch], y[row, batch])
            for name, g in grads.items():
                if case.optimizer == "sgd":
                    first[name].mul_(0.9).add_(g)
                    params[name].sub_(first[name], alpha=0.01)
                else:
                    first[name].mul_(0.9).add_(g, alpha=0.1)
                    second[name].mul_(0.999).addcmul_(g, g, value=0.001)
                    root = (second[name] / (1 - 0.999**t)).sqrt_().add_(1e-8)
                    params[name].sub_(first[name] / root * (0.01 / (1 - 0.9**t)))

        self.step = torch.compile(step, dynamic=False) if compiled else step
        self.adam = case.optimizer == "adam"

    def __call__(self, steps: int) -> None:
        """So many steps of all models."""
        with torch.no_grad():
            for _ in range(steps):
                t = self.done + 1.0 if self.adam else None
                self.step(self.params, *self.moments, self.x, self.y, self.batches[self.done % BLOCK], t)
                self.done += 1

    def arrays(self) -> dict[str, np.ndarray]:
        """Parameters [E, ...] by name."""
        return {name: value.cpu().numpy() for name, value in self.params.items()}


class Jax:
    """JAX vmap and jit, BLOCK steps in one compiled scan."""

    def __init__(self, case: Case, models: int) -> None:
        import jax
        import jax.numpy as jnp

        data = Stacked(case, models)
        names = [f"layers.{i}" for i in range(case.depth + 1)]
        self.names = list(data.weights)
        self.state = [{k: jnp.asarray(v) for k, v in data.weights.items()}]
        self.state += [{k: jnp.zeros_like(v) for k, v in self.state[0].items()} for _ in range(2)]
        self.x, self.y = jnp.asarray(data.x), jnp.asarray(data.y)
        self.batches = jnp.asarray(data.batches)
        self.done = 0
        row = jnp.arange(models)[:, None]

        def loss(p, x, y):
            for name in names[:-1]:
                x = jax.nn.relu(x @ p[name + ".weight"].T + p[name + ".bias"])
            z = jax.nn.log_softmax(x @ p[names[-1] + ".weight"].T + p[names[-1] + ".bias"])
            return -jnp.take_along_axis(z, y[:, None], 1).mean()

        def one(state, inputs):
            batch, mean_part, square_part = inputs
            params, first, second = state
            grads = jax.vmap(jax.grad(loss))(params, self.x[row, batch], self.y[row, batch])
            if case.optimizer == "sgd":
                first = jax.tree.map(lambda m, g: 0.9 * m + g, first, grads)
                params = jax.tree.map(lambda p, m: p - 0.01 * m, params, first)
            else:
                first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
                second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, grads)
                rate = 0.01 / mean_part
                params = jax.tree.map(
                    lambda p, m, v: p - rate * m / (jnp.sqrt(v / square_part) + 1e-8), params, first, second
                )
            return [params, first, second], None

        self.block = jax.jit(lambda state, *inputs: jax.lax.scan(one, state, inputs)[0])
        self.ready = jax.block_until_ready

    def __call__(self, steps: int) -> None:
        """So many steps of all models."""
        assert steps % BLOCK == 0
        for _ in range(steps // BLOCK):
            # In float64 on the host: 1 - 0.999^t loses half of float32's digits.
            t = self.done + 1.0 + np.arange(BLOCK)
            parts = [(1 - beta**t).astype(np.float32) for beta in (0.9, 0.999)]
            self.state = self.block(self.state, self.batches, *parts)
            self.done += BLOCK
        self.ready(self.state)

    def arrays(self) -> dict[str, np.ndarray]:
        """Parameters [E, ...] by name."""
        return {name: np.asarray(self.state[0][name]) for name in self.names}  # JAX sorts the keys


def scikit_learn(case: Case) -> Steps:
    """MLPClassifier under joblib, two processes; other batches and weights, so work only."""
    import warnings

    from joblib import Parallel, delayed
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    data = Stacked(case, case.models)
    per_epoch = -(-SAMPLES // case.batch)

    def fit(x, y, epochs):
        with warnings.catch_warnings():
            # It is to run a given number of epochs, and says each time that it has not converged.
            warnings.simplefilter("ignore", ConvergenceWarning)
            MLPClassifier(
                [case.width] * case.depth, solver=case.optimizer, momentum=0.9, nesterovs_momentum=False, alpha=0.0,
                batch_size=case.batch, learning_rate_init=0.01, max_iter=epochs, tol=0.0, n_iter_no_change=10**9,
            ).fit(x, y)  # fmt: skip

    pool = Parallel(n_jobs=cores())

    def run(steps: int) -> None:
        pool(delayed(fit)(x, y, max(1, steps // per_epoch)) for x, y in zip(data.x, data.y, strict=True))

    return run


def _own(case: Case, name: str, dtype: torch.dtype, steps: int, models: int, nudge: float = 0.0) -> np.ndarray:
    setting = case.setting(dtype, 10**6)
    backend = make_backend(name, setting, together(name, setting.spec.variants(10)[0]))
    runs = case.runs(setting, models)
    for run in runs:
        run.task = type(run.task)(run.task.pool * (1 + nudge), run.task.rows, run.task.y)
    state = backend.init(runs)
    backend.run(state, steps)
    found = [backend.parameters(state, i) for i in range(models)]
    return np.stack([np.concatenate([p.ravel() for p in one.values()]) for one in found])


def conforms(case: Case, name: str) -> bool:
    """Whether one of our backends follows the oracle in float64, to what 4 units of rounding in the inputs do to it."""
    oracle = dataclasses.replace(case, device="cpu")
    truth = _own(oracle, "loop", torch.float64, 30, 3)
    size = np.abs(truth).max()
    bound = 30 * np.abs(_own(oracle, "loop", torch.float64, 30, 3, 4 * 2.0**-52) - truth).max() / size + 64 * 2.0**-52
    return bool(np.abs(_own(case, name, torch.float64, 30, 3) - truth).max() / size <= bound)


def peer_conforms(case: Case, make: Callable[[Case, int], TorchVmap | Jax]) -> bool:
    """Whether a peer's float32 path is no further from the float64 oracle than 4 times the float32 oracle's."""
    truth = _own(case, "loop", torch.float64, BLOCK, 3)
    own = np.sqrt(((_own(case, "loop", torch.float32, BLOCK, 3) - truth) ** 2).mean())
    peer = make(case, 3)
    peer(BLOCK)
    arrays = peer.arrays()
    found = np.concatenate([value.reshape(3, -1) for value in arrays.values()], axis=1)
    return bool(np.sqrt(((found - truth) ** 2).mean()) <= 4 * own)


def seconds(run: Steps, steps: int) -> float:
    """Of one call."""
    begin = time.perf_counter()
    run(steps)
    return time.perf_counter() - begin
