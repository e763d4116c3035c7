# May import: standard library, numpy, hypothesis, refswitch, its own folder.
"""The Switch layer on ranks: E-CROSS-1 to E-SUM-1.

Ranks are drawn as a layout: A copies of everything, R shares of the experts, `cuts` parts of their hidden width. On a lattice where no sum
rounds every layout has the bits of one rank; elsewhere the output lies in its tube, and gradients are slopes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from properties.drawn import noise_of
from properties.harness import clause, draws, needs
from properties.operations import Operations
from properties.refusals import refusal
from properties.variant_tubes import (
    A64,
    ACTIVATIONS,
    MESH,
    POINTS,
    STEP,
    TOP_2,
    assert_within,
    aux_of,
    balance_tubes,
    expert_tubes,
    logits_tube,
    mask_of,
    random_experts,
    random_layer,
    weighted,
    z_tube,
)
from refswitch.proof.adjoint import dot
from refswitch.proof.finite_difference import difference_ratio
from refswitch.reference.expert_parallel import ParallelInputs, ParallelStatics
from refswitch.reference.experts import ExpertsParams
from refswitch.reference.switch import Statics, SwitchInputs, SwitchParams
from refswitch.spec_data import with_knob
from refswitch.verify import tubes
from refswitch.verify.tubes import Tube, exact

FAR = 1024.0  # below the highest logit a probability is exactly 0


class Layout(NamedTuple):
    """Ranks, and what lies on each."""

    A: int  # copies of the weights
    R: int  # shares of the experts
    cuts: int  # parts of the hidden width
    g: int  # groups of a rank
    E_here: int
    S: int
    capacity: int
    pads: str  # none | scattered | a rank of padding
    seed: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """E, D and F, unlike each other and unlike the others."""
        return self.R * self.E_here, 5, 7

    def by_rank(self, x: np.ndarray) -> np.ndarray:
        """Cut an array of groups into ranks, in order."""
        return x.reshape(self.A, self.R, self.g, *x.shape[1:])

    def valid(self, random: np.random.Generator) -> np.ndarray:
        """Draw which tokens are real."""
        valid_ARgS = np.ones((self.A, self.R, self.g, self.S), bool)
        if self.pads == "scattered":
            valid_ARgS = random.random(valid_ARgS.shape) < 0.75
        if self.pads == "a rank of padding":
            valid_ARgS[-1, -1] = False
        return valid_ARgS.reshape(-1, self.S)


def layouts(**given: Any) -> st.SearchStrategy[Layout]:
    """Draw a layout."""
    drawn: dict[str, Any] = {
        "A": st.integers(1, 3), "R": st.integers(1, 4), "cuts": st.integers(1, 3), "g": st.integers(1, 3), "E_here": st.integers(1, 3),
        "S": st.sampled_from((8, 1, 9, 4)), "capacity": st.integers(0, 6), "pads": st.sampled_from(("none", "scattered", "a rank of padding")),
        "seed": st.integers(0, 2**20),
    }  # fmt: skip
    return st.builds(Layout, **(drawn | given))


EXAMPLES = (Layout(2, 3, 2, 2, 2, 8, 3, "scattered", 1), Layout(1, 2, 1, 1, 3, 8, 2, "a rank of padding", 2), Layout(3, 1, 3, 2, 4, 8, 5, "none", 3))


def meets(operations: Operations, layout: Layout, kept: bool = True) -> None:
    """Enter which regimes a layout is of."""
    operations.meets("several shares", layout.R > 1 and layout.E_here > 1)
    operations.meets("several copies", layout.A > 1)
    operations.meets("several parts", layout.cuts > 1)
    operations.meets("a rank of padding", layout.pads == "a rank of padding" and layout.A * layout.R > 1)


# ------------------------------------------------------------------------------------------------------------------ the crossings


def addresses(layout: Layout, C: int) -> np.ndarray:
    """Return a buffer of each rank's slots, every element another number."""
    shape = (layout.A, layout.R, layout.g, layout.R * layout.E_here, C, 2)
    return np.arange(float(np.prod(shape))).reshape(shape)


@clause("E-CROSS-1")
@needs("several shares", "several copies")
@draws(examples=EXAMPLES, layout=layouts())
def test_cross_out__arrives_where_its_expert_lives(operations: Operations, layout: Layout) -> None:
    """Expert e of group i of rank s is, slot by slot, at rank e // E_here of its copy: expert e % E_here in group s g + i there; home undoes it."""
    meets(operations, layout)
    sent = addresses(layout, 3)
    arrived = operations.cross_out(sent)
    assert arrived.shape == (layout.A, layout.R, layout.R * layout.g, layout.E_here, 3, 2)
    for a, s, i, e in np.ndindex(layout.A, layout.R, layout.g, layout.R * layout.E_here):
        r, here = divmod(e, layout.E_here)
        assert np.array_equal(arrived[a, r, s * layout.g + i, here], sent[a, s, i, e])
    assert np.array_equal(operations.cross_home(arrived), sent)


@clause("E-CROSS-1")
@draws(examples=EXAMPLES, layout=layouts())
def test_cross_home__adjoint(operations: Operations, layout: Layout) -> None:
    """<out x, y> = <x, home y>, exactly: the gradient crosses home where the value crossed out."""
    random = np.random.Generator(np.random.Philox(layout.seed))
    x, y = (random.integers(-9, 10, addresses(layout, 3).shape).astype(float) for _ in range(2))
    y = y.reshape(layout.A, layout.R, layout.R * layout.g, layout.E_here, 3, 2)
    assert dot(operations.cross_out(x), y) == dot(x, operations.cross_home(y))


@clause("E-CROSS-2")
@needs("several shares")
@draws(examples=EXAMPLES, layout=layouts())
def test_cross_out__every_pair_of_ranks_has_its_share(operations: Operations, layout: Layout) -> None:
    """Every rank gets g E / R C D values from each rank of its copy, in either direction: (R - 1) / R of a buffer leaves its rank, none its copy."""
    meets(operations, layout)
    C, here = 4, np.arange(layout.A * layout.R).reshape(layout.A, layout.R)
    share = layout.g * layout.E_here * C * 2
    marked = np.broadcast_to(here[:, :, None, None, None, None], addresses(layout, C).shape).astype(float)
    for buffer in (
        operations.cross_out(marked),
        operations.cross_home(np.broadcast_to(here[:, :, None, None, None, None], operations.cross_out(marked).shape)),
    ):
        for a, r in np.ndindex(layout.A, layout.R):
            source, count = np.unique(buffer[a, r], return_counts=True)
            assert source.tolist() == here[a].tolist()
            assert count.tolist() == [share] * layout.R


@clause("E-CROSS-2")
@draws(R=st.integers(2, 4), more=st.integers(1, 3))
def test_cross_out__refuses_uneven_shares(operations: Operations, R: int, more: int) -> None:
    """Experts that cannot be shared evenly are refused, not cut short."""
    E = R * more + 1
    if E % R:
        assert f"{E} experts" in refusal(lambda: operations.cross_out(np.zeros((1, R, 1, E, 2, 3))))


# ---------------------------------------------------------------------------------------------------------------------- the parts


@clause("E-CUT-1")
@needs("uneven parts", "gated", "plain")
@draws(
    examples=[(3, 7, True, 5), (1, 4, False, 6), (2, 3, False, 7)],
    cuts=st.integers(1, 3),
    F=st.integers(3, 8),
    is_gated=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_cut_experts__sum_to_the_whole(operations: Operations, cuts: int, F: int, is_gated: bool, seed: int) -> None:
    """On integers, where nothing rounds: output and every gradient are those of uncut experts by plain loops; the output's bias counts once."""
    random = np.random.Generator(np.random.Philox(seed))
    G, E, C, D, share = 2, 4, 3, 5, slice(1, 3)

    def whole(*shape: int) -> np.ndarray:
        return random.integers(-3, 4, shape).astype(float)

    params = ExpertsParams(
        whole(E, D, F), whole(E, D, F) if is_gated else None, whole(E, F, D), whole(E, F), whole(E, F) * is_gated, whole(E, D)
    )  # fmt: skip
    x_GeCD, mask_GeCF, dout_GeCD = whole(G, 2, C, D), mask_of(random, G, 2, C, F), whole(G, 2, C, D)
    operations.meets("uneven parts", F % cuts and cuts > 1)
    operations.meets("gated", is_gated)
    operations.meets("plain", not is_gated)
    out, saved = operations.cut_experts_forward(x_GeCD, mask_GeCF, share, params, cuts, "relu", POINTS)
    dx, dparams = operations.cut_experts_backward(dout_GeCD, saved, share, params, cuts, "relu")
    assert len(saved) == cuts
    wanted = {name: np.zeros_like(value[share]) for name, value in params._asdict().items() if value is not None}
    for g, e, c in np.ndindex(G, 2, C):
        x, dout, factor = x_GeCD[g, e, c], dout_GeCD[g, e, c], mask_GeCF[g, e, c]
        weights = {name: value[share][e] for name, value in params._asdict().items() if value is not None}
        z_in = x @ weights["w_in_EDF"] + weights["b_in_EF"]
        z_act = x @ weights["w_gate_EDF"] + weights["b_gate_EF"] if is_gated else z_in
        linear = z_in if is_gated else np.ones(F)
        hidden = np.maximum(z_act, 0.0) * linear * factor
        assert np.array_equal(out[g, e, c], hidden @ weights["w_out_EFD"] + weights["b_out_ED"])
        dhidden = weights["w_out_EFD"] @ dout * factor
        dz_act, dz_in = dhidden * linear * (z_act > 0.0), dhidden * np.maximum(z_act, 0.0)
        pairs = [("w_gate_EDF", "b_gate_EF", dz_act), ("w_in_EDF", "b_in_EF", dz_in)] if is_gated else [("w_in_EDF", "b_in_EF", dz_act)]
        assert np.array_equal(dx[g, e, c], sum(weights[w] @ dz for w, _, dz in pairs))
        for w, b, dz in pairs:
            wanted[w][e] += np.outer(x, dz)
            wanted[b][e] += dz
        wanted["w_out_EFD"][e] += np.outer(hidden, dout)
        wanted["b_out_ED"][e] += dout
    for name, value in dparams._asdict().items():
        assert (value is None) == (name not in wanted), name
        assert value is None or np.array_equal(value, wanted[name]), name


@clause("E-CUT-1")
@needs("uneven parts")
@draws(size=st.integers(1, 12), parts=st.integers(1, 5))
def test_slices_of__cover_an_axis_once(operations: Operations, size: int, parts: int) -> None:
    """The parts follow one another, hold every index once, and differ by one at most."""
    found = operations.slices_of(size, parts)
    lengths = [part.stop - part.start for part in found]
    operations.meets("uneven parts", len(set(lengths)) > 1)
    assert len(found) == parts
    assert [i for part in found for i in range(part.start, part.stop)] == list(range(size))
    assert max(lengths) - min(lengths) <= 1


@clause("E-CUT-1")
@needs("narrow")
@draws(seed=st.integers(0, 2**20), cuts=st.integers(1, 3))
def test_cut_experts_forward__rounds_the_sum(operations: Operations, seed: int, cuts: int) -> None:
    """Where the experts' output is stored in bfloat16, the sum of the parts lies on its grid, and so does every part's hidden row."""
    from refswitch.numbers.precision import FORMATS, round_to

    random = np.random.Generator(np.random.Philox(seed))
    points = POINTS._replace(expert_out=FORMATS["bfloat16"], hidden=FORMATS["bfloat16"])
    params = random_experts(random, 2, 5, 7, False)
    x_GeCD = random.normal(size=(2, 2, 3, 5))
    out, saved = operations.cut_experts_forward(x_GeCD, np.ones((2, 2, 3, 7)), slice(0, 2), params, cuts, "silu", points)
    operations.meets("narrow", cuts > 1)
    assert np.array_equal(out, round_to(out, points.expert_out))
    assert all(np.array_equal(part.hidden_GECF, round_to(part.hidden_GECF, points.hidden)) for part in saved)


# -------------------------------------------------------------------------------------------------------------------- whole layers


class Lattice(NamedTuple):
    """Data for which no sum rounds, in groups: probabilities are 1/2 for two experts and 0 for the others."""

    x_GSD: np.ndarray
    valid_GS: np.ndarray
    mask_GSF: np.ndarray
    dout_GSD: np.ndarray
    params: SwitchParams


def lattice(layout: Layout, random: np.random.Generator) -> Lattice:
    """Draw integers; the last features say which pair of experts a token likes, and expert E - 1 stands alone where E is odd."""
    (E, D, F), G = layout.sizes, layout.A * layout.R * layout.g
    pairs = (E + 1) // 2

    def whole(*shape: int) -> np.ndarray:
        return random.integers(-3, 4, shape).astype(float)

    liked_GS = random.integers(0, pairs, (G, layout.S))
    x_GSD = np.concatenate([whole(G, layout.S, D - 1), (liked_GS[..., None] == np.arange(pairs)) * 1.0], axis=-1)
    w_router_DE = np.concatenate([np.zeros((D - 1, E)), np.where(np.arange(pairs)[:, None] == np.arange(E) // 2, 0.0, -FAR)])
    width = x_GSD.shape[-1]
    experts = ExpertsParams(whole(E, width, F), None, whole(E, F, width), whole(E, F), np.zeros((E, F)), whole(E, width))
    params = SwitchParams(w_router_DE, np.zeros(E), experts, whole(width))
    return Lattice(x_GSD, layout.valid(random), mask_of(random, G, layout.S, F), whole(G, layout.S, width), params)


def on_ranks(operations: Operations, layout: Layout, data: Lattice, daux: float, dz: float, activation: str = "relu", noise: Any = 1.0) -> Any:
    """Run a layout forward and backward; what has an axis of tokens comes back in groups."""
    noise_GSD = np.broadcast_to(noise, data.x_GSD.shape)
    parts = ParallelInputs(*(layout.by_rank(part) for part in (data.x_GSD, data.valid_GS, noise_GSD, data.mask_GSF)))
    statics = ParallelStatics(layout.cuts, layout.capacity, aux_of(layout.seed, 2), TOP_2.z, activation, POINTS)
    outputs, saved = operations.expert_parallel_forward(parts, data.params, statics)
    dx_ARgSD, dparams = operations.expert_parallel_backward(layout.by_rank(data.dout_GSD), daux, dz, saved, data.params, statics)
    return outputs, dx_ARgSD.reshape(data.x_GSD.shape), dparams


def arrays_of(outputs: Any, dx_GSD: np.ndarray, dparams: SwitchParams) -> dict[str, np.ndarray]:
    """Return by name all that is compared to the bit, the z-loss left out."""
    experts = {name: value for name, value in dparams.experts._asdict().items() if value is not None}
    out = outputs.out_ARgSD.reshape(dx_GSD.shape)
    return {"out": out, "aux": outputs.aux_loss, "dx": dx_GSD, "dw_router": dparams.w_router_DE, "db_router": dparams.b_router_E} | experts | {
        "db_shared": dparams.b_shared_D
    }  # fmt: skip


@clause("E-SAME-1", "E-SUM-1")
@needs("several shares", "several copies", "several parts", "a rank of padding")
@draws(
    examples=[Layout(2, 2, 2, 2, 3, 8, 3, "scattered", 1), Layout(4, 1, 3, 1, 5, 8, 2, "a rank of padding", 2)],
    layout=layouts(S=st.sampled_from((8, 4, 1)), A=st.sampled_from((1, 2, 4)), R=st.sampled_from((1, 2, 4)), g=st.sampled_from((1, 2))),
)
def test_expert_parallel__has_the_bits_of_one_rank(operations: Operations, layout: Layout) -> None:
    """Where no sum rounds, output, balance loss and every gradient of any layout are those of one rank that holds all: sums, never means."""
    random = np.random.Generator(np.random.Philox(layout.seed))
    data, alone = lattice(layout, random), Layout(1, 1, 1, layout.A * layout.R * layout.g, layout.R * layout.E_here, *layout[5:])
    meets(operations, layout)
    ours = arrays_of(*on_ranks(operations, layout, data, 4.0, 0.0))
    theirs = arrays_of(*on_ranks(operations, alone, data, 4.0, 0.0))
    for name, value in theirs.items():
        assert np.array_equal(ours[name], value), name
    assert ours["dw_router"].any() or layout.capacity == 0 or not data.valid_GS.any()


@clause("E-SAME-1")
@needs("drop")
@draws(
    examples=[(layout, "silu") for layout in EXAMPLES],
    layout=layouts(A=st.just(1), R=st.just(1), cuts=st.just(1), E_here=st.integers(2, 6)),
    activation=st.sampled_from((*ACTIVATIONS, "relu")),
)
def test_expert_parallel__one_rank_is_the_switch_layer(operations: Operations, layout: Layout, activation: str) -> None:
    """One rank has every output, integer and gradient of the Switch layer, to the bit, with noise and padding."""
    layout = layout._replace(A=1, R=1, cuts=1)
    random = np.random.Generator(np.random.Philox(layout.seed))
    (E, D, F), G = layout.sizes, layout.g
    params, x_GSD, noise_GSD = (
        random_layer(random, E, D, F, layout.seed % 2 == 0),
        random.normal(size=(G, layout.S, D)),
        1.0 + random.normal(size=(G, layout.S, D)) / 8.0,
    )
    data = Lattice(x_GSD, layout.valid(random), mask_of(random, G, layout.S, F), random.normal(size=x_GSD.shape), params)
    zeros_GSE, priority_GS = np.zeros((G, layout.S, E)), np.broadcast_to(np.arange(layout.S), (G, layout.S))
    inputs = SwitchInputs(x_GSD, data.valid_GS, noise_GSD, zeros_GSE, zeros_GSE, priority_GS, data.mask_GSF)
    statics = Statics(with_knob((TOP_2, MESH)[layout.seed % 2], "pad.zero_input", False), POINTS, activation, layout.capacity)
    theirs, saved = operations.switch_forward(inputs, params, statics)
    dx_GSD, dparams = operations.switch_backward(data.dout_GSD, 0.5, 0.25, saved, params, statics)
    ours, our_dx_GSD, our_dparams = on_ranks(operations, layout, data, 0.5, 0.25, activation, noise_GSD)
    (decision,) = ours.decisions
    operations.meets("drop", np.any(data.valid_GS & ~decision.route.kept_GS))
    for mine, wanted in zip(decision.route, theirs.route, strict=True):
        assert np.array_equal(mine, wanted)
    assert (ours.aux_loss, ours.z_loss) == (theirs.aux_loss, theirs.z_loss)
    assert np.array_equal(decision.gate_gS, theirs.gate_GS)
    for mine, wanted in ((ours.out_ARgSD[0, 0], theirs.out_GSD), (our_dx_GSD, dx_GSD)):
        assert np.array_equal(mine, wanted)
    for mine, wanted in zip((*our_dparams[:2], our_dparams[3], *our_dparams.experts), (*dparams[:2], dparams[3], *dparams.experts), strict=True):
        assert (mine is None and wanted is None) or np.array_equal(mine, wanted)


@clause("E-CAP-1")
@needs("drop", "a rank of padding")
@draws(examples=EXAMPLES, layout=layouts())
def test_decide_forward__asks_nobody(operations: Operations, layout: Layout) -> None:
    """A rank's experts, slots and survivors are those of its groups one by one: first come, first served, padding asks for nothing."""
    random = np.random.Generator(np.random.Philox(layout.seed))
    (E, D, F), G = layout.sizes, layout.A * layout.R * layout.g
    params, x_GSD = random_layer(random, E, D, F, False), random.normal(size=(G, layout.S, D))
    data = Lattice(x_GSD, layout.valid(random), np.ones((G, layout.S, F)), x_GSD, params)
    meets(operations, layout)
    outputs, _, _ = on_ranks(operations, layout, data, 0.0, 0.0)
    routes = [decision.route for decision in outputs.decisions]
    expert_GS, slot_GS, kept_GS = (np.concatenate([route[part] for route in routes]) for part in range(3))
    logits_GSE = x_GSD @ params.w_router_DE + params.b_router_E
    for g in range(G):
        served = [0] * E
        for s in range(layout.S):
            e = int(np.argmax(logits_GSE[g, s]))
            assert expert_GS[g, s] == e
            assert kept_GS[g, s] == (data.valid_GS[g, s] and served[e] < layout.capacity)
            if data.valid_GS[g, s]:
                assert slot_GS[g, s] == served[e]
                served[e] += 1
    operations.meets("drop", np.any(data.valid_GS & ~kept_GS))


def dense_tubes(layout: Layout, data: Lattice, noise_GSD: np.ndarray, activation: str, kept_GS: np.ndarray) -> tuple[Tube, Tube, Tube]:
    """Return tubes of the output and of both losses, each token at each expert, given who is kept."""
    (E, _, _), (G, S, _) = layout.sizes, data.x_GSD.shape
    logits = logits_tube(data.x_GSD, noise_GSD, data.params.w_router_DE, [data.params.b_router_E])
    probs, chosen_GSE = tubes.softmax(logits, A64), np.argmax(logits.value, axis=-1)[..., None] == np.arange(E)
    gate = tubes.where(chosen_GSE & kept_GS[..., None], probs, exact(np.zeros((G, S, E))))
    mask_GSEF = np.broadcast_to(data.mask_GSF[:, :, None], (G, S, E, data.mask_GSF.shape[-1]))
    out = weighted(gate, expert_tubes(data.x_GSD, mask_GSEF, data.params.experts, activation), data.params.b_shared_D)
    aux, z = balance_tubes(probs, chosen_GSE, data.valid_GS, kept_GS, aux_of(layout.seed, 2)), z_tube(logits, data.valid_GS)
    return tubes.where(data.valid_GS[..., None], out, exact(np.zeros(data.x_GSD.shape))), aux, z


@clause("E-LOSS-1", "E-SAME-1", "E-SUM-1")
@needs("several shares", "several copies", "several parts", "a rank of padding", wide=True)
@draws(
    examples=[(layout, "silu") for layout in EXAMPLES], layout=layouts(S=st.sampled_from((4, 5, 1))), activation=st.sampled_from(ACTIVATIONS), fewer=2
)
def test_expert_parallel__losses_and_slopes(operations: Operations, layout: Layout, activation: str) -> None:
    """Output and losses lie in the tubes of a dense evaluation, and every gradient is the slope of their sum at equal routes, on any layout."""
    random = np.random.Generator(np.random.Philox(layout.seed))
    (E, D, F), G = layout.sizes, layout.A * layout.R * layout.g
    params, x_GSD, noise_GSD = (
        random_layer(random, E, D, F, layout.seed % 2 == 0),
        random.normal(size=(G, layout.S, D)),
        1.0 + random.normal(size=(G, layout.S, D)) / 8.0,
    )
    data = Lattice(x_GSD, layout.valid(random), mask_of(random, G, layout.S, F), random.normal(size=x_GSD.shape), params)
    meets(operations, layout)
    outputs, dx_GSD, dparams = on_ranks(operations, layout, data, 3.0, 0.5, activation, noise_GSD)
    kept_GS = np.concatenate([decision.route.kept_GS for decision in outputs.decisions])
    out, aux, z = dense_tubes(layout, data, noise_GSD, activation, kept_GS)
    assert_within(outputs.aux_loss, aux, "aux_loss")
    assert_within(outputs.z_loss, z, "z_loss")
    assert_within(outputs.out_ARgSD.reshape(x_GSD.shape), out, "out")
    noise = noise_of([(out, data.dout_GSD), (aux, np.asarray(3.0)), (z, np.asarray(0.5))])
    arguments = {"x": x_GSD, "w_router": params.w_router_DE, "b_router": params.b_router_E, "b_shared": params.b_shared_D}
    arguments |= {name: value for name, value in params.experts._asdict().items() if value is not None}
    gradients = {"x": dx_GSD, "w_router": dparams.w_router_DE, "b_router": dparams.b_router_E, "b_shared": dparams.b_shared_D}
    gradients |= dparams.experts._asdict()
    for name, value in arguments.items():
        if name == "b_gate_EF" and params.experts.w_gate_EDF is None:
            continue
        direction = random.normal(size=value.shape)

        def along(t: float, name: str = name, value: np.ndarray = value, direction: np.ndarray = direction) -> tuple[float, Any]:
            there = moved(data, name, value + t * direction)
            found, _, _ = on_ranks(operations, layout, there, 0.0, 0.0, activation, noise_GSD)
            total = np.sum(found.out_ARgSD.reshape(x_GSD.shape) * data.dout_GSD) + 3.0 * found.aux_loss + 0.5 * found.z_loss
            return float(total), np.stack([np.stack(decision.route) for decision in found.decisions])

        found = difference_ratio(along, float(np.sum(gradients[name] * direction)), STEP, noise, np.array_equal)
        assert found.refused or found.ok, f"the slope along {name} is off by {found.ratio:.3g} radii"


def moved(data: Lattice, name: str, value: np.ndarray) -> Lattice:
    """Return the data with one argument changed."""
    if name == "x":
        return data._replace(x_GSD=value)
    fields = {"w_router": "w_router_DE", "b_router": "b_router_E", "b_shared": "b_shared_D"}
    if name in fields:
        return data._replace(params=data.params._replace(**{fields[name]: value}))
    return data._replace(params=data.params._replace(experts=data.params.experts._replace(**{name: value})))


@clause("E-SUM-1")
@draws(seed=st.integers(0, 2**20), A=st.integers(2, 4))
def test_expert_parallel_backward__copies_add(operations: Operations, seed: int, A: int) -> None:
    """A copies that all see the same tokens have A times the gradient of one, for whatever is replicated: no mean over them."""
    layout = Layout(A, 2, 1, 1, 2, 4, 2, "none", seed)
    random = np.random.Generator(np.random.Philox(seed))
    one = lattice(layout._replace(A=1), random)
    many = Lattice(*(np.concatenate([part] * A) for part in one[:4]), one.params)  # type: ignore[arg-type]
    _, _, dmany = on_ranks(operations, layout, many, 0.0, 0.0)
    _, _, done = on_ranks(operations, layout._replace(A=1), one, 0.0, 0.0)
    for name, value in (
        ("w_router", done.w_router_DE),
        ("b_shared", done.b_shared_D),
        ("w_in", done.experts.w_in_EDF),
        ("w_out", done.experts.w_out_EFD),
    ):
        found = {"w_router": dmany.w_router_DE, "b_shared": dmany.b_shared_D, "w_in": dmany.experts.w_in_EDF, "w_out": dmany.experts.w_out_EFD}[name]
        assert np.array_equal(found, A * value), name
