"""Settings: one pydantic model per concern, composed in ``run.py``, loaded in ``loading.py``."""
