# May import: nothing.
"""Formats of whole models: Hugging Face's Switch and T5 tensors, and ours."""
