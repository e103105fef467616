"""Models of the user's own (``fasttrain.factories``): built, tried before training, and whether vmap can batch them."""

import numpy as np
import torch
from torch.func import functional_call, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parameter import is_lazy

from fasttrain.errors import UserError
from fasttrain.factories import factory, first_line
from fasttrain.spec import Variant

NO_PARAMETERS = "has no parameters to train"
_ARRAYS_A_SAMPLE = 16  # of the widest layer's size: what a module of unknown insides is taken to keep


def build(variant: Variant, in_shape: tuple[int, ...]) -> torch.nn.Module:
    """The user's module.

    Raises:
        UserError: the factory raises, or gives no module.
    """
    try:
        module = factory(variant.arch)(variant.width, variant.depth, in_shape, variant.classes)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        what = f"raised for width {variant.width}, depth {variant.depth}: {first_line(error)}"
        raise UserError("arch", variant.arch, what) from None
    if not isinstance(module, torch.nn.Module):
        raise UserError("arch", variant.arch, f"gave a {type(module).__name__}; expected a torch.nn.Module")
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise UserError("arch", variant.arch, f"its parameter {name} has no shape yet; expected no lazy layers")
        if parameter.device.type != "cpu":
            what = f"its parameter {name} is on the device {parameter.device}; expected the CPU, it is moved from there"
            raise UserError("arch", variant.arch, what)
    return module


def draw(variant: Variant, in_shape: tuple[int, ...], seed: int) -> dict[str, np.ndarray]:
    """Initial parameters as the module draws them under a seed of torch's CPU generator, float64, by name; those with
    two or more dimensions times the variant's ``init_scale``."""
    module, _ = _seeded(variant, in_shape, seed)
    scale = variant.init_scale
    return {
        name: p.detach().double().numpy() * (scale if p.dim() > 1 else 1.0) for name, p in module.named_parameters()
    }


def sample_elements(module: torch.nn.Module, in_shape: tuple[int, ...]) -> int:
    """A guess of what a pass over one sample keeps: of a module's insides only the parameters are known."""
    widest = max((p.shape[0] for p in module.parameters() if p.dim()), default=1)
    positions = int(np.prod(in_shape[1:])) if len(in_shape) > 1 else 1
    return _ARRAYS_A_SAMPLE * (int(np.prod(in_shape)) + widest * positions)


def check(variant: Variant, in_shape: tuple[int, ...], batched: bool, dtype: torch.dtype = torch.float32) -> None:
    """Tries the module on a few samples, before anything is trained.

    Args:
        variant: with the factory's name.
        in_shape: of a sample.
        batched: whether vmap is to train it.
        dtype: of its parameters and inputs then.

    Raises:
        UserError: the factory gives one module twice or seeds torch's generator; the module has no parameters, or some
            that are frozen, unused or not drawn from that generator; random buffers; it writes into its inputs; its
            logits are no tensor of the right shape, not finite, have no gradient, or differ from call to call; or, if
            ``batched``, it is one that vmap cannot train, with what in it is the reason.
    """
    (module, state), (same, _), (other, moved) = (_seeded(variant, in_shape, seed) for seed in (0, 0, 1))
    if torch.equal(state, moved):
        raise UserError("arch", variant.arch, "seeds torch's generator, which gives every run the same weights")
    _check_parts(variant, module, same, other)
    module.to(dtype)
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    x = torch.randn(6, *in_shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    given = x.clone()
    with torch.random.fork_rng(devices=[]):
        whole = _called(variant, module, x)
        if not torch.equal(x, given):
            raise UserError("arch", variant.arch, "it writes into its inputs")
        changed = [name for name, b in module.named_buffers() if not torch.equal(b, buffers[name])]
        again, half = _called(variant, module, x), _called(variant, module, x[:3])
        calm = _called(variant, module.eval(), x)
        module.train()
    if tuple(whole.shape) != (6, variant.classes):
        raise UserError(
            "arch", variant.arch, f"gave logits of shape {tuple(whole.shape)}; expected (6, {variant.classes})"
        )
    if not whole.isfinite().all():
        raise UserError("arch", variant.arch, "its logits at the initial weights are not finite")
    # In training, batch normalisation takes the batch's own statistics: the same outputs for the same batch.
    if not torch.equal(whole, again):
        raise UserError("arch", variant.arch, f"{_layer(module, _RANDOM, 'it')} gives other outputs at every call")
    unused = _unused(variant, module, x)
    if unused:
        raise UserError("arch", variant.arch, f"its parameter {unused} has no part in its outputs")
    if not batched:
        return
    advice = "take it out, or train with --backend loop"
    if not torch.allclose(whole[:3], half, rtol=1e-3, atol=1e-5):
        what = _layer(module, _STATISTICS, "something in it")
        raise UserError("arch", variant.arch, f"{what} mixes the samples of a batch, which cannot be batched; {advice}")
    if changed:
        raise UserError(
            "arch", variant.arch, f"its buffer {changed[0]} changes in place, which vmap cannot batch; {advice}"
        )
    if not torch.equal(whole, calm):
        raise UserError("arch", variant.arch, f"it gives other outputs in eval() than in train(); {advice}")
    stacked = {name: torch.stack([p.detach()] * 2) for name, p in module.named_parameters()}

    def loss(p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(module, p, (x,)).square().sum()

    def logits(p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(module, p, (x,))

    try:
        # As a backend does: some operations are batched with a gradient and not without one.
        with torch.no_grad():
            for function in (torch.func.grad(loss), logits):
                make_fx(lambda p, x: vmap(function)(p, x))(stacked, torch.stack([x] * 2))  # noqa: B023
    except Exception as error:
        what = f"vmap cannot batch it ({first_line(error)})"
        usual = "mostly a branch or loop that depends on values, .item(), or writing in place"
        raise UserError("arch", variant.arch, f"{what}; {usual}; {advice}") from None


def _seeded(variant: Variant, in_shape: tuple[int, ...], seed: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """The module, built with torch's CPU generator at a seed, and the generator's state then; it is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build(variant, in_shape), torch.get_rng_state()


def _check_parts(variant: Variant, module: torch.nn.Module, again: torch.nn.Module, other: torch.nn.Module) -> None:
    """Whether a module's parameters follow from the seed, its buffers from nothing, and all of them are trained.

    Args:
        variant: for the message.
        module: at a seed.
        again: at the same seed.
        other: at another one.
    """
    named, repeated = dict(module.named_parameters()), dict(again.named_parameters())
    if not named:
        raise UserError("arch", variant.arch, NO_PARAMETERS)
    if named.keys() != repeated.keys():
        raise UserError("arch", variant.arch, "gives modules with other parameters at every call")
    for name, p in named.items():
        if p is repeated[name]:
            raise UserError("arch", variant.arch, f"gives the same parameter {name} at every call; expected a new one")
        if not p.requires_grad:
            raise UserError("arch", variant.arch, f"its parameter {name} is frozen; expected a buffer in its place")
        if not torch.equal(p, repeated[name]):
            what = "differs from call to call of the factory; expected draws from torch's own generator only"
            raise UserError("arch", variant.arch, f"its parameter {name} {what}")
    for name, buffer in module.named_buffers():
        if not torch.equal(buffer, dict(other.named_buffers()).get(name, torch.empty(0))):
            raise UserError("arch", variant.arch, f"its buffer {name} is random; expected the same one at every call")


def _unused(variant: Variant, module: torch.nn.Module, x: torch.Tensor) -> str | None:
    """A parameter that gets no gradient."""
    try:
        module(x).square().sum().backward()
    except Exception as error:
        raise UserError("arch", variant.arch, f"has no gradient: {first_line(error)}") from None
    return next((name for name, p in module.named_parameters() if p.grad is None), None)


_RANDOM = (torch.nn.modules.dropout._DropoutNd,)
_STATISTICS = (torch.nn.modules.batchnorm._NormBase,)


def _layer(module: torch.nn.Module, kinds: tuple[type, ...], otherwise: str) -> str:
    """The first layer of some kinds, by name."""
    for name, layer in module.named_modules():
        if isinstance(layer, kinds):
            return f"its layer {name or 'itself'} ({type(layer).__name__})"
    return otherwise


def _called(variant: Variant, module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    try:
        out = module(x)
    except Exception as error:
        what = f"fails on inputs of shape {tuple(x.shape)}: {first_line(error)}"
        raise UserError("arch", variant.arch, what) from None
    if not isinstance(out, torch.Tensor):
        raise UserError("arch", variant.arch, f"its module gave a {type(out).__name__}; expected a tensor of logits")
    return out.detach()
