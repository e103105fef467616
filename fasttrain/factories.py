"""Model factories of the user's own: by the name under which a spec and a file keep them. No torch.

``factory`` is the one place where a name in a spec makes fasttrain import and run other people's code.
"""

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from fasttrain.errors import UserError

Factory = Callable[[int, int, tuple[int, ...], int], Any]
"""(width, depth, in_shape, classes) to a torch.nn.Module from inputs [B, *in_shape] to logits [B, classes]."""

_REGISTERED: dict[str, Factory] = {}


def register(factory: Factory) -> str:
    """Keeps a factory for this process; its qualified name, ``module:name``.

    Another one of that name, such as a second closure, is ``module:name#2``: what a spec was made with stays.
    """
    own = f"{factory.__module__}:{getattr(factory, '__qualname__', type(factory).__qualname__)}"
    name, number = own, 1
    while _REGISTERED.setdefault(name, factory) is not factory:
        number += 1
        name = f"{own}#{number}"
    return name


def factory(name: str) -> Factory:
    """The factory of a name: a registered one, or imported. This is the one place that runs a user's code by name.

    Raises:
        UserError: it cannot be imported, or is nothing that can be called.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]
    module, _, path = name.partition(":")
    if os.getcwd() not in sys.path:  # as ``python -m`` does, which the installed command is not
        sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:  # a module of the user's may raise anything
        raise UserError("arch", name, f"cannot be imported ({first_line(error)})") from None
    if not callable(found):
        raise UserError("arch", name, "is not a function; expected one of (width, depth, in_shape, classes)")
    return found


def source_digest(name: str) -> str:
    """SHA-256 (hexadecimal) of a factory's source file, or of the factory's own source where it has no file; empty if
    neither can be read."""
    try:
        made = factory(name)
        file = inspect.getsourcefile(made)
        if file is not None:
            with open(file, "rb") as stream:
                return hashlib.sha256(stream.read()).hexdigest()
        return hashlib.sha256(inspect.getsource(made).encode()).hexdigest()
    except (OSError, TypeError):
        return ""


def first_line(error: BaseException) -> str:
    """What an exception is and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
