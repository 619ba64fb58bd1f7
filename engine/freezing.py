"""Which parameters of G and D training leaves as they are: the recipe's `freeze`.

They get no gradient, so that an Adam whose moments start at zero does not move them by a bit. Where `freeze` is another
one than before on resuming, the Adams of the networks that it concerns begin anew: moments would go on moving what is
newly frozen, and a second moment that zeros have worn down would make the first steps of what is set free too long.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Mapping

from torch import nn

from hsrgan.engine.errors import UserError
from hsrgan.engine.sections import Freeze
from hsrgan.engine.transfer import published

Frozen = dict[str, frozenset[str]]  # "G" and "D" → the names of parameters under which their modules know them


def discriminator_layers(discriminator: nn.Module) -> list[str]:
    """The layers that Freeze-D counts (arXiv 2002.10964), from the image on: in each block, as far as it has them,
    fromrgb, conv0, conv1 and skip, each of which counts; not the end at 4×4. As `--freezed` of stylegan2-ada-pytorch.
    """
    blocks = {f"b{r}": getattr(discriminator, f"b{r}") for r in discriminator.resolutions}
    return [f"{block}.{name}" for block, module in blocks.items() for name, _ in module.named_children()]


def frozen_parameters(freeze: Freeze | None, g_module: nn.Module, discriminator: nn.Module) -> Frozen:
    """UserError: a pattern that matches nothing, or nothing left to train in G or D."""
    freeze = freeze or Freeze()
    known = {
        f"{network}.{published(name)}": (network, name)
        for network, module in (("G", g_module), ("D", discriminator))
        for name, _ in module.named_parameters()
    }
    chosen = [name for name in known if freeze.mapping and name.startswith("G.mapping.")]
    for layer in discriminator_layers(discriminator)[: freeze.d]:
        chosen += [name for name in known if name.startswith(f"D.{layer}.")]
    for pattern in freeze.names:
        matches = [name for name in known if fnmatch.fnmatchcase(name, pattern)]
        if not matches:
            near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "write it as G.mapping.* or D.b16.conv0.weight"
            raise UserError(f"freeze.names: {pattern!r} matches no parameter of G or D; {hint}")
        chosen += matches
    for network, what in (("G", "the generator"), ("D", "the discriminator")):
        own = {name for name in known if name.startswith(f"{network}.") and not name.startswith("G.heads.")}
        if own <= set(chosen):
            raise UserError(f"freeze leaves nothing of {what} to train: take something out of freeze")
    return {network: frozenset(known[name][1] for name in chosen if known[name][0] == network) for network in "GD"}


def frozen_otherwise(recipe: Mapping, frozen: Frozen, g_module: nn.Module, discriminator: nn.Module) -> list[str]:
    """The networks of which the recipe of a checkpoint, as JSON has it, froze other parameters than `frozen`."""
    saved = recipe.get("freeze")
    before = frozen_parameters(Freeze.model_validate(saved) if saved else None, g_module, discriminator)
    return [network for network in frozen if frozen[network] != before[network]]


def check_known(frozen: Frozen, new: Mapping[str, Collection[str]] | None) -> None:
    """UserError where a parameter would be held at a value that nothing trained. new: by network, what `init_from` did
    not bring as it was; None where there is none.
    """
    held = [
        f"{network}.{published(name)}"
        for network, names in frozen.items()
        for name in sorted(names)
        if new is None or published(name) in new[network]
    ]
    if held:
        more = f" and {len(held) - 1} more" if len(held) > 1 else ""
        why = "the recipe has no init_from" if new is None else "init_from does not bring them as they are here"
        raise UserError(f"freeze would hold {held[0]}{more} at untrained values, since {why}: freeze less")
