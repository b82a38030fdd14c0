"""Report of an evaluation or a tuning: one HTML file, and its figures as images."""
