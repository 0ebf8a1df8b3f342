"""Measuring: what to run, on which model or random shape, how long it takes, and how that is printed."""
