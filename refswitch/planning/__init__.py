# May import: standard library, refswitch.model_config, refswitch.errors.
"""What a model costs, by shape alone: nothing is allocated, so that Switch-C is counted as fast as a tiny model."""
