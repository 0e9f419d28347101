"""Processes that train together: how they start, find each other, communicate, and notice that one hangs."""
