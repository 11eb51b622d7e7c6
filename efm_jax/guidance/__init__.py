"""Other ways to guide a diffusion model toward low energy, to compare energy weighting with.

Each trains something and returns a guided score field from an unguided one:

===================  ==============================  ==========================  =================
guidance             trained besides the score       needs a gradient to sample  exact at beta > 0
===================  ==============================  ==========================  =================
classifier           a classifier of noised data     yes                         at beta = 1 only
classifier-free      the score's label               no                          at beta = 1 only
contrastive energy   the intermediate energy         yes                         at every beta
===================  ==============================  ==========================  =================

For the first two an energy is ``E(x) = -log p(c | x)`` with a class c.  A velocity field is guided through
its path's conversions, :meth:`~efm_jax.paths.GaussianPath.score_from_velocity` and back.

Reference: Zhang et al. 2025 (arXiv 2503.04975), Table 1 and Sec. 4.3.
"""

from efm_jax.guidance.classifier import classifier_guided, classifier_loss
from efm_jax.guidance.classifier_free import classifier_free_guided, drop_labels
from efm_jax.guidance.contrastive import contrastive_guided

__all__ = [
    "classifier_free_guided",
    "classifier_guided",
    "classifier_loss",
    "contrastive_guided",
    "drop_labels",
]
