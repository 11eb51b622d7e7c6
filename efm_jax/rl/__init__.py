"""Offline RL: configuration, generative model, critics, agents and their trainer."""
