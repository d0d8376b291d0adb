"""Carries out what the pure parts decide: sessions, the worker, the coordinator's pipeline."""
