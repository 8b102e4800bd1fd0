"""Batches, samples, text and evaluation."""
