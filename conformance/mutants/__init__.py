# May import: numpy, the standard library, its own files. Nothing of refswitch: who is judged shares no line with the judge.
"""A Switch layer that is right, in every legal arithmetic, and more than a hundred that are wrong in one place each.

They measure the judge: it must let every variant pass and name every mutant. A mutant is the subject with one stage replaced, so that
reading the replaced function is reading the bug.

Reading order
-------------
1. `products.py`   the legal orders of summing a matrix product; the storage formats
2. `dispatch.py`   three ways to bring a token to its expert and back
3. `tape.py`, `activations.py`, `forward.py`, `gradients.py`   the stages of the layer, each a small function
4. `subject.py`    the layer: the table of stages, and `make`
5. `record.py`     what a mutant is, and the decorator that makes one out of one function
6. `wrong/`        the mutants: routing, placement, experts, losses, backward, precision, state
7. `catalogue.py`  all of them in one list: MUTANTS
8. `variants.py`   all correct layers: VARIANTS
9. `adapter.py`    both as labels for `refswitch verify`

Letters: G groups, S tokens of a group, T = G*S, D model width, E experts, F expert hidden width, N rows of one expert.
"""
