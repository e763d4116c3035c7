# May import: everything below verify (reference, numbers, config, spec_data), never a kernel.
"""The judge: whether an implementation computes the Switch layer that it declares, under the numerics that it declares.

Reading order: `case`, `oracle`, `cases`, `tubes`, `layer`, `gradients`, `route`, `decode`, `judge`, `findings`, `diagnose`, `report`, `run`.
Apart from these stand `child` (runs in the adapter's process) and `process` (talks to it).
"""
