"""Which tensors of a network learn: gradients, running statistics, state and counts, all from one list of names.

The list is what ``Strategy.install`` returns: names of parameters and buffers in ``network.state_dict()``. A name that
the network does not have is an AdapterError that lists all such names.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from samseg_monai.errors import AdapterError, raise_all


def keep_only(module: nn.Module, owned: Iterable[str]) -> None:
    """Let the owned parameters of ``module`` learn and freeze all others (buffers among the names are only checked)."""
    names = _checked(module, owned)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in names)


def owned_state(module: nn.Module, owned: Iterable[str]) -> dict[str, Tensor]:
    """The owned tensors, buffers included, as copies on the CPU, in the order of ``module.state_dict()``."""
    names = _checked(module, owned)
    state = {name: tensor for name, tensor in module.state_dict().items() if name in names}
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}


def count_trainable(module: nn.Module) -> int:
    """Number of values (not tensors) that get gradients."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def hold_statistics(module: nn.Module, owned: Iterable[str]) -> None:
    """Put every layer with running statistics, none of whose tensors is owned, into evaluation mode.

    A frozen batch normalisation in training mode would still move its mean and variance; trainers call ``train()``
    in every iteration, so a network must call this at the end of its own ``train()``.
    """
    names = set(owned)
    layers = [("", module)]
    while layers:  # ``named_modules`` and a state dict of each layer take milliseconds, in every iteration
        prefix, layer = layers.pop()
        layers += [
            (f"{prefix}.{name}" if prefix else name, child)
            for name, child in layer._modules.items()
            if child is not None
        ]
        if layer._buffers.get("running_mean") is None:
            continue
        tensors = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]  # not an adapter's
        own = {f"{prefix}.{name}" if prefix else name for name, _ in tensors}
        if not own & names:
            layer.eval()


def _checked(module: nn.Module, owned: Iterable[str]) -> set[str]:
    names = set(owned)
    unknown = [f"{name}: no such tensor" for name in sorted(names - module.state_dict().keys())]
    raise_all(unknown, AdapterError, "owned tensors are not in the network")
    return names
