# May import: everything of refswitch, lazily.
"""The doors: parse, call, print, exit."""
