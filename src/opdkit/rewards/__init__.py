"""Verifiers: from a response to a reward and a verdict (`verify`, `answers`), isolated where one can hang."""
