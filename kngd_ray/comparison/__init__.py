"""Runs side by side: rows of an experiment, their statistics, tables and page."""
