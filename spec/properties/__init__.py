# May import: nothing.
"""What must hold of a Switch layer, whoever wrote it: hypothesis tests of the clauses, on any implementation.

    pytest spec                                       the reference, in the dialects and formats of `implementation.PLAYED`
    pytest spec --refswitch reference::bfloat16       one of them
    pytest spec --refswitch my_adapter.py::label      an adapter file (spec/adapter.md), imported into this process
    pytest spec --hypothesis-profile long             more examples, drawn anew in each run
    pytest spec --all-mutants                         every mutant and every correct variant, not a sample

A property is a relation between calls, or a value known beforehand; where a comparison is not exact its radius comes from the declared
profile, by the judge's own tubes. Reading order: `implementation` (what is under test), `triggers` (which regimes a call met), `strategies`
(which cases are drawn), `scenes` (a call that was played, and how two are compared), `lattice` (cases whose every bit is known), `harness` (what
a property is); then the properties, along a token's way: `test_router`, `test_capacity`, `test_pack`, `test_padding`, `test_experts`, `test_losses`,
`test_backward`, `test_state`; then `killing` and `test_traceability` (every clause has a property, every mutant falls to one).
"""
