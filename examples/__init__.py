"""Workloads to copy: a network, its data, losses and metrics, in one small folder each."""
