# May import: standard library, numpy, refswitch.numbers, refswitch.config.
"""What is proven rather than computed: a second oracle of the layer, in exact rationals, written from the spec and not from the reference.

Reading order: `tape`, `exact_rows`, `exact_switch`. Instruments: `shape_tracer`, `tag_lint`, `adjoint`, `finite_difference`, `ulp`, `exercised`.
"""
