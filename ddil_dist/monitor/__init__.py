"""Watches a running run through its Redis: `python -m ddil_dist.monitor`. No Ray, no torch, nothing of it changed.

snapshot.py reads everything once; report.py compares two readings (rates, shares, the bottleneck in words); screen.py
draws a report for a terminal of any width; metrics.py writes one for Prometheus.
"""
