"""Models side by side on one test set: figures with intervals, tests, differing answers, how they were trained."""
