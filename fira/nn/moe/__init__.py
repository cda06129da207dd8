"""Mixture-of-Experts layer: router, dispatcher, experts, and auxiliary losses."""
