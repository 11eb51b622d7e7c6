"""One CEFM loss for Flax NNX, Equinox and a plain function, without adapters; and a tutorial.

`python -m experiments.examples.NAME` runs each.  The first three go from N(0, I) by the energy
||x - 1||^2 at beta 0.5 to N(0.5, 0.5 I); `coupling` and `times` bring noise and times of their own.
"""
