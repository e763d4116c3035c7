# May import: the standard library and, by path, the package around it.
"""The variants and mutants as adapters: `refswitch verify conformance/mutants/adapter.py::mutant/gate_applied_twice`.

Labels are `variant/NAME`, `mutant/NAME` (the mutant's first profile, all results exported) and `mutant/NAME/PROFILE/EXPORTS`. The file is
loaded by its path, so that the package is loaded by path as well, under a name of its own.
"""

import importlib.util
import sys
from pathlib import Path

PACKAGE = "refswitch_mutants"


def load(module):
    """Import a module of the package around this file."""
    if PACKAGE not in sys.modules:
        folder = Path(__file__).resolve().parent
        spec = importlib.util.spec_from_file_location(PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)])
        sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[PACKAGE])
    return importlib.import_module(f"{PACKAGE}.{module}")


DIALECT = "mesh_tensorflow"
PROFILE = "float32"
FEATURES = list(load("subject").FEATURES)
ADAPTERS = {f"variant/{variant.name}": variant.make() for variant in load("variants").VARIANTS}
for mutant in load("catalogue").MUTANTS:
    ADAPTERS[f"mutant/{mutant.name}"] = mutant.make()
    for profile in mutant.profiles:
        for exports in ("all", "black_box"):
            ADAPTERS[f"mutant/{mutant.name}/{profile}/{exports}"] = mutant.make(exports, profile)
