"""Views of a model that share its weights: up to a block of its language model, and copies."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from blm.backbone.compilation import Compiler
from blm.types import BlmError


def decoder_path(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of the modules down to the language model. Raises BlmError if it has no
    blocks and norm."""
    decoder = model.get_decoder()
    for name, module in model.named_modules():
        if module is decoder and {"layers", "norm"} <= module._modules.keys():
            return tuple(name.split("."))
    raise BlmError(
        f"{type(model).__name__} has no language model with 'layers' and 'norm'; it cannot be tapped"
    )


def truncated(
    model: nn.Module, path: Sequence[str], layer: int, compiler: Compiler | None = None
) -> nn.Module:
    """Return a view of model.<path[0]> with blocks 1 .. layer only and no final norm.

    Modules on the path are shallow copies; all others, and every parameter, are shared. The model
    itself does not change, so another thread may generate with it. With a `compiler` the blocks are
    compiled.
    """
    top = view = shallow_copy(model.get_submodule(path[0]))
    for name in path[1:]:
        view._modules[name] = shallow_copy(view.get_submodule(name))
        view = view.get_submodule(name)
    layers = view.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    view._modules |= {"layers": layers[:layer], "norm": nn.Identity()}
    if compiler is not None:
        top.get_submodule(".".join(path[1:-1]))._modules[path[-1]] = compiler(view)
    return top


def shallow_copy(module: nn.Module) -> nn.Module:
    """Return a copy of a module that shares its parameters.

    Children and attributes of the copy can be replaced without changing the module.
    """
    view = copy.copy(module)
    view.__dict__["_modules"] = dict(module._modules)
    return view
