# May import: standard library, numpy.
"""Number formats and rounding; reading order: `precision`, `bfloat16`, `philox`, `rational`."""
