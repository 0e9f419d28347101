"""Heartbeats between the ranks of an attempt, and reports about ranks that hang or are gone."""
