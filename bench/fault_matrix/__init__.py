"""The fault matrix: fault x format, each cell measured on real processes and held against what is promised."""
