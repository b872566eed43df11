"""Erasure of one subject: a step for every store, and one report that proves it."""
