# May import: standard library.
"""The operations of `refswitch.reference` as compiled kernels, one package per device; the names are the reference's."""
