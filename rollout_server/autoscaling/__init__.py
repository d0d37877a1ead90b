"""How many engines there should be: ``policy`` decides (pure), ``autoscaler`` does."""
