"""Offline RL: policy, critics, support sets, QIPO and its trainer."""
