# May import: nothing.
"""Wrong operations around the Switch layer: each stands in for one function of the reference, and the properties of its clause must notice it."""
