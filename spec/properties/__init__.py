# May import: nothing.
"""What must hold of a Switch layer, whoever wrote it: hypothesis tests of the clauses, on any implementation.

    pytest spec                                       the reference, in the dialects and formats of `implementation.PLAYED`
    pytest spec --refswitch reference::bfloat16       one of them
    pytest spec --refswitch my_adapter.py::label      an adapter file (spec/adapter.md), imported into this process
    pytest spec --hypothesis-profile long             more examples, drawn anew in each run
    pytest spec --all-variants                        every correct variant of conformance/mutants as the control, not a sample

A property is a relation between calls, or a value known beforehand; where a comparison is not exact its radius comes from the declared
profile, by the judge's own tubes.

Two kinds of things are under test, and the first argument of a property says which:

`implementation`  a whole layer, for the clauses that the judge knows (`clauses:` in clauses.yaml). Its mutants are those of conformance/mutants.
`operations`      a namespace of functions by the reference's names, for the clauses around the layer (`operations:` in clauses.yaml): a property
                  calls `operations.norm_forward(...)` and never the reference's function, so that each can be replaced. What it compares with is a
                  relation or a number, else its own plain loop. It is skipped where the namespace lacks a function that its clauses name.
                  Its mutants are records in operation_mutants/*.py, one file for each chapter, found by themselves:

    @clause("T-NORM-1")                       # test_norm.py
    @needs("row_of_zeros")                    # a word of one's own; fails as vacuous where no example said that it met it
    @draws(examples=[...], case=cases())      # nothing to draw, as in an exhaustion: @draws()
    def test_norm_forward__scale_invariance(operations, case):
        operations.meets("row_of_zeros", (case == 0).all(axis=-1).any())
        ...

    @operation_mutant("T-NORM-1", replaces="norm_forward")    # operation_mutants/transformer.py
    def epsilon_left_out(norm_forward, x_BLD, scale_D, epsilon, points):
        "The mean square stands alone under the root."
        return norm_forward(x_BLD, scale_D, 0.0, points)

    MEAN_SUBTRACTED = edited("mean_subtracted", "T-NORM-1", "norm.norm_forward", "old text", "new text", "what is wrong, in a line")

Every file test_*.py of this folder is searched for properties. `test_traceability` holds both kinds to the same: a clause has a property and a
mutant, and one of the mutant's own clause's properties fails on it; on an operation mutant any exception is a failure, since on the reference none is
raised.

Reading order: `implementation` and `operations` (what is under test), `triggers` (which regimes a call met), `strategies` (which cases are drawn),
`scenes` (a call that was played, and how two are compared), `lattice` (cases whose every bit is known), `harness` (what a property is); then the
properties, along a token's way: `test_router`, `test_capacity`, `test_pack`, `test_padding`, `test_experts`, `test_losses`, `test_backward`,
`test_state`, function by function in `test_capacity_rules`, `test_loss_rules`, `test_straight_through`, point by point in `test_layer_rounding`, in
every dialect against rational numbers in `test_exact`; around the layer `drawn` (arrays of an example, comparisons), `model_tubes`, `model_scenes`
(a small encoder-decoder) and one file for each of the reference; then `killing` and `test_traceability`.
"""
