"""The same CEFM loss trains a Flax NNX model, an Equinox model and a plain function: no adapters."""
