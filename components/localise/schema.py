"""Schema of a folder of localisations: report.py writes it, components.register reads it and loads nothing else."""

SCHEMA = "vgg.localisations/1"
