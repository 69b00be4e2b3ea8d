"""--data-info: what a source holds, in words, numbers and pictures."""
