"""Closed-form repair of consumers: where their outputs go, which rows are read, and the fit itself."""
