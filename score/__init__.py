"""Frechet distance, Inception score, precision and recall, of data sets and of samples."""
