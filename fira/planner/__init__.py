"""Planner: predict step time and memory of each layout, and search the fastest one."""
