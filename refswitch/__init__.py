# May import: standard library.
"""refswitch: the executable standard for Switch Transformers (arXiv 2101.03961).

Reading order: `dims`, `config`, `reference/router` to `reference/switch`, then `verify/`.
"""

__version__ = "0.1.0"
SPEC_VERSION = "1.0"
