"""Measurements that say before a run what it can and cannot do."""
