"""Language models over speech units: Griffin and the Transformer baseline."""
