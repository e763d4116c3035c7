# May import: nothing.
"""Operator mutants of the reference: each function with one small error, let loose on the properties of its own clauses.

Reading order: `mutate` (which errors), `properties` (which properties a function must fall to), `forked` (one mutant, one process), `record` (what is
known already, and what is argued to be no error at all). The command is `operator_campaign.py` beside this folder.
"""
