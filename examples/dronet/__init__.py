"""PULP-DroNet v2: steering and collision for a nano-drone, two tasks in one fused layer."""
