"""What `fastnorm.fuse` leaves on a model, and the way back.

    a norm          `_fusion`, which lets a caller ask for an activation: the norm itself still computes the norm alone
    what calls      gets a subclass of its class, in which the methods that call norms are rewritten

All of it is copied and pickled with the model. `undo` takes it away. (calls.py is what rewritten methods call.)
"""

from __future__ import annotations

import ast
import copy
import copyreg
import inspect
import linecache
import types
import weakref
import zlib
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch.fx
from torch import nn

from .. import modules
from ..layers import fastnorm_class
from ..unfused import TorchNormActivation, forget_activation
from .calls import HELPERS, KEY, NormAct

__all__ = ["GRAPH", "KEY", "Bond", "Fusion", "Rewriting", "Rewritten", "fusion_of", "is_norm", "rewrite", "undo"]

REFUSAL = "_fusion_refused"
#: The place of a norm that a graph calls: it has the activation itself.
GRAPH = "the graph"
BONDS = "_fusion_bonds"


class Bond:
    """Ties a norm to the module whose methods call it, in copies and pickles too."""


class Fusion(NamedTuple):
    """text: what is fused with a norm, "add + relu"; place: where, in the terms of the model. bond: that of the
    module that was rewritten."""

    text: str
    place: str
    bond: Bond | None = None


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm of torch.nn's kind, which includes ours, and those of other packages that
    `convert` takes."""
    known = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, modules.Norm, TorchNormActivation)
    return isinstance(module, known) or fastnorm_class(type(module)) is not None


def fusion_of(module: nn.Module) -> Fusion | None:
    """What `fuse` has fused with this norm."""
    fusion: Fusion | None = vars(module).get(KEY)
    return fusion


# ---- rewritten methods ----


class Rewriting(NamedTuple):
    """sources: method and text, in pairs. assumed: attributes of the module that the methods take for granted. base:
    the fastnorm class that it becomes too, by name."""

    sources: tuple[tuple[str, str], ...] = ()
    assumed: tuple[str, ...] = ()
    base: str | None = None


class Rewritten:
    """Mixed in before a module's own class: the subclass that `rewrite` makes."""

    _original_class: ClassVar[type[nn.Module]]
    #: What `_subclass` was given besides: `Rewriting`'s fields.
    _rewriting: ClassVar[Rewriting]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """`type(module)(...)`, as slices of an nn.Sequential are made, is a new module of the original class."""
        return cls._original_class(*args, **kwargs)

    def add_module(self: Any, name: str, module: nn.Module | None) -> None:
        if name in self._rewriting.assumed:
            _undo_calls(self)
            self.add_module(name, module)  # by the class that it has now
        else:
            super().add_module(name, module)  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        changes = name in self._rewriting.assumed and getattr(self, name, self) is not value
        if changes and "_is_replica" not in vars(self):  # a replica is given the replicas of its children
            _undo_calls(self)
            setattr(self, name, value)  # by the class that it has now
        else:
            super().__setattr__(name, value)

    def _replicate_for_data_parallel(self: Any) -> nn.Module:
        """torch's makes the replica by `__new__`, which here is a constructor of the original class."""
        plain = nn.Module.__new__(nn.Module)
        plain.__dict__ = self.__dict__
        replica: nn.Module = plain._replicate_for_data_parallel()
        replica.__class__ = type(self)
        return replica

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class does not exist where the module is loaded: it is made again."""
        reduced: Any = super().__reduce_ex__(protocol)
        function, args, *rest = reduced
        if function is copyreg.__newobj__ and args == (type(self),):  # type: ignore[attr-defined]
            function, args = _new, (self._original_class, self._rewriting)
        return (function, args, *rest)

    def __prepare_scriptable__(self: Any) -> nn.Module:
        """torch.jit.script compiles the module as it was, with the same Parameters and buffers."""
        tensors = {id(t): t for t in (*self.parameters(), *self.buffers())}
        plain: nn.Module = copy.deepcopy(self, tensors)
        undo(plain)
        return plain


def _new(cls: type[nn.Module], rewriting: Rewriting) -> nn.Module:
    made: nn.Module = object.__new__(_subclass(cls, rewriting))
    return made


_classes: weakref.WeakKeyDictionary[type, dict[Rewriting, type]] = weakref.WeakKeyDictionary()


def _subclass(cls: type[nn.Module], rewriting: Rewriting) -> type[nn.Module]:
    """The same one for the same text."""
    made = _classes.setdefault(cls, {})
    if rewriting not in made:
        body: dict[str, Any] = {name: compile_method(cls, name, text) for name, text in rewriting.sources}
        body |= {"_original_class": cls, "_rewriting": rewriting}
        body |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        bases: tuple[type, ...] = (Rewritten, cls)
        if rewriting.base is not None:
            bases = (Rewritten, NormAct, getattr(modules, rewriting.base), cls)
            body["torch_class"] = cls
        made[rewriting] = types.new_class(cls.__name__, bases, {}, lambda namespace: namespace.update(body))
        if rewriting.base is not None:
            made[rewriting]._public_class = made[rewriting]  # type: ignore[attr-defined]
    return made[rewriting]


def compile_method(cls: type, name: str, text: str) -> Callable[..., Any]:
    """The function of `text`, with the globals, defaults and closure of `cls`'s method of that name."""
    original = inspect.getattr_static(cls, name)
    free = dict(zip(original.__code__.co_freevars, original.__closure__ or (), strict=True))
    parameters = ", ".join([*free, *HELPERS])
    # A function around it for the names that it takes from outside, `__class__` of super() among them.
    source = f"def factory({parameters}):\n" + "".join(f"    {line}\n" for line in text.splitlines())
    source += f"    return {name}\n"
    filename = f"<fastnorm.fuse {cls.__module__}.{cls.__qualname__}.{name} {zlib.crc32(text.encode()):x}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)  # for tracebacks
    namespace: dict[str, Any] = {}
    exec(compile(ast.parse(source), filename, "exec", dont_inherit=True), original.__globals__, namespace)
    made = namespace["factory"](*(cell.cell_contents for cell in free.values()), *HELPERS.values())
    made.__defaults__, made.__kwdefaults__ = original.__defaults__, original.__kwdefaults__
    made.__annotations__ = dict(getattr(original, "__annotations__", {}))
    made.__doc__, made.__qualname__, made.__module__ = original.__doc__, original.__qualname__, original.__module__
    return made  # type: ignore[no-any-return]


def rewrite(module: nn.Module, rewriting: Rewriting) -> None:
    """Give `module` the subclass of its class that `rewriting` describes, on top of what it has been given before."""
    cls = type(module)
    if isinstance(module, Rewritten):
        cls, before = module._original_class, module._rewriting
        rewriting = Rewriting(
            tuple((dict(before.sources) | dict(rewriting.sources)).items()),
            tuple(sorted({*before.assumed, *rewriting.assumed})),
            before.base or rewriting.base,
        )
    module.__class__ = _subclass(cls, rewriting)


# ---- the way back ----


def undo(model: nn.Module) -> None:
    """Take back what `fuse` has done inside `model`. A norm whose graph is outside of `model` keeps its activation."""
    inside = {id(module): module for module in model.modules()}
    graphs = [module for module in inside.values() if isinstance(module, torch.fx.GraphModule)]
    of_graphs = {id(module) for graph in graphs for module in graph.modules()}
    freed = {
        id(module): module
        for module in inside.values()
        if (fusion := fusion_of(module)) is not None and (fusion.place != GRAPH or id(module) in of_graphs)
    }
    for module in inside.values():
        if isinstance(module, Rewritten):
            freed[id(module)] = module
            module.__class__ = module._original_class  # type: ignore[assignment]
    for module in inside.values():
        vars(module).pop(REFUSAL, None)
        vars(module).pop(BONDS, None)
    for norm in freed.values():
        _free(norm)


def _undo_calls(module: Any) -> None:
    """Take back what `fuse` has done with the calls in this module's own methods."""
    bonds = [*vars(module).pop(BONDS, [])]
    if (own := fusion_of(module)) is not None and own.bond is not None:  # it hands a residual on
        bonds.append(own.bond)
    module.__class__ = module._original_class
    for called in module.modules():
        fusion = fusion_of(called)
        if fusion is not None and any(fusion.bond is bond for bond in bonds):
            _free(called)
            if isinstance(called, Rewritten):  # it hands the residual on
                _undo_calls(called)
    _free(module)


def _free(module: nn.Module) -> None:
    """Take from a norm, or from a module that hands a residual on, what `fuse` has left there."""
    for name in (KEY, "_adds_in_place"):
        vars(module).pop(name, None)
    reverted = isinstance(module, TorchNormActivation)  # without what follows it
    if reverted or vars(module).get("_fuses"):
        forget_activation(module)
    if reverted:
        module.__class__ = module.torch_class  # type: ignore[assignment]
