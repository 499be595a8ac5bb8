"""Evaluation: questions with their right pages and answers → numbers that can be trusted.

``evaluate`` asks the questions of one library or several; an ``Evaluation`` holds what every
ranking found, as ranks of the right pages, and computes all metrics from these.
"""
