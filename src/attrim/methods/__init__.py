"""The papers, one file each, and the pipeline that strings the parts together."""
