# May import: numpy, the standard library, dispatch, products, subject, tape.
"""What a mutant is, and the decorator that makes one out of the one function in which it is wrong."""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

from .dispatch import FORMS, Form
from .products import NUMERICS, Numerics
from .subject import DIALECT, FEATURES, Stages, make

PROFILES = ("float32", "float64", "bfloat16")


class Mutant(NamedTuple):
    """A layer that is wrong in one place."""

    name: str
    clause: str  # of the spec, the one that it is filed under; what follows from it may violate others
    stage: str  # as in the report of the judge
    summary: str  # what is wrong, in a line
    source: str  # where it was shipped: an id of the catalogue of faults and a link; empty where it is only plausible
    visibility: str  # "black_box": in out, losses, gradients or overwritten inputs; "export": in exported results alone
    profiles: tuple  # the numerics under which it can be told from a correct layer
    make: Callable  # (exports="all", profile=profiles[0]) -> layer
    trigger: str  # what a case must hold for it to show; empty where any case does


def mutant(clause, stage, replaces, trigger="", source="", visibility="black_box", profiles=PROFILES, **settings):
    """Turn a function into the mutant of its name, its docstring being the summary.

    `replaces` says what the function stands in for: a field of Stages, Form or Numerics, the "order" of products, or the whole "layer",
    in which case it is called with the correct one and returns another. `source` may name GitHub's issues as owner/name#number and its
    commits as owner/name@hash. `settings` go to `subject.make`.
    """

    def record(function):
        def make_mutant(exports="all", profile=profiles[0]):
            return build(function, replaces, {"exports": exports, "numerics": NUMERICS[profile]} | settings)

        summary = function.__doc__.split("\n")[0]
        return Mutant(function.__name__, clause, stage, summary, linked(source), visibility, profiles, make_mutant, trigger)

    return record


def linked(source):
    """Write `owner/name#7` and `owner/name@7f` out as links."""
    source = re.sub(r"([\w.-]+/[\w.-]+)#(\d+)", r"https://github.com/\1/issues/\2", source)
    return re.sub(r"([\w.-]+/[\w.-]+)@([0-9a-f]{7,})", r"https://github.com/\1/commit/\2", source)


def build(function, replaces, settings):
    """Make the correct layer with one part replaced."""
    if replaces in Stages._fields:
        return make(stages=Stages(**{replaces: function}), **settings)
    if replaces in Form._fields:
        form = FORMS[settings.pop("dispatch", "gather")]
        return make(dispatch=form._replace(**{replaces: function}), **settings)
    if replaces in Numerics._fields:
        numerics = settings.pop("numerics")
        return make(numerics=numerics._replace(**{replaces: function}), **settings)
    if replaces == "order":
        return make(order=function, **settings)
    layer = make(**settings)
    return functools.update_wrapper(function(layer), layer)


class Changed:
    """A case with some of its entries replaced; None takes one away."""

    def __init__(self, case, **changes):
        self._case, self._changes = case, changes

    def get(self, name, default=None):
        """Return an entry or the default."""
        value = self._changes[name] if name in self._changes else self._case.get(name)
        return default if value is None else value

    def __getitem__(self, name):
        """Return an entry."""
        return self._changes[name] if name in self._changes else self._case[name]

    __getattr__ = __getitem__


def dialect(**knobs):
    """Declare mesh_tensorflow with other knobs, `expert_act` standing for `expert.act`."""
    return {"base": DIALECT} | {name.replace("_", "."): value for name, value in knobs.items()}


GELU = dialect(expert_act="gelu")
GELU_TANH = dialect(expert_act="gelu_tanh")
SILU = dialect(expert_act="silu")
GEGLU = dialect(expert_act="gelu", expert_glu=True)
BIASED = dialect(expert_bias="per_expert")
ROUTER_BIAS = dialect(router_bias=True)
OWN_CAPACITY = (*FEATURES, "own_capacity")
