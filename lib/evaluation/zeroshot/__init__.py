"""Zero-shot classification: figures, the study of prompts, calibration, and their charts."""
