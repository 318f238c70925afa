"""Model + plan -> a new, smaller model."""
