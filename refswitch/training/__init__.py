# May import: nothing.
"""A run over time: configuration, loop, metrics, checkpoints, pictures.

Reading order: `config`, `presets`, `run_folder`, `checkpoint`, `non_finite`, `pictures`, `loop`.
"""
